"""Which of a round's updates are one piece of work: each counts once, for whoever announced it first.

Knows how alike updates are (`similarity`) and in which order they came; no peer, stake or model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from p2pfm.contribution.similarity import Matrix, Vector, compute_cosines, compute_overlaps


class Limits(NamedTuple):
    """Above either, two updates are one piece of work; 1 or more: never."""

    cosine: float
    overlap: float
    """Of positions, over chance (`similarity.compute_overlaps`)."""


def find_leaders(updates: Sequence[Vector], size: int, limits: Limits, cosines: Matrix | None = None) -> list[int]:
    """For each update the one that it repeats: the earliest alike that repeats none itself; its own index if none.

    Never by way of a third: whoever mixes two honest updates into one that is like both joins one of them, and does not
    join them to each other. Zero updates are alike to nothing.

    Args:
        updates: in the order in which they were announced.
        cosines: (num_updates, num_updates) theirs, where they are known.

    Raises:
        ValueError: positions that are not sorted and distinct, or outside of the vector.
    """
    is_alike = np.zeros((len(updates), len(updates)), np.bool_)
    if limits.cosine < 1:
        is_alike |= (compute_cosines(updates, size) if cosines is None else cosines) > limits.cosine
    if limits.overlap < 1:
        is_alike |= compute_overlaps(updates, size) > limits.overlap
    leaders = list(range(len(updates)))
    for update in np.flatnonzero(np.tril(is_alike, -1).any(axis=1)).tolist():
        earlier = np.flatnonzero(is_alike[update, :update]).tolist()
        leaders[update] = next((other for other in earlier if leaders[other] == other), update)
    return leaders
