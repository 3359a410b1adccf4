"""What updates repeat of earlier rounds': public work, for which nobody is paid twice.

Knows sparse vectors and the loss's slope; no peer, round or model. Gains persist: on our task another's update of one
to three rounds ago, announced again, earns 0.4 to 1.0 of what it earned its maker, and noise or mixing hides where it
came from. So the part of an update that lies in the span of remembered ones (least squares) earns nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfm.contribution.similarity import Vector, compute_cosines, compute_norms

PARAMETERS_PER_VECTOR = 1024
"""At most one remembered vector for so many parameters: by chance alone an update lies to m / num_parameters in the
span of m vectors, and a thousandth may be lost."""

VALUES_MAX = 1 << 24
"""Nonzero values in all remembered vectors: 200 MB, and some ten seconds to decode."""

SINGULAR = 1e-4
"""Directions of less energy than this in the remembered unit vectors are noise of float32, and no directions."""


def compute_room(num_parameters: int, num_values: int) -> int:
    """How many earlier updates of at most `num_values` nonzero values are worth remembering."""
    return min(num_parameters // PARAMETERS_PER_VECTOR, VALUES_MAX // max(1, num_values))


def compute_repeated_gains(
    updates: Sequence[Vector],
    earlier: Sequence[Vector],
    slope: NDArray[np.float64],
    counts: NDArray[np.bool_],
) -> list[float]:
    """What each update gains by its part in the span of earlier ones [nats/token at weight 1]; 0 where nothing counts.

    Args:
        slope: (num_parameters,) gradient of the loss: a step v gains -v . slope.
        counts: (num_updates, num_earlier) which earlier vectors count against which update.

    Raises:
        ValueError: positions that are not sorted and distinct, or outside of the vector.
    """
    if not earlier or not updates:
        return [0.0] * len(updates)
    among, between = compute_cosines(earlier, slope.size), compute_cosines(earlier, slope.size, updates)
    norms = compute_norms(updates)
    lengths = np.maximum(compute_norms(earlier), np.finfo(np.float64).tiny)
    unit_gains = np.array([-_dot(slope, vector) for vector in earlier]) / lengths
    gains = np.zeros(len(updates))
    choices, choice_of = np.unique(counts, axis=0, return_inverse=True)
    for number, choice in enumerate(choices):
        chosen, mine = np.flatnonzero(choice), np.flatnonzero(choice_of.ravel() == number)
        # v's part in the span is sum_j c_j e_j with c = G^-1 b; its gain is g . c = (G^-1 g) . b.
        inverse = np.linalg.pinv(among[np.ix_(chosen, chosen)], rcond=SINGULAR, hermitian=True)
        gains[mine] = norms[mine] * (inverse @ unit_gains[chosen] @ between[np.ix_(chosen, mine)])
    found: list[float] = gains.tolist()
    return found


def _dot(slope: NDArray[np.float64], vector: Vector) -> float:
    return float(slope[vector.positions] @ vector.values.astype(np.float64))
