"""The deterministic merge: clip every update to the median norm, add with integer weights, round once.

Knows tensors and numbers only. Every machine gets the same bytes: norms are exactly rounded, sums run in float64,
element by element, in the order of the payloads' digests, and each result is rounded to float32 once.
"""

from collections.abc import Sequence

import numpy as np

from p2pfm.lora.compress import Update
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, unflatten
from p2pfm.types import WEIGHT_ONE, Array, Tensors, Weight


def clip_factors(updates: Sequence[Update]) -> tuple[float, ...]:
    """What to scale each update by so that no norm exceeds the median norm; see `compute_clip_factors`."""
    return compute_clip_factors([update.norm() for update in updates])


def compute_clip_factors(norms: Sequence[float]) -> tuple[float, ...]:
    """Factors that bring every norm down to the median norm (lower median; 1 for smaller norms).

    Zero updates are not counted in the median: otherwise free riders could clip everybody to nothing.
    """
    moving = sorted(norm for norm in norms if norm > 0)
    median = moving[(len(moving) - 1) // 2] if moving else 0.0
    return tuple(min(1.0, median / norm) if norm > 0 else 1.0 for norm in norms)


def merge(base: Tensors, updates: Sequence[tuple[Update, Weight]]) -> dict[str, Array]:
    """base + sum_i weight_i / WEIGHT_ONE * clipped update_i, whatever the order in which updates come.

    The median norm is that of all updates given, so give also those of weight 0. The result is finite for finite
    input within float32's range: levels are bounded by the payload format.
    """
    ordered = sorted(updates, key=lambda item: item[0].digest)
    layout = compute_layout(get_shapes(base))
    total = flatten(base).astype(np.float64)
    factors = clip_factors([update for update, _ in ordered])
    for (update, weight), factor in zip(ordered, factors, strict=True):
        assert update.layout == layout, "an update of another adapter"
        if weight:
            # A multiply and then an add, never fused: the same two roundings everywhere.
            share = weight / WEIGHT_ONE * factor
            total[update.positions] += share * update.values.astype(np.float64)
    return unflatten(total.astype(np.float32), layout)


def compute_cross_term_ratio(updates: Sequence[tuple[Update, Weight]], base: Tensors) -> float:
    """How much averaging factors differs from averaging products: |mean(B A) - mean(B) mean(A)| / |mean(B A) - B0 A0|.

    Frobenius norms over all modules, weights normalised; alarm over 0.05 (ALGORITHMS, part 3). Never forms out x in
    for more than one module at a time.
    """
    sum_weights = sum(weight for _, weight in updates)
    if sum_weights == 0:
        return 0.0
    shares = [weight / sum_weights for _, weight in updates]
    factors = clip_factors([update for update, _ in updates])
    deltas = [update.tensors() for update, _ in updates]
    cross, moved = 0.0, 0.0
    for name_a in sorted(name for name in base if name.endswith(".lora_A")):
        name_b = name_a.removesuffix("A") + "B"
        parts_a = [base[name_a] + factor * delta[name_a] for factor, delta in zip(factors, deltas, strict=True)]
        parts_b = [base[name_b] + factor * delta[name_b] for factor, delta in zip(factors, deltas, strict=True)]
        mean_a = np.tensordot(shares, np.stack(parts_a), axes=1)  # (rank, in)
        mean_b = np.tensordot(shares, np.stack(parts_b), axes=1)  # (out, rank)
        both = zip(shares, parts_a, parts_b, strict=True)
        mean_product = np.sum([share * (part_b @ part_a) for share, part_a, part_b in both], axis=0)  # (out, in)
        cross += float(np.sum((mean_product - mean_b @ mean_a) ** 2))
        moved += float(np.sum((mean_product - base[name_b] @ base[name_a]) ** 2))
    return float((cross / moved) ** 0.5) if moved > 0 else 0.0
