"""The deterministic merge: bring every update to the median norm, add with integer weights, round once.

Knows tensors and numbers only. Every machine gets the same bytes: norms are exactly rounded, sums run in float64,
element by element, in the order of the payloads' digests, and each result is rounded to float32 once.
"""

import math
from collections.abc import Sequence

import numpy as np

from p2pfm.lora.compress import Update
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, unflatten
from p2pfm.types import WEIGHT_ONE, Array, Tensors, Weight

STRETCH_MAX = 1.25
"""No update is stretched further: honest norms are at least 0.85 of their median in all settings measured, and what is
next to nothing stays so."""


def clip_factors(updates: Sequence[Update]) -> tuple[float, ...]:
    """What to scale each update by so that all have the median norm: larger ones shrink, smaller ones are stretched.

    With shrinking alone whoever is below the median would draw 3% more for sending three times its update
    (docs/decisions/why-duplicates-are-paid-once.md). At most by STRETCH_MAX; 1 for zero updates, which do not count in
    the median: else free riders could shrink everybody to nothing.
    """
    return _bring_to_median([update.norm() for update in updates], STRETCH_MAX)


def compute_clip_factors(norms: Sequence[float]) -> tuple[float, ...]:
    """Factors that bring every norm down to the median norm (lower median; 1 for smaller norms).

    Zero updates are not counted in the median: otherwise free riders could clip everybody to nothing.

    Raises:
        ValueError: a norm that is negative or not finite.
    """
    if not all(0 <= norm < math.inf for norm in norms):
        raise ValueError(f"expected finite norms of at least 0, got {[n for n in norms if not 0 <= n < math.inf]}")
    return _bring_to_median(norms, 1.0)


def merge(base: Tensors, updates: Sequence[tuple[Update, Weight]]) -> dict[str, Array]:
    """base + sum_i weight_i / WEIGHT_ONE * update_i at the median norm, whatever the order in which updates come.

    No update, or none of a weight other than 0, gives the base's own bytes. The median norm is that of all updates
    given, so give also those of weight 0. The result is finite for finite input within float32's range: levels are
    bounded by the payload format.
    """
    ordered = sorted(updates, key=lambda item: (item[0].digest, item[1]))
    layout = compute_layout(get_shapes(base))
    total = flatten(base).astype(np.float64)
    factors = clip_factors([update for update, _ in ordered])
    for (update, weight), factor in zip(ordered, factors, strict=True):
        assert update.layout == layout, "an update of another adapter than the base"
        if weight:
            # A multiply and then an add, never fused: the same two roundings everywhere.
            share = weight / WEIGHT_ONE * factor
            total[update.positions] += share * update.values.astype(np.float64)
    return unflatten(total.astype(np.float32), layout)


def _bring_to_median(norms: Sequence[float], stretch_max: float) -> tuple[float, ...]:
    moving = sorted(norm for norm in norms if norm > 0)
    median = moving[(len(moving) - 1) // 2] if moving else 0.0
    return tuple(min(stretch_max, median / norm) if norm > 0 else 1.0 for norm in norms)
