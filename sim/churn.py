"""Who goes down when, for how long, and what is left of its disk. Knows no peer and no protocol."""

import msgspec


class ChurnModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scenario says of its machines' comings and goings."""

    crash: float = 0.0
    """Share of the peers that are killed in each round, each at a random action."""
    down_ms: tuple[int, int] = (2_000, 40_000)
    """How long a crashed peer stays away: least and greatest [ms]."""
