"""The arbiter as the house sees it: one `Ledger` interface, one executable specification in memory, one contract.

`InMemoryLedger` is the contract's specification (same rules, same error names); `p2pfm.runtime.web3_ledger` speaks to
the real one. Calls block; a driver runs them in a thread. All raise `ChainError` when the chain cannot be reached and
`Reverted` (with the custom error's name) when a rule refuses.
"""

from typing import Protocol

import msgspec

from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei


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


class Roster(msgspec.Struct, frozen=True):
    """Who takes part, as of one block."""

    epoch: int
    """Counts committee rotations."""
    nonce: int
    """Counts restarts: a signature of an earlier nonce is dead."""
    members: tuple[Member, ...]
    """In registry order: members[i].index == i."""
    committee: tuple[MemberIndex, ...]
    """In the order of the draw: the first is the first-ranked."""


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
    sums: Sums
    data_digest: Digest
    base: Digest
    is_final: bool
    """The challenge window has passed: claims may be made."""


class Ledger(Protocol):
    """The chain, seen by one account."""

    def get_roster(self) -> Roster:
        """Registry and committee now."""
        ...

    def get_head(self) -> SettledRound | None:
        """The newest round that was accepted and not voided."""
        ...

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """All accepted rounds from `first` on, in order."""
        ...

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """Join with a stake and a proof of possession that is bound to account, contract and chain."""
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

    def get_claimed(self, index: MemberIndex) -> Wei:
        """What a member has drawn so far [wei]."""
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
