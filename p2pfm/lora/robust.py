"""Merge rules that defend by the updates' geometry alone: the baselines that the contribution-weighted merge must beat.

Knows numbers only. A rule takes updates (num_peers, dim) and weights (num_peers,) >= 0, of which only proportions
count, and returns the step (dim,) to add to the base, in float64. No rule looks at a loss: `compute_gate` is told the
contributions that somebody measured. Rules for research and comparison; what peers certify is `merge.py`.

rule                 withstands (share of the weight that lies)           source
-------------------  ---------------------------------------------------  --------------------------------------
mean                 nobody: one peer moves it anywhere                   McMahan et al. 2017 (FedAvg)
clip                 none strictly; a liar moves it by a median norm      Lidin et al. 2025 (Templar's Gauntlet)
geometric median     < 1/2                                                Pillutla et al. 2022 (RFA)
coordinate median    < 1/2                                                Yin et al. 2018
trimmed mean         <= the share trimmed at each end, itself < 1/2       Yin et al. 2018
Krum, Multi-Krum     num_liars <= (num_peers - 3) / 2                     Blanchard et al. 2017
nearest mixing       num_liars < num_peers / 2, with a robust rule after  Allouah et al. 2023 (NNM)
gate                 as far as the contributions are right                ALGORITHMS, part 5

All but the last also err by the spread of honest updates, liars or not: with non-IID data that spread is large, and a
minority's honest update looks like a liar's (Karimireddy et al. 2022; the bound is of the order of share * spread**2).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pfm.lora.merge import compute_clip_factors

Matrix = NDArray[np.float64]
Rule = Callable[[NDArray[np.floating], NDArray[np.floating]], Matrix]
"""(num_peers, dim) updates and (num_peers,) weights to a step (dim,)."""

WEISZFELD_STEPS_MAX = 200
"""More than the 20 to 100 that updates in general position take."""
WEISZFELD_TOLERANCE = 1e-9
"""Movement at which the iteration ends, as a share of the updates' median distance from their middle."""
WEISZFELD_FLOOR = 1e-12
"""The iteration is on an update when it is nearer than this share of the same."""


def compute_mean(updates: NDArray[np.floating], weights: NDArray[np.floating]) -> Matrix:
    """The weighted mean (McMahan et al. 2017). Withstands nobody: breakdown point 0."""
    values, shares = _check(updates, weights)
    mean: Matrix = shares @ values
    return mean


def compute_clipped_mean(updates: NDArray[np.floating], weights: NDArray[np.floating]) -> Matrix:
    """The mean of updates cut to the median norm, as Templar's validators do (Lidin et al. 2025, "Incentivizing
    permissionless distributed learning of LLMs").

    Bounds what a liar adds to its share of a median norm, but not where to: 40% liars of one mind turn the step round.
    """
    values, shares = _check(updates, weights)
    factors = compute_clip_factors([float(norm) for norm in np.linalg.norm(values, axis=1)])
    mean: Matrix = (shares * np.array(factors)) @ values
    return mean


def compute_geometric_median(updates: NDArray[np.floating], weights: NDArray[np.floating]) -> Matrix:
    """The point of least weighted sum of distances, by Weiszfeld's iteration (Pillutla, Kakade and Harchaoui 2022,
    "Robust aggregation for federated learning").

    Breakdown point 1/2 (Lopuhaä and Rousseeuw 1991): it stays bounded while the liars' weight is below a half.
    """
    values, shares = _check(updates, weights)
    # The iteration never leaves the updates' span: in an orthonormal basis of it, distances are the same and cheap.
    triangle: Matrix = np.asarray(np.linalg.qr(values.T, mode="r"))
    points = triangle.T  # (num_peers, min(num_peers, dim))
    # From a start that liars cannot move either, and in the honest updates' scale: from the mean, far liars take long.
    centre = np.median(points, axis=0)
    scale = float(np.median(np.linalg.norm(points - centre, axis=1)))
    for _ in range(WEISZFELD_STEPS_MAX):
        mixture = _step_to_median(points, shares, centre, WEISZFELD_FLOOR * scale)
        moved = mixture @ points
        step = float(np.linalg.norm(moved - centre))
        centre = moved
        if step <= WEISZFELD_TOLERANCE * scale:
            break
    median: Matrix = mixture @ values
    return median


def compute_coordinate_median(updates: NDArray[np.floating], weights: NDArray[np.floating]) -> Matrix:
    """Each coordinate's weighted median, the middle of the two where it lies between (Yin et al. 2018).

    Breakdown point 1/2 in every coordinate. Where fewer than half of the weight is on nonzero values (sparse updates)
    it is 0.
    """
    values, shares = _check(updates, weights)
    ranked, _, above = _rank(values, shares)
    # Rounding must not decide whether a tie at one half is a tie.
    lower = np.take_along_axis(ranked, np.argmax(above >= 0.5 - 1e-12, axis=0)[None], axis=0)[0]
    upper = np.take_along_axis(ranked, np.argmax(above > 0.5 + 1e-12, axis=0)[None], axis=0)[0]
    middle: Matrix = (lower + upper) / 2
    return middle


def compute_trimmed_mean(updates: NDArray[np.floating], weights: NDArray[np.floating], share: float) -> Matrix:
    """Each coordinate's mean without the lowest and the highest `share` of the weight (Yin et al. 2018).

    Withstands liars of at most `share` of the weight. With equal weights and share = f / n it drops the f lowest and
    f highest values; a value at the border counts with the part of its weight that lies within.

    Raises:
        ValueError: `share` not in [0, 1/2).
    """
    values, shares = _check(updates, weights)
    if not 0 <= share < 0.5:
        raise ValueError(f"trimmed share: expected 0 <= share < 0.5, got {share}")
    ranked, below, above = _rank(values, shares)
    kept = np.clip(above, share, 1 - share) - np.clip(below, share, 1 - share)  # (num_peers, dim)
    trimmed: Matrix = (kept * ranked).sum(axis=0) / (1 - 2 * share)
    return trimmed


def compute_krum(
    updates: NDArray[np.floating], weights: NDArray[np.floating], num_liars: int, num_chosen: int = 1
) -> Matrix:
    """The weighted mean of the `num_chosen` updates nearest to their num_peers - num_liars - 2 neighbours (Blanchard
    et al. 2017): 1 is Krum, up to num_peers - num_liars is Multi-Krum. Ties go to the lower position.

    Withstands num_liars <= (num_peers - 3) / 2; Krum takes one honest peer's update for everyone's, so it loses what
    the others learned.

    Raises:
        ValueError: too many liars for so few peers, or an impossible number of chosen.
    """
    values, shares = _check(updates, weights)
    num_peers = len(values)
    if not 0 <= num_liars <= (num_peers - 3) // 2:
        raise ValueError(f"Krum: expected 2 * num_liars + 3 <= num_peers = {num_peers}, got num_liars = {num_liars}")
    if not 1 <= num_chosen <= num_peers - num_liars:
        raise ValueError(f"Krum: expected 1 to {num_peers - num_liars} chosen, got {num_chosen}")
    nearest = np.sort(compute_square_distances(values), axis=1)[:, 1 : num_peers - num_liars - 1]  # without itself
    chosen = np.argsort(nearest.sum(axis=1), kind="stable")[:num_chosen]
    total = shares[chosen].sum()
    kept = shares[chosen] / total if total > 0 else np.full(num_chosen, 1 / num_chosen)
    mean: Matrix = kept @ values[chosen]
    return mean


def mix_nearest(updates: NDArray[np.floating], num_liars: int) -> Matrix:
    """Each update replaced by the mean of the num_peers - num_liars nearest to it, itself included: a step before a
    rule (Allouah et al. 2023, "Fixing by mixing", algorithm 2: NNM). (num_peers, dim).

    With trimmed mean after it, the best known order of error under heterogeneity for num_liars < num_peers / 2.

    Raises:
        ValueError: `num_liars` not in [0, num_peers / 2).
    """
    values, _ = _check(updates, np.ones(len(updates)))
    num_peers = len(values)
    if not 0 <= 2 * num_liars < num_peers:
        raise ValueError(f"mixing: expected 2 * num_liars < num_peers = {num_peers}, got num_liars = {num_liars}")
    order = np.argsort(compute_square_distances(values), axis=1, kind="stable")[:, : num_peers - num_liars]
    mixing = np.zeros((num_peers, num_peers))
    np.put_along_axis(mixing, order, 1 / (num_peers - num_liars), axis=1)
    mixed: Matrix = mixing @ values
    return mixed


def compute_gate(
    updates: NDArray[np.floating], weights: NDArray[np.floating], contributions: Sequence[float]
) -> Matrix:
    """The sum of updates times their own weights (of all), where the contribution is positive: judged, not weighed.

    A gated peer's share is lost, not dealt to the others. As robust as the contributions that it is told.
    """
    values, shares = _check(updates, weights)
    step: Matrix = (shares * (np.asarray(contributions) > 0)) @ values
    return step


def compute_square_distances(updates: NDArray[np.floating]) -> Matrix:
    """(num_peers, num_peers) squared Euclidean distances; exactly 0 from each to itself, and symmetric."""
    values = np.asarray(updates, np.float64)
    # Row after row, not by the Gram matrix: next to a huge update its cancellation would blur near ones.
    return np.stack([np.square(values - row).sum(axis=1) for row in values])


def _step_to_median(points: Matrix, shares: Matrix, centre: Matrix, floor: float) -> Matrix:
    """The mixture (num_peers,) of points that one step of Weiszfeld's iteration goes to.

    On a point (nearer than `floor`) the plain step would never leave: it is held back by the point's own share only
    (Vardi and Zhang 2000).
    """
    distances = np.linalg.norm(points - centre, axis=1)
    is_here = distances <= floor
    here = np.where(is_here, shares, 0.0)
    if is_here.all():
        return here
    pulls: Matrix = np.where(is_here, 0.0, shares / np.where(is_here, 1.0, distances))
    force = float(np.linalg.norm(pulls @ points - pulls.sum() * centre))
    held = float(here.sum())
    total = float(pulls.sum())
    if held == 0 or total == 0:
        return pulls / total if held == 0 else here / held
    stay = min(1.0, held / force) if force > 0 else 1.0
    mixture: Matrix = (1 - stay) / total * pulls + stay / held * here
    return mixture


def _rank(values: Matrix, shares: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Each coordinate's values in order, the weight below each, and that including it: three of (num_peers, dim)."""
    order = np.argsort(values, axis=0, kind="stable")
    weights = shares[order]  # (num_peers, dim)
    above = np.cumsum(weights, axis=0)
    return np.take_along_axis(values, order, axis=0), above - weights, above


def _check(updates: NDArray[np.floating], weights: NDArray[np.floating]) -> tuple[Matrix, Matrix]:
    """(updates in float64, weights that sum to 1).

    Raises:
        ValueError: not (num_peers, dim) with at least one peer, not finite, or weights that are negative or all 0.
    """
    values = np.asarray(updates, np.float64)
    shares = np.asarray(weights, np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"updates: expected (num_peers, dim) with at least one peer, got shape {values.shape}")
    if shares.shape != (len(values),):
        raise ValueError(f"weights: expected one for each of {len(values)} updates, got shape {shares.shape}")
    if not np.isfinite(values).all():
        raise ValueError("updates: a value is not finite")
    if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError("weights: expected finite numbers >= 0, not all 0")
    return values, shares / shares.sum()
