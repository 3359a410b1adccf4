"""The one place where a measured value becomes the integer that is hashed, revealed, compared and paid.

Knows nothing of how it was measured.
"""

import math

from p2pfm.types import NANO, Contribution

CONTRIBUTION_MAX = 2**60
"""What a message can carry (`messages.NanoNats`): a thousand million nats."""


def to_contribution(phi_nats: float) -> Contribution:
    """`phi_nats` in nano-nats, rounded half to even, within +-CONTRIBUTION_MAX; not a number counts as 0.

    A value that is not finite comes from an update that broke the model: infinite gain is no gain, so +inf and nan
    give 0 and -inf gives the least value.
    """
    if math.isnan(phi_nats) or phi_nats == math.inf:
        return Contribution(0)
    if phi_nats == -math.inf:
        return Contribution(-CONTRIBUTION_MAX)
    return Contribution(max(-CONTRIBUTION_MAX, min(CONTRIBUTION_MAX, round(phi_nats * NANO))))
