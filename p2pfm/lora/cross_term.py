"""The cross term: how far averaging LoRA's factors is from averaging what they do.

Knows tensors and numbers only. A figure for people (it is logged after every merge; docs/decisions tells when it
matters): its last bits differ between machines, so nothing that peers compare may depend on it.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfm.lora.compress import Update
from p2pfm.lora.delta import Layout, compute_layout, get_shapes
from p2pfm.lora.merge import clip_factors
from p2pfm.types import WEIGHT_ONE, Tensors, Weight

CROSS_TERM_MAX = 0.5
"""Above this a merge is worth a warning (docs/decisions/why-the-cross-term-warns-at-a-half.md)."""
EXACT_RANK_MAX = 256
"""Columns of stacked factors above which a norm is sketched: exactly, 128 peers of rank 8 cost 17 GFLOP a module."""
SKETCH_DRAWS = 64
"""Each draw's relative error is at most sqrt(2), for a matrix of rank one; 64 draws and many modules average it."""

Matrices = Sequence[NDArray[np.floating]]


def compute_cross_term_ratio(updates: Sequence[tuple[Update, Weight]], base: Tensors) -> float:
    """|P - B A| / |P - B0 A0|, Frobenius, over all modules; 0 where nothing moved.

    B A is what `merge` gives, and P = B0 A0 + sum_i w_i (B_i A_i - B0 A0) is what averaging dW would give, both with
    the weights as they are: where they sum to less than one, the base keeps the rest and is averaged as a peer that
    stood still. 0 for adapter kinds that are linear in what they train: no module of `ffa`, `fed_sb`, `ia3` or
    `prompt` has both a `lora_A` and a `lora_B` in its base.

    Never forms out x in; exact up to EXACT_RANK_MAX stacked columns a module, with (out + in) * columns**2
    operations, and above from a sketch, good to a few percent.
    """
    layout = compute_layout(get_shapes(base))
    assert all(update.layout == layout for update, _ in updates), "an update of another adapter than the base"
    triples = zip(updates, clip_factors([update for update, _ in updates]), strict=True)
    moving = [(update, weight / WEIGHT_ONE, factor) for (update, weight), factor in triples if weight]
    shares = [share for _, share, _ in moving]
    sums = np.zeros(2)
    for name_a, name_b in _get_pairs(base) if moving else ():
        steps_a = [factor * _slice(update, layout, name_a) for update, _, factor in moving]
        steps_b = [factor * _slice(update, layout, name_b) for update, _, factor in moving]
        sums += _compute_terms(shares, steps_a, steps_b, base[name_a], base[name_b])
    return _compute_ratio(sums)


def compute_dense_ratio(deltas: Sequence[tuple[float, Tensors]], base: Tensors) -> float:
    """The same of dense deltas, each with its share (their sum is at most 1), as they are: nothing is clipped."""
    sums = np.zeros(2)
    for name_a, name_b in _get_pairs(base) if deltas else ():
        shares = [share for share, _ in deltas]
        steps_a, steps_b = ([np.asarray(delta[name], np.float64) for _, delta in deltas] for name in (name_a, name_b))
        sums += _compute_terms(shares, steps_a, steps_b, base[name_a], base[name_b])
    return _compute_ratio(sums)


def has_cross_term(names: Collection[str]) -> bool:
    """Whether averaging these tensors can differ from averaging what they do: some module trains both its factors."""
    return bool(_get_pairs(names))


def _get_pairs(names: Collection[str]) -> list[tuple[str, str]]:
    modules = (name.removesuffix(".lora_A") for name in sorted(names) if name.endswith(".lora_A"))
    return [(f"{module}.lora_A", f"{module}.lora_B") for module in modules if f"{module}.lora_B" in names]


def _compute_terms(
    shares: Sequence[float],
    steps_a: Matrices,
    steps_b: Matrices,
    base_a: NDArray[np.floating],
    base_b: NDArray[np.floating],
) -> tuple[float, float]:
    """One module's (|P - B A|**2, |P - B0 A0|**2): steps of A are (rank, in), of B (out, rank)."""
    weighted = np.array(shares)[:, None, None]
    all_a, all_b = np.stack(steps_a), np.stack(steps_b)  # (num_updates, rank, in), (num_updates, out, rank)
    mean_a, mean_b = np.sum(weighted * all_a, axis=0), np.sum(weighted * all_b, axis=0)
    # P - B A is the covariance of the steps, with the base among them (it has the rest of the weight, and step 0).
    spread = [*(weighted * (all_b - mean_b)), (1.0 - math.fsum(shares)) * mean_b]
    cross = _compute_norm_squared(spread, [*(all_a - mean_a), mean_a])
    return cross, _compute_norm_squared([mean_b, base_b, *(weighted * all_b)], [base_a, mean_a, *all_a])


def _compute_ratio(sums: NDArray[np.float64]) -> float:
    cross, moved = sums.tolist()
    return math.sqrt(cross / moved) if moved > 0 else 0.0


def _slice(update: Update, layout: Layout, name: str) -> NDArray[np.float64]:
    """One tensor of an update, dense (whole adapters of all peers at once would take gigabytes)."""
    index = layout.names.index(name)
    start, end = layout.offsets[index], layout.offsets[index + 1]
    first, last = np.searchsorted(update.positions, (start, end))
    flat = np.zeros(end - start)
    flat[update.positions[first:last] - start] = update.values[first:last]
    return flat.reshape(layout.shapes[index])


def _compute_norm_squared(left: Matrices, right: Matrices) -> float:
    """|sum_i left_i right_i|**2 (Frobenius) of (out, rank) times (rank, in).

    As trace(L^T L R R^T) of the stacked factors; with many columns as the mean of |L R z|**2 over normal z.
    """
    stacked_left = np.concatenate(left, axis=1, dtype=np.float64)  # (out, columns)
    stacked_right = np.concatenate(right, axis=0, dtype=np.float64)  # (columns, in)
    if stacked_left.shape[1] > EXACT_RANK_MAX:
        draws = np.random.default_rng(0).standard_normal((stacked_right.shape[1], SKETCH_DRAWS))
        return float(np.sum((stacked_left @ (stacked_right @ draws)) ** 2)) / SKETCH_DRAWS
    return max(0.0, float(np.sum((stacked_left.T @ stacked_left) * (stacked_right @ stacked_right.T))))
