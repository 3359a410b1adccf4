"""The arbiter as the house sees it: one `Ledger` interface, one executable specification in memory, one contract.

`InMemoryLedger` is the contract's specification (same rules, same error names, same events); `runtime.web3_ledger`
speaks to the real one. Calls block; a driver runs them in a thread. All raise `ChainError` when the chain cannot be
reached and `Reverted` (with the custom error's name) when a rule refuses.
"""

from functools import cached_property
from typing import Protocol

import msgspec

from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

EPOCH_LAG_MAX = 1
"""A certificate may be of the committee before the present one: a rotation must not kill a round in flight."""


class FederationParams(msgspec.Struct, frozen=True):
    """The contract's immutables: all that one federation's rules leave open."""

    committee_size: int
    min_stake: Wei
    challenge_window_s: int
    """From a round's acceptance on anyone may contest it."""
    pool_per_epoch: Wei
    """What the last round of a settlement epoch divides: floor(pool * contribution / sum of contributions) each."""
    rounds_per_epoch: int
    rotation_s: int = 0
    """Least time between two rotations [s]."""
    restart_s: int = 864_000
    """After so long without an accepted round anybody may restart [s]; longer than any contest."""
    members_max: int = 1024
    """Bounds the gas of a rotation, which reads every stake."""
    response_s: int = 86_400
    """To show a leaf that was demanded, and then again to prove a fault with what was shown [s]."""
    unbonding_s: int = 864_000
    """From when a leaver can sign no more until its stake is free [s]; at least as long as any contest."""
    leaf_bond: Wei = Wei(10**18)
    """Who demands a leaf puts up so much; it goes to whoever shows it."""
    serving_per_epoch: Wei = Wei(0)
    """Most that a settlement epoch allots out of the serving pool; 0: this federation has none."""

    @property
    def contest_s(self) -> int:
        """The longest that a round can be contested [s]: the window, an answer, and the proof made of it."""
        return self.challenge_window_s + 2 * self.response_s


class Member(msgspec.Struct, frozen=True):
    """A registered peer."""

    index: MemberIndex
    account: str
    """Checksummed Ethereum address: where its rewards go."""
    peer: PeerId
    bls_key: bytes
    """48 bytes, compressed G1."""
    stake: Wei
    active: bool
    """Neither leaving nor slashed."""


class Roster(msgspec.Struct, frozen=True, dict=True):
    """Who takes part, as of one block."""

    epoch: int
    """Counts committee rotations."""
    nonce: int
    """Counts restarts and slashes: a signature of an earlier nonce is dead."""
    members: tuple[Member, ...]
    """In registry order: members[i].index == i (in a shard's roster: the shard's members only)."""
    committee: tuple[MemberIndex, ...]
    """In the order of the draw: the first is the first-ranked."""
    epoch_min: int = 0
    """Committees of earlier epochs are dead: one of them was slashed."""

    @cached_property
    def by_peer(self) -> dict[PeerId, Member]:
        """The active members by peer id."""
        return {member.peer: member for member in self.members if member.active}

    @cached_property
    def by_index(self) -> dict[MemberIndex, Member]:
        """All members, also those that left, by registry index."""
        return {member.index: member for member in self.members}


class Sums(msgspec.Struct, frozen=True):
    """What the root of a rewards tree carries: totals over its leaves."""

    cumulative_wei: Wei
    reward_wei: Wei
    contribution: int
    """Sum of the positive contributions [nano-nats]."""


class Submission(msgspec.Struct, frozen=True):
    """A certified round, as the contract takes it."""

    round: Round
    epoch: int
    nonce: int
    prev_root: Digest
    root: Digest
    num_leaves: int
    """Of the tree: 0 to num_leaves - 1 are the registry indices that it pays."""
    sums: Sums
    data_digest: Digest
    base: Digest
    """The new base."""
    absent: tuple[MemberIndex, ...]
    signature: bytes
    """96 bytes, compressed G2: the aggregate of all committee members but the absent."""


class SettledRound(msgspec.Struct, frozen=True):
    """A round the chain has taken."""

    round: Round
    epoch: int
    nonce: int
    prev_root: Digest
    root: Digest
    num_leaves: int
    sums: Sums
    data_digest: Digest
    base: Digest
    absent: tuple[MemberIndex, ...]
    """Committee members of its epoch whose signature is not in the certificate."""
    position: int
    """In the list of accepted rounds."""
    accepted_s: int
    """Block time of its acceptance [s since 1970]."""
    is_final: bool
    """It can be contested no more: claims may be made."""


class Demand(msgspec.Struct, frozen=True):
    """Somebody asks the signers of a round to show a leaf that nobody serves."""

    number: int
    account: str
    """Who put up the bond."""
    position: int
    index: MemberIndex
    """Whose leaf."""
    deadline_s: int
    is_open: bool


class Ledger(Protocol):
    """The chain, seen by one account."""

    def get_params(self) -> FederationParams:
        """The federation's rules."""
        ...

    def get_roster(self) -> Roster:
        """Registry and committee now."""
        ...

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """The committee of an epoch, in the order of its draw; empty for an unknown epoch."""
        ...

    def get_head(self) -> SettledRound | None:
        """The newest round that was accepted and not voided."""
        ...

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """All accepted rounds from `first` on, in order."""
        ...

    def get_demands(self) -> "tuple[Demand, ...]":
        """Every demand for a leaf, answered or not, in order."""
        ...

    def get_entries(self) -> "tuple[Entry, ...]":
        """Everything that ever happened in this federation, in order."""
        ...

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """Join with a stake and a proof of possession that is bound to account, contract and chain."""
        ...

    def unbond(self) -> None:
        """Begin to leave: out of every draw whose seed is not known yet."""
        ...

    def withdraw(self) -> Wei:
        """Take the stake back once no signature of this member can be contested; returns it [wei]."""
        ...

    def rotate(self) -> None:
        """Draw the next committee; anyone may, at most once an epoch."""
        ...

    def fund(self, amount: Wei) -> None:
        """A sponsor adds to the pool."""
        ...

    def submit_round(self, submission: Submission) -> None:
        """Commit a certified round; anyone may; the first valid root of a round stands."""
        ...

    def claim(self, round: Round, index: MemberIndex, leaves: "tuple[LeafValue, ...]") -> Wei:
        """Pay a member all that it is owed up to a final `round`; returns what was paid [wei]."""
        ...

    def restart(self) -> None:
        """After a long time without an accepted round: outstanding signatures die; anyone may."""
        ...

    def demand_leaf(self, round: Round, index: MemberIndex) -> int:
        """Contest a round whose leaf nobody serves, with a bond; returns the demand's number."""
        ...

    def show_leaf(self, number: int, leaves: "tuple[LeafValue, ...]") -> None:
        """Answer a demand: the leaf is on chain then, and the bond is the caller's."""
        ...

    def close_demand(self, number: int) -> None:
        """After its deadline: a leaf that was not shown voids its round. The bond goes back to who demanded."""
        ...

    def prove_reward(self, round: Round, index: MemberIndex, leaves: "tuple[LeafValue, ...]") -> None:
        """Contest a round that pays `index` other than floor(pool * contribution / sum)."""
        ...

    def prove_transition(
        self, round: Round, index: MemberIndex, before: "tuple[LeafValue, ...]", leaves: "tuple[LeafValue, ...]"
    ) -> None:
        """Contest a round in which a leaf's cumulative sum is not the one `before` plus its reward."""
        ...

    def prove_equivocation(self, first: Submission, second: Submission) -> None:
        """Slash who signed two different statements about one round; neither need ever have been accepted."""
        ...

    def get_claimed(self, index: MemberIndex) -> Wei:
        """What a member has drawn so far [wei]."""
        ...

    def fund_serving(self, amount: Wei) -> None:
        """A sponsor adds to the pool that pays for serving alone."""
        ...

    def claim_served(self, round: Round, index: MemberIndex, leaves: "tuple[LeafValue, ...]") -> Wei:
        """Pay a member what it is owed for serving up to a final `round`, as far as its pool goes; returns what was
        paid [wei].
        """
        ...

    def get_claimed_served(self, index: MemberIndex) -> Wei:
        """What a member has drawn for serving so far [wei]."""
        ...

    def get_serving_pool(self) -> Wei:
        """Reward tokens in the serving pool, allotted or not [wei]."""
        ...

    def get_balance(self, account: str) -> Wei:
        """Reward tokens an account holds [wei]."""
        ...

    def get_pool(self) -> Wei:
        """Reward tokens that sponsors paid in and no root has allotted yet [wei]."""
        ...


class LeafValue(msgspec.Struct, frozen=True):
    """A leaf of the rewards tree in its own units (`messages.Leaf` is the same on the wire)."""

    cumulative_wei: Wei
    reward_wei: Wei
    contribution: int
    """Signed, accumulated over the epoch [nano-nats]."""
    served_wei: Wei = Wei(0)
    """All that it was ever allotted for serving, out of the serving pool: no part of `cumulative_wei`."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """A member registered."""

    index: MemberIndex
    account: str
    peer: PeerId
    stake: Wei


class Left(msgspec.Struct, frozen=True, tag=True):
    """A member began to unbond."""

    index: MemberIndex


class Withdrawn(msgspec.Struct, frozen=True, tag=True):
    """A member took its stake back."""

    index: MemberIndex
    amount: Wei


class Rotated(msgspec.Struct, frozen=True, tag=True):
    """A committee was drawn."""

    epoch: int
    committee: tuple[MemberIndex, ...]


class Funded(msgspec.Struct, frozen=True, tag=True):
    """A sponsor added to the pool."""

    account: str
    amount: Wei


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """A round was accepted (`settled.is_final`: as of then, False)."""

    settled: SettledRound


class Claimed(msgspec.Struct, frozen=True, tag=True):
    """A member was paid."""

    index: MemberIndex
    round: Round
    """Against whose root."""
    amount: Wei


class Demanded(msgspec.Struct, frozen=True, tag=True):
    """Somebody wants to see a leaf."""

    demand: Demand


class Shown(msgspec.Struct, frozen=True, tag=True):
    """A demanded leaf was shown."""

    number: int
    account: str
    """Who showed it, and has the bond."""
    leaf: LeafValue


class Closed(msgspec.Struct, frozen=True, tag=True):
    """A demand ended without an answer; its bond went back."""

    number: int


class Slashed(msgspec.Struct, frozen=True, tag=True):
    """A member lost its stake."""

    index: MemberIndex
    amount: Wei


class Contested(msgspec.Struct, frozen=True, tag=True):
    """Somebody proved a fault."""

    round: Round
    fault: str
    """'reward', 'transition', 'leaf' (not shown) or 'equivocation'."""
    account: str
    """Who proved it."""
    bounty: Wei


class Voided(msgspec.Struct, frozen=True, tag=True):
    """The round at `position` and all after it are void."""

    position: int
    round: Round
    nonce: int


class Restarted(msgspec.Struct, frozen=True, tag=True):
    """Outstanding signatures died: nothing came for long, or somebody on the committee was slashed."""

    nonce: int


Happening = (
    Joined
    | Left
    | Withdrawn
    | Rotated
    | Funded
    | Accepted
    | Claimed
    | Demanded
    | Shown
    | Closed
    | Slashed
    | Contested
    | Voided
    | Restarted
)


class Entry(msgspec.Struct, frozen=True):
    """One thing that happened, and where it stands on chain."""

    block: int
    time_s: int
    """Of the block [s since 1970]."""
    transaction: str
    """Its hash, 0x...; empty in memory."""
    what: Happening
