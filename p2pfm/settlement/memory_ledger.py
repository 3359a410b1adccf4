"""`InMemoryLedger`: the contract's rules in Python, its executable specification.

The same calls give the same roots, balances and errors (named as the contract's custom errors) as `Federation.sol`; one
test suite runs on both. Time and signature checks are arguments, so that a simulation of thousands of peers runs in
virtual time and without elliptic curves. Knows no socket, thread or real clock.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import msgspec
from eth_hash.auto import keccak

from p2pfm.config import ChainConfig
from p2pfm.errors import Reverted
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Member, Roster, SettledRound, Submission
from p2pfm.settlement.merkle import EMPTY_ROOT
from p2pfm.settlement.rewards import submission_message
from p2pfm.settlement.sampling import compute_quorum, draw_committee
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

PEER_BYTES_MAX = 128
"""Longest peer id the registry takes (the wire's bound)."""

EPOCH_LAG_MAX = 1
"""A certificate may be of the committee before the present one: a rotation must not kill a round in flight."""


class FederationParams(msgspec.Struct, frozen=True):
    """The contract's immutables."""

    committee_size: int
    min_stake: Wei
    challenge_window_s: int
    pool_per_epoch: Wei
    rounds_per_epoch: int
    rotation_s: int = 0
    """Least time between two rotations [s]."""
    restart_s: int = 86_400
    """After so long without an accepted round anybody may restart [s]."""
    members_max: int = 1024
    """Bounds the gas of a rotation, which reads every stake."""


class Verifier(Protocol):
    """Signature checks of the ledger: BLS in a real network, anything cheaper in a simulation."""

    def verify_possession(
        self, chain: ChainConfig, account: str, peer: PeerId, bls_key: bytes, possession: bytes
    ) -> bool:
        """Whether `possession` proves that `account` knows the key's secret, for this contract only."""
        ...

    def verify_round(self, bls_keys: Sequence[bytes], message: Digest, signature: bytes) -> bool:
        """Whether `signature` is the aggregate of all these keys' signatures of `message`."""
        ...


class _Accepted(msgspec.Struct, frozen=True):
    submission: Submission
    accepted_s: int


class InMemoryLedger:
    """One federation and its token. `as_account` gives each account's view of it."""

    def __init__(
        self,
        chain: ChainConfig,
        params: FederationParams,
        verifier: Verifier,
        now_s: Callable[[], int],
        balances: Mapping[str, Wei],
        seed: bytes = bytes(32),
    ) -> None:
        """`now_s` is the chain's clock [s]; `balances` the token's fixed supply; `seed` that of the first draw.

        Raises:
            Reverted: BadParameter, as the contract's constructor.
        """
        positive = (params.committee_size, params.min_stake, params.rounds_per_epoch)
        if min(positive) <= 0 or params.members_max < params.committee_size:
            raise Reverted("BadParameter")
        self.chain = chain
        self.params = params
        self._verifier = verifier
        self._now_s = now_s
        self._balances: dict[str, int] = dict(balances)
        self._members: list[Member] = []
        self._peers: dict[PeerId, MemberIndex] = {}
        self._accounts: dict[str, MemberIndex] = {}
        self._keys: set[bytes] = set()
        self._committees: list[tuple[MemberIndex, ...]] = [()]
        self._seed = seed
        self._num_candidates: int | None = None
        self._rotated_s: int | None = None
        self._nonce = 0
        self._progress_s = now_s()
        self._rounds: list[_Accepted] = []
        self._claimed: dict[MemberIndex, int] = {}
        self._pool = 0

    def as_account(self, account: str) -> "AccountLedger":
        """The Ledger as `account` sees it: it pays its stake from there."""
        return AccountLedger(self, account)

    # --- reads -----------------------------------------------------------------------------------------------------

    def get_roster(self) -> Roster:
        """Registry and committee now."""
        return Roster(len(self._committees) - 1, self._nonce, tuple(self._members), self._committees[-1])

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """Accepted rounds from `first` on, in order."""
        return tuple(self._settled(accepted) for accepted in self._rounds if accepted.submission.round >= first)

    def get_head(self) -> SettledRound | None:
        """The newest accepted round."""
        return self._settled(self._rounds[-1]) if self._rounds else None

    def get_claimed(self, index: MemberIndex) -> Wei:
        """What a member has drawn [wei]."""
        return Wei(self._claimed.get(index, 0))

    def get_balance(self, account: str) -> Wei:
        """Tokens an account holds [wei]."""
        return Wei(self._balances.get(account, 0))

    def get_pool(self) -> Wei:
        """Funded and not yet allotted [wei]."""
        return Wei(self._pool)

    def get_held(self) -> Wei:
        """Tokens the federation itself holds: pool, stakes and what is allotted but not claimed [wei]."""
        return Wei(self._balances.get(self.chain.federation, 0))

    # --- changes ---------------------------------------------------------------------------------------------------

    def register(self, account: str, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """Join; see `Ledger.register`."""
        if len(self._members) >= self.params.members_max:
            raise Reverted("RegistryFull")
        if account in self._accounts:
            raise Reverted("AlreadyRegistered")
        if not 1 <= len(peer.encode()) <= PEER_BYTES_MAX:
            raise Reverted("BadPeer")
        if peer in self._peers:
            raise Reverted("PeerTaken")
        if bls_key in self._keys:
            raise Reverted("KeyTaken")
        if stake < self.params.min_stake:
            raise Reverted("StakeTooLow")
        if not self._verifier.verify_possession(self.chain, account, peer, bls_key, possession):
            raise Reverted("BadPossession")
        self._pull(account, stake)
        index = MemberIndex(len(self._members))
        self._members.append(Member(index, account, peer, bls_key, stake, active=True))
        self._accounts[account] = index
        self._peers[peer] = index
        self._keys.add(bls_key)
        return index

    def rotate(self) -> None:
        """Draw the next committee; fix the seed and the candidates of the one after it."""
        now = self._now_s()
        if self._rotated_s is not None and now < self._rotated_s + self.params.rotation_s:
            raise Reverted("TooEarly")
        if not self._members:
            raise Reverted("NoMembers")
        num_members = len(self._members)
        is_everybody = num_members <= self.params.committee_size or self._num_candidates is None
        num_candidates = num_members if is_everybody else self._num_candidates
        stakes = [member.stake for member in self._members[:num_candidates]]
        self._committees.append(draw_committee(self._seed, stakes, self.params.committee_size))
        self._seed = keccak(self._seed)
        self._num_candidates = num_members
        self._rotated_s = now

    def fund(self, account: str, amount: Wei) -> None:
        """Move tokens into the pool."""
        self._pull(account, amount)
        self._pool += amount

    def submit_round(self, submission: Submission) -> None:
        """Accept a certified round; see `Federation.submitRound` for the rules, here in the same order."""
        self._validate_place(submission)
        self._validate_sums(submission)
        self._validate_certificate(submission)
        self._pool -= submission.sums.reward_wei
        self._progress_s = self._now_s()
        self._rounds.append(_Accepted(submission, self._progress_s))

    def claim(self, round: Round, index: MemberIndex, leaf: LeafValue, siblings: Sequence[merkle.Node]) -> Wei:
        """Pay the member at `index` what its leaf says, less what it has drawn already; 0 if nothing is left."""
        accepted = next((entry for entry in self._rounds if entry.submission.round == round), None)
        if accepted is None:
            raise Reverted("UnknownRound")
        if not self._is_final(accepted):
            raise Reverted("NotFinal")
        if not 0 <= index < len(self._members):
            raise Reverted("UnknownMember")
        if not merkle.verify(accepted.submission.root, accepted.submission.sums, index, leaf, siblings):
            raise Reverted("BadProof")
        owed = max(0, leaf.cumulative_wei - self._claimed.get(index, 0))
        self._claimed[index] = self._claimed.get(index, 0) + owed
        self._move(self.chain.federation, self._members[index].account, owed)
        return Wei(owed)

    def restart_round(self) -> None:
        """After a long time without progress: kill outstanding signatures and void rounds that are not final."""
        now = self._now_s()
        if now < self._progress_s + self.params.restart_s:
            raise Reverted("TooEarly")
        while self._rounds and not self._is_final(self._rounds[-1]):
            self._pool += self._rounds.pop().submission.sums.reward_wei
        self._nonce += 1
        self._progress_s = now

    # --- rules -----------------------------------------------------------------------------------------------------

    def _validate_place(self, submission: Submission) -> None:
        epoch = len(self._committees) - 1
        if submission.nonce != self._nonce:
            raise Reverted("BadNonce")
        if not max(1, epoch - EPOCH_LAG_MAX) <= submission.epoch <= epoch:
            raise Reverted("BadEpoch")
        if self._rounds and submission.round <= self._rounds[-1].submission.round:
            raise Reverted("StaleRound")
        if submission.prev_root != (self._rounds[-1].submission.root if self._rounds else EMPTY_ROOT):
            raise Reverted("BadPrevRoot")

    def _validate_sums(self, submission: Submission) -> None:
        sums = submission.sums
        drawn = self._rounds[-1].submission.sums.cumulative_wei if self._rounds else 0
        num_epochs = submission.round // self.params.rounds_per_epoch + 1
        if sums.cumulative_wei != drawn + sums.reward_wei:
            raise Reverted("BadSums")
        if (
            sums.reward_wei > min(self._pool, self.params.pool_per_epoch)
            or sums.cumulative_wei > self.params.pool_per_epoch * num_epochs
        ):
            raise Reverted("OverBudget")

    def _validate_certificate(self, submission: Submission) -> None:
        committee = self._committees[submission.epoch]
        absent = submission.absent
        if any(later <= earlier for earlier, later in pairwise(absent)):
            raise Reverted("BadAbsent")
        if not set(absent) <= set(committee):
            raise Reverted("BadAbsent")
        if len(committee) - len(absent) < compute_quorum(len(committee)):
            raise Reverted("BadQuorum")
        keys = [self._members[index].bls_key for index in committee if index not in absent]
        message = submission_message(self.chain, submission)
        if not self._verifier.verify_round(keys, message, submission.signature):
            raise Reverted("BadSignature")

    def _is_final(self, accepted: _Accepted) -> bool:
        return self._now_s() >= accepted.accepted_s + self.params.challenge_window_s

    def _settled(self, accepted: _Accepted) -> SettledRound:
        given = accepted.submission
        return SettledRound(
            round=given.round,
            epoch=given.epoch,
            nonce=given.nonce,
            prev_root=given.prev_root,
            root=given.root,
            sums=given.sums,
            data_digest=given.data_digest,
            base=given.base,
            is_final=self._is_final(accepted),
        )

    def _pull(self, account: str, amount: Wei) -> None:
        if self._balances.get(account, 0) < amount:
            raise Reverted("ERC20InsufficientBalance")
        self._move(account, self.chain.federation, amount)

    def _move(self, source: str, target: str, amount: int) -> None:
        self._balances[source] = self._balances.get(source, 0) - amount
        self._balances[target] = self._balances.get(target, 0) + amount


class AccountLedger:
    """One account's view: implements `Ledger` on an InMemoryLedger."""

    def __init__(self, ledger: InMemoryLedger, account: str) -> None:
        self._ledger = ledger
        self._account = account

    def get_roster(self) -> Roster:
        """See Ledger."""
        return self._ledger.get_roster()

    def get_head(self) -> SettledRound | None:
        """See Ledger."""
        return self._ledger.get_head()

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """See Ledger."""
        return self._ledger.get_rounds(first)

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """See Ledger. Registering again with the same peer and key gives the same index."""
        for member in self._ledger.get_roster().members:
            if (member.account, member.peer, member.bls_key) == (self._account, peer, bls_key):
                return member.index
        return self._ledger.register(self._account, peer, bls_key, possession, stake)

    def rotate(self) -> None:
        """See Ledger."""
        self._ledger.rotate()

    def fund(self, amount: Wei) -> None:
        """See Ledger."""
        self._ledger.fund(self._account, amount)

    def submit_round(self, submission: Submission) -> None:
        """See Ledger. A round that the chain holds already with this root is success: somebody was faster."""
        if is_settled(self._ledger.get_rounds(submission.round), submission):
            return
        self._ledger.submit_round(submission)

    def claim(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger."""
        if not 0 <= index < len(leaves):
            raise Reverted("BadProof", f"the tree has no leaf {index}")
        return self._ledger.claim(round, index, leaves[index], merkle.prove(merkle.build(leaves), index))

    def get_claimed(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        return self._ledger.get_claimed(index)

    def get_balance(self, account: str) -> Wei:
        """See Ledger."""
        return self._ledger.get_balance(account)

    def get_pool(self) -> Wei:
        """See Ledger."""
        return self._ledger.get_pool()

    def restart_round(self) -> None:
        """See InMemoryLedger."""
        self._ledger.restart_round()


def is_settled(rounds: Sequence[SettledRound], submission: Submission) -> bool:
    """Whether the first of `rounds` is this submission's round with the same root, data and base."""
    if not rounds or rounds[0].round != submission.round:
        return False
    held = rounds[0]
    return (held.root, held.data_digest, held.base) == (submission.root, submission.data_digest, submission.base)
