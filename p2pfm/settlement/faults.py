"""What is provably wrong with an accepted round: the search for what `prove_reward` and `prove_transition` contest.

Pure: leaves in, faults out. Knows no ledger, no blob and no account; whoever calls it has fetched the leaves. Measured
contributions are not judged here: a wrong one is no fault that a chain can see.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import FederationParams, LeafValue, SettledRound
from p2pfm.settlement.rewards import compute_reward, is_payout_round
from p2pfm.types import MemberIndex, Round, Wei


class FaultKind(Enum):
    """Which proof the chain takes; the value is `ledger.Contested.fault`'s word."""

    REWARD = "reward"
    """The leaf's reward is not floor(pool * contribution / sum of the positive ones): `Ledger.prove_reward`."""
    TRANSITION = "transition"
    """The leaf's cumulative sum is not the one before plus its reward: `Ledger.prove_transition`."""


class Fault(msgspec.Struct, frozen=True):
    """One leaf that breaks one rule."""

    kind: FaultKind
    index: MemberIndex
    """Whose leaf."""
    expected_wei: Wei
    """What the rule says: of the reward, or of the cumulative sum."""
    found_wei: Wei
    """What the leaf says."""


def find_faults(
    params: FederationParams,
    settled: SettledRound,
    before: SettledRound | None,
    leaves_before: Sequence[LeafValue],
    leaves: Sequence[LeafValue],
) -> tuple[Fault, ...]:
    """Every fault of an accepted round that the chain would take a proof of, by registry index, rewards first.

    Empty if and only if the round follows the rules: as many faults as leaves break one. One proof is enough to void
    the round and all after it.

    Args:
        before: the accepted round at the position before; None for the first.
        leaves_before: of the tree of `before`; none for the first round.
        leaves: of the round's own tree, in registry order.

    Raises:
        ValueError: leaves that are not those of the root on chain: a proof made of them would be refused.
    """
    _validate_leaves(settled, leaves)
    if before is not None:
        _validate_leaves(before, leaves_before)
    elif leaves_before:
        raise ValueError(f"expected no leaves before the first round, got {len(leaves_before)}")
    pool = compute_pool(params, settled.round, before.round if before else None)
    total = settled.sums.contribution
    faults = []
    for position, leaf in enumerate(leaves):
        reward = compute_reward(pool, leaf.contribution, total)
        if leaf.reward_wei != reward:
            faults.append(Fault(FaultKind.REWARD, MemberIndex(position), reward, leaf.reward_wei))
        drawn = leaves_before[position].cumulative_wei if position < len(leaves_before) else 0
        cumulative = Wei(drawn + leaf.reward_wei)
        if leaf.cumulative_wei != cumulative:
            faults.append(Fault(FaultKind.TRANSITION, MemberIndex(position), cumulative, leaf.cumulative_wei))
    return tuple(faults)


def compute_pool(params: FederationParams, round: Round, round_before: Round | None) -> Wei:
    """What a round divides [wei]: the epoch's pool if it is the first settled one at or past an epoch's end, else 0.

    Args:
        round_before: the accepted round before; None for the first.
    """
    last = Round(-1) if round_before is None else round_before
    return params.pool_per_epoch if is_payout_round(round, last, params.rounds_per_epoch) else Wei(0)


def _validate_leaves(settled: SettledRound, leaves: Sequence[LeafValue]) -> None:
    if len(leaves) != settled.num_leaves or merkle.compute_root(leaves) != merkle.Node(settled.root, settled.sums):
        raise ValueError(f"round {settled.round}: these {len(leaves)} leaves are not those of its root on chain")
