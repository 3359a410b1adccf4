"""LoRA adapters of different ranks as one: exact weighted sums of products B A, by two QRs and one small SVD.

Knows tensors and numbers only, no node and no round: usable alone. Nothing here ever forms an out x in matrix; a
module costs (out + in) * columns**2 operations, where columns is the sum of the ranks (bench/aggregation.py).

**Not for what peers certify.** Singular vectors depend on the LAPACK at hand in their last bits (and, for equal
singular values, altogether), so two machines get other bytes of the same product: such a base has no digest to agree
on. In a running network mixed ranks are nested instead (`NodeConfig.rank`): a peer trains the first rows of A and
columns of B, and its delta is merged like any other (docs/decisions/why-mixed-ranks-are-nested-in-the-round.md).

Products are compared as they are: train every rank with one scale, that is alpha_i / rank_i the same for all.
The stacking is FLoRA's (Wang et al. 2024), the truncation FlexLoRA's (Bai et al. 2024) without its dense sum.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from p2pfm.types import Array, Tensors

Matrix = NDArray[np.floating]

ZERO_SHARE = 1e-6
"""A singular value below this part of the largest is rounding of float32 factors (their unit is 6e-8): no direction."""


NESTED: Mapping[str, Callable[[int], tuple[slice, slice]]] = {
    "lora_A": lambda rank: (slice(rank), slice(None)),
    "lora_B": lambda rank: (slice(None), slice(rank)),
    "lora_R": lambda rank: (slice(rank), slice(rank)),
}
"""The part of each factor that belongs to the first directions."""


class Factors(NamedTuple):
    """dW = b @ a, with b (out, rank) and a (rank, in)."""

    b: Matrix
    a: Matrix


class Truncated(NamedTuple):
    """The best approximation of a sum of products by a product of the wanted rank (Eckart and Young 1936)."""

    factors: Factors
    """Balanced: b^T b = a a^T = diag(singular values); float64; columns of zeros where the sum has fewer directions."""
    singular_values: NDArray[np.float64]
    """All of the sum's, largest first; the rest of its min(out, in) are 0."""

    def error(self) -> float:
        """|sum - b a| (Frobenius): the norm of the singular values that were cut off."""
        return math.hypot(*self.singular_values[self.factors.a.shape[0] :].tolist())


Term = tuple[float, Factors]
"""A product and its weight, which may be negative in a sum."""


def compute_sum(terms: Sequence[Term], rank: int | None = None) -> Truncated:
    """sum_i w_i B_i A_i as one product of rank `rank` (None: of as many directions as the sum can have).

    Untruncated it is the sum to 1e-12 of sum_i |w_i| |B_i A_i| in float64; truncated, off by exactly `error()`.

    Raises:
        ValueError: no terms, matrices that do not fit each other, a value or weight that is not finite, a negative
            rank, or a sum beyond float64.
    """
    if not terms:
        raise ValueError("expected at least one product to sum: without one its shape is not known")
    if rank is not None and rank < 0:
        raise ValueError(f"expected a rank of at least 0, got {rank}")
    size_out, size_in = _validate(terms)
    # Columns of weight 0 only cost time. Each factor gets half of the weight, so neither becomes large alone.
    moving = [(weight, factors) for weight, factors in terms if weight]
    no_columns = Factors(np.zeros((size_out, 0)), np.zeros((0, size_in)))
    parts = [no_columns, *(_scale(weight, factors) for weight, factors in moving)]
    stacked_b = np.concatenate([part.b for part in parts], axis=1)  # (out, columns)
    stacked_a = np.concatenate([part.a for part in parts], axis=0)  # (columns, in)
    basis_b, upper_b = np.linalg.qr(stacked_b)  # (out, min(out, columns)), (min(out, columns), columns)
    basis_a, upper_a = np.linalg.qr(stacked_a.T)
    with np.errstate(over="ignore", invalid="ignore"):
        core = upper_b @ upper_a.T
    if not np.isfinite(core).all():
        raise ValueError("the products are too large for float64: expected norms below 1e150")
    left, values, right = np.linalg.svd(core, full_matrices=False)
    wanted = len(values) if rank is None else rank
    kept = min(wanted, len(values))
    root = np.sqrt(values[:kept])
    factors = Factors(np.zeros((size_out, wanted)), np.zeros((wanted, size_in)))
    factors.b[:, :kept] = basis_b @ (left[:, :kept] * root)
    factors.a[:kept] = (root[:, None] * right[:kept]) @ basis_a.T
    return Truncated(factors, values)


def compute_start(base: Factors, rank: int, fresh: Matrix) -> Factors:
    """What a peer of rank `rank` starts from: the base's best approximation of that rank, ready to train.

    Directions that the base lacks (all of them before round 0) get a row of `fresh` in A and zeros in B: the product
    is the same, and a gradient flows. Two zero factors would never move. Rows of A that are held get the length of
    their fresh rows, so that a step of one learning rate turns them as it turns LoRA's own (a little better than the
    balanced split on five of six runs, docs/LOG.md).

    Args:
        fresh: (at least rank, in) rows of the network's initial A.

    Raises:
        ValueError: as `compute_sum`, or too few or wrong rows in `fresh`.
    """
    if fresh.ndim != 2 or fresh.shape[0] < rank or fresh.shape[1:] != base.a.shape[1:]:
        raise ValueError(f"expected at least {rank} fresh rows of {base.a.shape[1:]}, got {fresh.shape}")
    if not np.isfinite(fresh).all():
        raise ValueError("expected finite fresh rows")
    truncated = compute_sum([(1.0, base)], rank)
    num_held = min(rank, _count_directions(truncated.singular_values))
    b, a = truncated.factors
    a[num_held:], b[:, num_held:] = fresh[num_held:rank], 0.0
    own, wanted = np.linalg.norm(a[:num_held], axis=1), np.linalg.norm(fresh[:num_held], axis=1)
    stretch = np.where(wanted > 0, wanted / own, 1.0)
    a[:num_held] *= stretch[:, None]
    b[:, :num_held] /= stretch
    return truncated.factors


def compute_merge(base: Factors, trained: Sequence[Term], rank: int) -> Truncated:
    """base + sum_i w_i (B_i A_i - start_i), cut to `rank`; start_i is the base at peer i's rank (`compute_start`).

    So what a peer of low rank could not hold of the base is not taken for a wish to remove it: of the base's k-th
    direction stays 1 - (the weight of those whose rank is above k), beside the sum of what came back. Nobody, or
    weights of 0: the base itself, cut to `rank`.

    Args:
        trained: (w_i, factors of rank r_i after training), weights of at least 0 with a sum of at most 1.

    Raises:
        ValueError: as `compute_sum`, or weights that are not shares.
    """
    weights = [weight for weight, _ in trained]
    if not all(weight >= 0 for weight in weights) or math.fsum(weights) > 1 + 1e-9:
        raise ValueError(f"expected weights of at least 0 with a sum of at most 1, got {weights}")
    whole = compute_sum([(1.0, base)])
    kept = np.ones(len(whole.singular_values))
    for k in range(_count_directions(whole.singular_values)):
        kept[k] -= math.fsum(weight for weight, part in trained if part.a.shape[0] > k)
    left = Factors(whole.factors.b * kept, whole.factors.a)
    return compute_sum([(1.0, left), *trained], rank)


def start_adapter(base: Tensors, rank: int, fresh: Tensors) -> dict[str, Array]:
    """`compute_start` of every module: an adapter of rank `rank` in float32. `fresh`: the network's initial adapter.

    Raises:
        ValueError: as `compute_start`, naming the module; or tensors that are no LoRA pairs.
    """
    _validate_modules(base, fresh)
    made: dict[str, Array] = {}
    for module in _get_modules(base):
        made |= _name(module, compute_start(_get_factors(base, module), rank, _get_factors(fresh, module).a))
    return dict(sorted(made.items()))


def merge_adapters(base: Tensors, trained: Sequence[tuple[float, Tensors]], rank: int) -> dict[str, Array]:
    """`compute_merge` of every module: the next base, of rank `rank`, in float32.

    Peers may hold other ranks in other modules. If nobody moved and the base has this rank, it is returned as it is.

    Raises:
        ValueError: as `compute_merge`; or tensors that are no LoRA pairs of the base's modules.
    """
    _validate_modules(base, *(adapter for _, adapter in trained))
    is_still = not any(weight for weight, _ in trained)
    made: dict[str, Array] = {}
    for module in _get_modules(base):
        own = _get_factors(base, module)
        parts = [(weight, _get_factors(adapter, module)) for weight, adapter in trained]
        merged = compute_merge(own, parts, rank).factors
        made |= _name(module, own if is_still and own.a.shape[0] == rank else merged)
    return dict(sorted(made.items()))


def compute_nested_masks(shapes: Mapping[str, tuple[int, ...]], rank: int) -> dict[str, Array]:
    """1 where a peer of this rank trains, else 0: the first rows of A, columns of B, and rows and columns of R.

    What it leaves alone stays in its model as the base has it, and is exactly 0 in its delta.

    Raises:
        ValueError: a negative rank, or a tensor without a rank (`ia3`, `prompt`).
    """
    if rank < 0:
        raise ValueError(f"expected a rank of at least 0, got {rank}")
    masks = {name: np.zeros(shape, np.float32) for name, shape in sorted(shapes.items())}
    for name, mask in masks.items():
        role = name.rsplit(".", 1)[-1]
        if role not in NESTED:
            raise ValueError(f"expected tensors with a rank, got {name}")
        mask[NESTED[role](rank)] = 1.0
    return masks


def _scale(weight: float, factors: Factors) -> Factors:
    root = math.sqrt(abs(weight))
    return Factors(math.copysign(root, weight) * np.asarray(factors.b, np.float64), root * factors.a)


def _count_directions(values: NDArray[np.float64]) -> int:
    return int(np.count_nonzero(values > ZERO_SHARE * values[0])) if len(values) else 0


def _validate(terms: Sequence[Term]) -> tuple[int, int]:
    """(out, in) of all terms' products."""
    expected: tuple[int, int] | None = None
    for index, (weight, (b, a)) in enumerate(terms):
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise ValueError(f"product {index}: expected b (out, rank) and a (rank, in), got {b.shape} and {a.shape}")
        expected = expected or (b.shape[0], a.shape[1])
        if (b.shape[0], a.shape[1]) != expected:
            raise ValueError(f"product {index}: expected (out, in) of {expected}, got {(b.shape[0], a.shape[1])}")
        if not math.isfinite(weight) or not np.isfinite(b).all() or not np.isfinite(a).all():
            raise ValueError(f"product {index}: its weight, {weight}, or a value is not finite")
    assert expected is not None
    return expected


def _validate_modules(*adapters: Tensors) -> None:
    first = _get_modules(adapters[0])
    for adapter in adapters:
        wanted = sorted(f"{module}.lora_{side}" for module in first for side in "AB")
        if not first or sorted(adapter) != wanted:
            odd = sorted(set(adapter) ^ set(wanted))[:4]
            raise ValueError(f"expected one lora_A and one lora_B of each module of the base, got {odd} amiss")


def _get_modules(adapter: Mapping[str, object]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in adapter})


def _get_factors(adapter: Tensors, module: str) -> Factors:
    return Factors(adapter[f"{module}.lora_B"], adapter[f"{module}.lora_A"])


def _name(module: str, factors: Factors) -> dict[str, Array]:
    return {
        f"{module}.lora_A": np.array(factors.a, np.float32),
        f"{module}.lora_B": np.array(factors.b, np.float32),
    }
