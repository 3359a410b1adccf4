"""Who goes down when, for how long, and what is left of its disk. Knows no peer and no protocol.

A host has times at which it would be up (a trace, the hours of its day, late arrival), and on top of them it crashes or
leaves. `Churn` plans what befalls the hosts that are up, and says when one that went is back. Who is up is known to the
driver: a crash strikes at an action, and nobody can plan when that is.
"""

import csv
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import msgspec

from p2pfm.errors import ConfigError
from p2pfm.types import Millis

DAY_HOURS = 24

NUM_ACTIONS_MAX = 5
"""A crash strikes after at most so many further actions: in the middle of a step as often as between two."""

FOREVER_MS = 1 << 60

RESIDENTIAL = Path(__file__).parent / "traces" / "residential.csv"
"""A day of 64 home computers, see `draw_trace`."""

KAD_UP = (169.5385, 0.61511)
"""Scale [min] and shape of the Weibull law that sessions in KAD follow, a network of home computers (Steiner,
En-Najjary, Biersack: "Analyzing Peer Behavior in KAD", Eurecom RR-07-205, 2007; mean 247 min)."""

KAD_DOWN = (413.6765, 0.47648)
"""The same of the time between sessions (mean 906 min)."""

JUMPS_MAX = 1_000
"""Whoever is not up after so many sessions and mornings, for these never meet, is never up."""

WARM_UP_MS = 30 * 86_400_000
"""Thirty mean pauses and more: nothing is left of how a trace began."""


class UpTime(NamedTuple):
    """One session of a trace: a row of its CSV file."""

    peer: int
    """The host's number."""
    up_from_ms: int
    """After genesis [ms]."""
    up_to_ms: int


class Diurnal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Machines that run during some hours of their local day only."""

    share: float
    """Of all peers; the others do not sleep."""
    day_ms: int = 86_400_000
    """The length of a day [ms]; genesis is midnight UTC."""
    from_hour: float = 8.0
    """Local hour at which they come, in 24ths of a day."""
    num_hours: float = 14.0
    """For how many hours they stay."""
    spread_hours: float = 2.0
    """Each one comes, every day, up to this earlier or later than `from_hour`: drawn once."""


class ChurnModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scenario says of its machines' comings and goings."""

    crash: float = 0.0
    """Share of the peers that are killed in each round, each at a random action. Of this share and all others: what it
    comes to beside whole peers is the chance of one more."""
    down_ms: tuple[int, int] = (2_000, 40_000)
    """How long a crashed peer stays away from the moment at which it is killed: least and greatest [ms]."""
    lost_disk: float = 0.0
    """Share of the crashes that destroy the disk: the peer begins anew from genesis, with its old keys."""
    leave: float = 0.0
    """Share of the peers that leave in each round, between two steps."""
    away_ms: tuple[int, int] = (0, 0)
    """How long those stay away: least and greatest [ms]; (0, 0): for good."""
    late: float = 0.0
    """Share of the peers that are not there at genesis."""
    late_ms: tuple[int, int] = (0, 0)
    """When those come: least and greatest time after genesis [ms]."""
    diurnal: Diurnal | None = None
    trace: tuple[UpTime, ...] = ()
    """When peers are up, up to the last one that is named; further peers always are, unless the trace repeats. After
    their last session they are gone for good, unless the trace repeats."""
    trace_file: str = ""
    """Instead of `trace`: a CSV file with a header and the columns peer, up_from_ms, up_to_ms; "residential" is the one
    that ships with the simulator. `load_trace` reads it."""
    trace_share: float = 1.0
    """Of the peers that would follow the trace, so many do, drawn from the seed; the others are always up."""
    trace_repeats: bool = False
    """Further peers follow the trace from its first peer again, and when its last session ends it begins again."""
    trace_speedup: int = 1
    """So many hours of the trace pass in one of the run."""


class Departure(msgspec.Struct, frozen=True):
    """A host goes down, unless it is down."""

    index: int
    when_ms: Millis
    down_ms: Millis | None
    """How long it is away at least, from when it has gone; None: for good."""
    num_actions: int | None
    """Killed after so many further actions; None: at once, between two steps."""
    loses_disk: bool
    reason: Literal["crash", "leave", "schedule"]


def validate_churn_model(model: ChurnModel) -> None:
    """Refuse churn that cannot be.

    Raises:
        ConfigError: names the field, what is allowed, and what it was.
    """
    checks: list[tuple[str, float, float, float]] = [
        (key, getattr(model, key), 0, 1) for key in ("crash", "lost_disk", "leave", "late", "trace_share")
    ]
    checks.append(("trace_speedup", model.trace_speedup, 1, 1_000_000))
    for key in ("down_ms", "away_ms", "late_ms"):
        low, high = getattr(model, key)
        checks += [(key, low, 0, high), (key, high, low, FOREVER_MS)]
    if model.diurnal:
        day = model.diurnal
        checks.append(("diurnal.share", day.share, 0, 1))
        checks.append(("diurnal.day_ms", day.day_ms, 1_000, FOREVER_MS))
        checks.append(("diurnal.from_hour", day.from_hour, 0, DAY_HOURS))
        checks.append(("diurnal.num_hours", day.num_hours, 0.1, DAY_HOURS - 0.1))
        checks.append(("diurnal.spread_hours", day.spread_hours, 0, DAY_HOURS))
    for row in model.trace:
        checks.append(("trace peer", row.peer, 0, 1 << 20))
        checks.append((f"trace up_to_ms of peer {row.peer}", row.up_to_ms, row.up_from_ms + 1, FOREVER_MS))
    for before, after in pairwise(sorted(model.trace)):
        if before.peer == after.peer:
            checks.append((f"trace up_from_ms of peer {after.peer}", after.up_from_ms, before.up_to_ms + 1, FOREVER_MS))
    if model.trace_file:
        raise ConfigError(
            f"scenario churn.trace_file: expected its rows in churn.trace, and {model.trace_file!r} has not been read: "
            "call sim.churn.load_trace"
        )
    for key, value, least, most in checks:
        if not least <= value <= most:
            raise ConfigError(f"scenario churn.{key}: expected {least:g} to {most:g}, got {value:g}")


def load_trace(model: ChurnModel, folder: Path) -> ChurnModel:
    """The same model with the rows of its trace file, if it names one.

    Args:
        folder: what the file's name is relative to: where the scenario lies.

    Raises:
        ConfigError: there is no such file, or it is not a trace.
    """
    if not model.trace_file:
        return model
    path = RESIDENTIAL if model.trace_file == "residential" else folder / model.trace_file
    return msgspec.structs.replace(model, trace=read_trace(path), trace_file="")


def read_trace(path: Path) -> tuple[UpTime, ...]:
    """The sessions in a CSV file with the columns peer, up_from_ms, up_to_ms.

    Raises:
        ConfigError: there is no such file, or it is not a trace.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets put a mark before the first column
            rows = tuple(UpTime(*(int(row[name]) for name in UpTime._fields)) for row in csv.DictReader(lines))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        columns = ", ".join(UpTime._fields)
        raise ConfigError(
            f"{path}: expected a CSV file of whole numbers with the columns {columns}: {error!r}"
        ) from error
    if not rows:
        raise ConfigError(f"{path}: expected one session or more, got none")
    return rows


def draw_trace(num_peers: int, length_ms: int, rng: Random) -> tuple[UpTime, ...]:
    """Sessions of home computers from genesis to `length_ms`, to the second: up and down by turns (KAD_UP, KAD_DOWN).

    They have been so for `WARM_UP_MS` before, so the sessions and pauses under way at genesis are the long ones, and at
    any time as many are up as were of KAD's: 21 %.
    """
    rows = []
    for peer in range(num_peers):
        at_ms, is_up = -WARM_UP_MS, False
        while at_ms < length_ms:
            minutes = rng.weibullvariate(*(KAD_UP if is_up else KAD_DOWN))
            end_ms = at_ms + 1_000 * (1 + int(minutes * 60))
            if is_up and end_ms > 0:
                rows.append(UpTime(peer, max(at_ms, 0), min(end_ms, length_ms)))
            at_ms, is_up = end_ms, not is_up
    return tuple(rows)


def compute_trace_end(model: ChurnModel) -> int:
    """When the last session of its trace ends, after genesis, as fast as the run goes through it [ms]; 0: none."""
    return max((row.up_to_ms for row in model.trace), default=0) // model.trace_speedup


class Churn:
    """One world's comings and goings: who is down when, drawn round by round."""

    def __init__(
        self,
        model: ChurnModel,
        num_hosts: int,
        genesis_ms: Millis,
        rng: Random,
        utc_hours: Sequence[int] = (),
    ) -> None:
        """Args: model: a valid one, its trace read; utc_hours: every host's local time less UTC; empty: drawn."""
        self._model = model
        self._num_hosts = num_hosts
        self._genesis_ms = genesis_ms
        self._rng = Random(rng.getrandbits(64))
        self._arrivals_ms: dict[int, int] = {}
        for index in self._draw_hosts(model.late):
            self._arrivals_ms[index] = self._rng.randint(*model.late_ms)
        self._mornings_ms = self._draw_mornings(utc_hours)
        self._sessions = self._get_sessions()
        self._turn_ms = (compute_trace_end(model) if model.trace_repeats else 0) or FOREVER_MS
        """How long the trace is until it begins again."""

    def is_up_at_start(self, index: int) -> bool:
        """Whether a host is there at genesis."""
        return self._next_up(index, 0) == 0

    def first_up_ms(self, index: int) -> Millis | None:
        """When a host is first there: at genesis or later; None: never."""
        first_ms = self._next_up(index, 0)
        return None if first_ms is None else Millis(self._genesis_ms + first_ms)

    def plan(self, start_ms: Millis, end_ms: Millis) -> list[Departure]:
        """All that go from `start_ms` on and before `end_ms`, in order of time; rounds are planned one after the other.

        Of those that are down by then nothing happens.
        """
        start, end = start_ms - self._genesis_ms, end_ms - self._genesis_ms
        # Those that are down by their own schedule come first in a millisecond: whoever sleeps cannot crash.
        going = [(when, 0, index) for index in self._sleepers() for when in self._evenings(index, start, end)]
        going += [(self._rng.randrange(start, end), 1, index) for index in self._draw_hosts(self._model.crash)]
        going += [(self._rng.randrange(start, end), 2, index) for index in self._draw_hosts(self._model.leave)]
        return [self._plan(Millis(self._genesis_ms + when), rank, index) for when, rank, index in sorted(going)]

    def _plan(self, when_ms: Millis, rank: int, index: int) -> Departure:
        model, rng = self._model, self._rng
        if rank == 0:
            return Departure(index, when_ms, Millis(0), None, False, "schedule")
        if rank == 1:
            down_ms, num_actions = Millis(rng.randint(*model.down_ms)), rng.randint(0, NUM_ACTIONS_MAX)
            return Departure(index, when_ms, down_ms, num_actions, rng.random() < model.lost_disk, "crash")
        away_ms = Millis(rng.randint(*model.away_ms)) if any(model.away_ms) else None
        return Departure(index, when_ms, away_ms, None, False, "leave")

    def get_back_ms(self, departure: Departure, gone_ms: Millis) -> Millis | None:
        """When a host that went at `gone_ms` is started again: a moment later at least; None: never."""
        if departure.down_ms is None:
            return None
        back = self._next_up(departure.index, gone_ms - self._genesis_ms + max(1, departure.down_ms))
        return None if back is None else Millis(self._genesis_ms + back)

    def _draw_hosts(self, share: float) -> list[int]:
        return self._draw_some(range(self._num_hosts), share)

    def _draw_some(self, hosts: Sequence[int], share: float) -> list[int]:
        """So many of the hosts as their share, or one more: what is left of it is the chance of that one, so that over
        many rounds a share of less than a host comes to its number, too."""
        exact = Fraction(str(share)) * len(hosts)  # as it was written: whole numbers stay whole
        num_drawn = floor(exact)
        if exact > num_drawn and self._rng.random() < exact - num_drawn:
            num_drawn += 1
        return self._rng.sample(hosts, num_drawn)

    # --- when a host would be up, in ms after genesis

    def _draw_mornings(self, utc_hours: Sequence[int]) -> dict[int, int]:
        """When the day of each host that sleeps begins, in ms of the UTC day."""
        day = self._model.diurnal
        if day is None:
            return {}
        mornings = {}
        for index in self._draw_hosts(day.share):
            zone = utc_hours[index] if utc_hours else self._rng.randrange(DAY_HOURS)
            spread_ms = int(day.spread_hours * day.day_ms / DAY_HOURS)
            late_ms = self._rng.randint(-spread_ms, spread_ms)
            mornings[index] = (int((day.from_hour - zone) * day.day_ms / DAY_HOURS) + late_ms) % day.day_ms
        return mornings

    def _get_sessions(self) -> dict[int, list[UpTime]]:
        """Every host's rows of the trace, in order; no entry: always up."""
        speedup = self._model.trace_speedup
        rows: dict[int, list[UpTime]] = {}
        for peer, from_ms, to_ms in sorted(self._model.trace):
            mine, row = rows.setdefault(peer, []), UpTime(peer, from_ms // speedup, to_ms // speedup)
            if row.up_from_ms < row.up_to_ms:  # not a session that the run is too fast for
                mine.append(row)
        num_traced = max(rows, default=-1) + 1
        num_followers = self._num_hosts if rows and self._model.trace_repeats else min(num_traced, self._num_hosts)
        followers: Sequence[int] = range(num_followers)
        if self._model.trace_share < 1:
            followers = sorted(self._draw_some(followers, self._model.trace_share))
        return {index: rows.get(index % num_traced, []) for index in followers}

    def _sleepers(self) -> list[int]:
        """Hosts that ever go by their own schedule."""
        return sorted(self._mornings_ms.keys() | self._sessions.keys())

    def _next_up(self, index: int, at: int) -> int | None:
        """The first moment from `at` on at which a host would be up."""
        at = max(at, self._arrivals_ms.get(index, 0))
        for _ in range(JUMPS_MAX):
            begin = self._next_in_session(index, at)
            if begin is None:
                return None
            at = self._next_in_day(index, begin)
            if at == begin:
                return at
        return None

    def _is_up(self, index: int, at: int) -> bool:
        is_there = at >= self._arrivals_ms.get(index, 0)
        return is_there and self._next_in_session(index, at) == self._next_in_day(index, at) == at

    def _next_in_session(self, index: int, at: int) -> int | None:
        rows = self._sessions.get(index)
        if rows is None:
            return at
        turn_ms = at // self._turn_ms * self._turn_ms
        row = bisect_right(rows, at - turn_ms, key=lambda row: row.up_to_ms)
        if row < len(rows):
            return max(at, turn_ms + rows[row].up_from_ms)
        return turn_ms + self._turn_ms + rows[0].up_from_ms if rows and self._model.trace_repeats else None

    def _next_in_day(self, index: int, at: int) -> int:
        day, morning = self._model.diurnal, self._mornings_ms.get(index)
        if day is None or morning is None:
            return at
        since = (at - morning) % day.day_ms
        return at if since < self._stay_ms() else at + day.day_ms - since

    def _stay_ms(self) -> int:
        assert self._model.diurnal, "only who sleeps has a day"
        return int(self._model.diurnal.num_hours * self._model.diurnal.day_ms / DAY_HOURS)

    def _evenings(self, index: int, start: int, end: int) -> Iterator[int]:
        """The moments in [start, end) at which a host goes by its schedule."""
        turns_ms = range(max(0, start - 1) // self._turn_ms * self._turn_ms, end, self._turn_ms)
        rows = self._sessions.get(index, ())
        ends = {turn_ms + row.up_to_ms for turn_ms in turns_ms for row in rows if start <= turn_ms + row.up_to_ms < end}
        day, morning = self._model.diurnal, self._mornings_ms.get(index)
        if day is not None and morning is not None:
            first = (morning + self._stay_ms()) % day.day_ms
            ends |= set(range(start + (first - start) % day.day_ms, end, day.day_ms))
        # It goes if it was there until now and is not any more.
        yield from (when for when in sorted(ends) if self._is_up(index, when - 1) and not self._is_up(index, when))
