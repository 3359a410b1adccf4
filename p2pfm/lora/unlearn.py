"""Removing a peer's direct contribution from a base: the merge is linear, so what a peer added can be subtracted.

Knows tensors, digests and peers' names; no model, message or store. Subtracted is sum_r a_r D_r over the rounds, with
the certified weight a_r and the clip factor of round r (ALGORITHMS, part 6). Error feedback sends parts of a delta in
later rounds: they are in those rounds' payloads, so every part that was ever sent is subtracted; what was not sent yet
never reached the base. What other peers learnt from bases that held the contribution remains: repair rounds, that is
ordinary rounds without the peer, wear it down (bench/unlearning.py measures how far).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import OperatorError
from p2pfm.lora.compress import Update
from p2pfm.lora.delta import Layout, compute_layout, encode_tensors, flatten, get_shapes, unflatten
from p2pfm.lora.merge import clip_factors
from p2pfm.types import WEIGHT_ONE, Array, Digest, PeerId, Round, Tensors, Weight, compute_digest, short


@dataclass(frozen=True, slots=True)
class MergedUpdate:
    """An update as a certificate merged it."""

    peer: PeerId
    update: Update
    weight: Weight


@dataclass(frozen=True, slots=True)
class MergedRound:
    """A certified step from one base to the next.

    `updates` are all that the certificate lists, those of weight 0 too: the clip is to the median norm of all. A step
    without updates moved the base by other means (an earlier removal): it only links.
    """

    round: Round
    base: Digest
    new_base: Digest
    updates: tuple[MergedUpdate, ...]


def remove_peers(
    base: Tensors, history: Sequence[MergedRound], peers: Collection[PeerId], since: Digest
) -> dict[str, Array]:
    """`base` without what these peers added to it since base `since`: the same bytes on every machine.

    It is what the same rounds would have given with these peers' weights at 0 and everybody else's as certified, up to
    the float32 rounding of each merge: what the others would have done otherwise is not guessed.

    Args:
        history: every certified step from `since` to `base`, in any order.
        since: a base that holds nothing of these peers: the initial adapter, or what they joined at.

    Raises:
        OperatorError: the steps do not lead from `since` to `base` without a gap, a peer is in none of them, or an
            update is of another adapter.
    """
    layout = compute_layout(get_shapes(base))
    steps = sorted(history, key=lambda step: step.round)
    _validate_line(steps, since, compute_digest(encode_tensors(base)))
    total = compute_effect(steps, peers, layout)
    return unflatten((flatten(base).astype(np.float64) - total).astype(np.float32), layout)


def compute_effect(history: Sequence[MergedRound], peers: Collection[PeerId], layout: Layout) -> NDArray[np.float64]:
    """(layout.size,) sum over rounds of weight * clip factor * update of these peers, in float64.

    Summed in the order of rounds, then of payload digests; each share is the number that the merge used.

    Raises:
        OperatorError: a peer is in no round, or an update is of another adapter.
    """
    seen = {merged.peer for step in history for merged in step.updates}
    missing = sorted(set(peers) - seen)
    if missing or not peers:
        named = ", ".join(missing) or "nobody"
        raise OperatorError(
            f"expected peers with an update in these {len(history)} rounds, got {named}; they list {len(seen)} peers"
        )
    total = np.zeros(layout.size)
    for step in sorted(history, key=lambda step: step.round):
        ordered = sorted(step.updates, key=lambda merged: (merged.update.digest, merged.weight))
        if any(merged.update.layout != layout for merged in ordered):
            raise OperatorError(
                f"round {step.round}: an update has other names or shapes than the base; "
                "give the rounds of this network's adapter only"
            )
        factors = clip_factors([merged.update for merged in ordered])
        for merged, factor in zip(ordered, factors, strict=True):
            if merged.peer in peers and merged.weight:
                # As in `merge`: a multiply and then an add, never fused.
                share = merged.weight / WEIGHT_ONE * factor
                total[merged.update.positions] += share * merged.update.values.astype(np.float64)
    return total


def _validate_line(steps: Sequence[MergedRound], since: Digest, base: Digest) -> None:
    """Without this a round that was left out would silently leave its part of the peer in the base."""
    if not steps or steps[0].base != since:
        first = f"round {steps[0].round} from base {short(steps[0].base)}" if steps else "no round"
        raise OperatorError(f"expected the rounds since base {short(since)}, got {first} first")
    for before, after in pairwise(steps):
        if before.round >= after.round or before.new_base != after.base:
            raise OperatorError(
                f"expected a certified round that leads on from base {short(before.new_base)} (round {before.round}), "
                f"got round {after.round} from base {short(after.base)}: fetch the rounds between"
            )
    if steps[-1].new_base != base:
        raise OperatorError(
            f"expected the rounds up to the base given ({short(base)}), got base {short(steps[-1].new_base)} "
            f"after round {steps[-1].round}"
        )
