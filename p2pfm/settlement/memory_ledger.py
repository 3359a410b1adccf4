"""`InMemoryLedger`: the contract's rules in Python, its executable specification.

The same calls give the same roots, balances, events and errors (named as the contract's custom errors) as
`Federation.sol`; one test suite runs on both. Time and signature checks are arguments, so that a simulation of
thousands of peers runs in virtual time and without elliptic curves. Knows no socket, thread or real clock.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import msgspec
from eth_hash.auto import keccak

from p2pfm.config import ChainConfig
from p2pfm.errors import Reverted
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import (
    EPOCH_LAG_MAX,
    Accepted,
    Claimed,
    Closed,
    Contested,
    Demand,
    Demanded,
    Entry,
    FederationParams,
    Funded,
    Happening,
    Joined,
    LeafValue,
    Left,
    Member,
    Restarted,
    Roster,
    Rotated,
    SettledRound,
    Shown,
    Slashed,
    Submission,
    Voided,
    Withdrawn,
)
from p2pfm.settlement.merkle import EMPTY_ROOT
from p2pfm.settlement.proofs import Proof, get_demand, is_settled, make_proof
from p2pfm.settlement.rewards import compute_reward, is_payout_round, submission_message
from p2pfm.settlement.sampling import compute_quorum, draw_committee
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

PEER_BYTES_MAX = 128
"""Longest peer id the registry takes (the wire's bound)."""

CONTEST_S_MAX = 3650 * 86_400
"""Longer than anyone waits, and far from where the contract's 64-bit times overflow [s]."""

ROTATION_GAS_MAX = 15_500_000
"""What a rotation may cost: below the cap of one transaction, or nobody could draw any more (bench/gas.py) [gas]."""

COMMITTEE_MAX = 256
"""Seats whose absence one word of calldata can tell."""

SERVING_POOL = "serving pool"
"""Stands for that contract's account."""

BOUNTY_DIVISOR = 4
"""Whoever proves a fault gets this part of what is slashed; the rest goes to the pool. Far from all of it, or the
guilty would contest themselves and lose nothing."""


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


def compute_rotation_gas(params: FederationParams) -> int:
    """At most what a rotation costs: it reads every stake, and goes through all of them once a seat [gas]."""
    seats = params.committee_size
    return params.members_max * (3000 + 170 * seats) + 25_000 * seats


class _Record(msgspec.Struct, frozen=True):
    """An accepted round."""

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
        rotation_gas_max: int = ROTATION_GAS_MAX,
    ) -> None:
        """`now_s` is the chain's clock [s]; `balances` the token's fixed supply; `seed` that of the first draw.

        `rotation_gas_max`: more than the contract allows is for simulations of larger networks than it can hold.

        Raises:
            Reverted: BadParameter, as the contract's constructor.
        """
        positive = (
            params.committee_size,
            params.min_stake,
            params.rounds_per_epoch,
            params.response_s,
            params.leaf_bond,
        )
        if (
            min(positive) <= 0
            or not params.committee_size <= min(COMMITTEE_MAX, params.members_max)
            or min(params.restart_s, params.unbonding_s) < params.contest_s
            or params.contest_s > CONTEST_S_MAX
            or compute_rotation_gas(params) > rotation_gas_max
        ):
            raise Reverted("BadParameter")
        self.chain = chain
        self.params = params
        self._verifier = verifier
        self._now_s = now_s
        self._balances: dict[str, int] = dict(balances)
        self._entries: list[Entry] = []
        self._members: list[Member] = []
        self._last_epochs: dict[MemberIndex, int] = {}
        """Of leavers: the last epoch for which they may be drawn."""
        self._peers: dict[PeerId, MemberIndex] = {}
        self._accounts: dict[str, MemberIndex] = {}
        self._keys: set[bytes] = set()
        self._committees: list[tuple[MemberIndex, ...]] = [()]
        self._drawn_s: list[int] = [0]
        """By epoch: when its committee was drawn."""
        self._epoch_min = 1
        """Certificates of earlier epochs are dead: somebody of their committees was slashed."""
        self._is_rotation_due = True
        self._seed = seed
        self._num_candidates: int | None = None
        self._nonce = 0
        self._progress_s = now_s()
        self._rounds: list[_Record] = []
        self._demands: list[Demand] = []
        self._demanded: list[_Record] = []
        """By demand: the record that was contested, to know it from one that took its place."""
        self._hold_from = 0
        self._hold_until_s = 0
        """Rounds from this position on are not final before this time: a demand is open, or was answered just now."""
        self._claimed: dict[MemberIndex, int] = {}
        self._claimed_total = 0
        self._pool = 0
        self._served: dict[MemberIndex, int] = {}
        """Drawn out of the serving pool."""

    def as_account(self, account: str) -> "AccountLedger":
        """The Ledger as `account` sees it: it pays its stake from there."""
        return AccountLedger(self, account)

    # --- reads -----------------------------------------------------------------------------------------------------

    def get_params(self) -> FederationParams:
        """The rules."""
        return self.params

    def get_roster(self) -> Roster:
        """Registry and committee now."""
        epoch = len(self._committees) - 1
        return Roster(epoch, self._nonce, tuple(self._members), self._committees[-1], self._epoch_min)

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """A committee in the order of its draw; empty for an unknown epoch."""
        return self._committees[epoch] if 0 <= epoch < len(self._committees) else ()

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """Accepted rounds from `first` on, in order."""
        return tuple(
            self._settled(position) for position, record in enumerate(self._rounds) if record.submission.round >= first
        )

    def get_head(self) -> SettledRound | None:
        """The newest accepted round."""
        return self._settled(len(self._rounds) - 1) if self._rounds else None

    def get_demands(self) -> tuple[Demand, ...]:
        """Every demand for a leaf, in order."""
        return tuple(self._demands)

    def get_entries(self) -> tuple[Entry, ...]:
        """Everything that ever happened here, in order."""
        return tuple(self._entries)

    def get_claimed(self, index: MemberIndex) -> Wei:
        """What a member has drawn [wei]."""
        return Wei(self._claimed.get(index, 0))

    def get_balance(self, account: str) -> Wei:
        """Tokens an account holds [wei]."""
        return Wei(self._balances.get(account, 0))

    def get_pool(self) -> Wei:
        """Funded and not yet allotted [wei]."""
        return Wei(self._pool)

    def get_serving_pool(self) -> Wei:
        """What the serving pool holds [wei]."""
        return Wei(self._balances.get(SERVING_POOL, 0))

    def get_claimed_served(self, index: MemberIndex) -> Wei:
        """What a member has drawn out of it [wei]."""
        return Wei(self._served.get(index, 0))

    def get_held(self) -> Wei:
        """Tokens the federation itself holds: pool, stakes, bonds and what is allotted but not claimed [wei]."""
        return Wei(self._balances.get(self.chain.federation, 0))

    def get_owed(self) -> Wei:
        """What it must hold: the same sum from its parts [wei]. The law: equal to `get_held` after every call."""
        stakes = sum(member.stake for member in self._members)
        bonds = sum(self.params.leaf_bond for demand in self._demands if demand.is_open)
        return Wei(self._pool + stakes + bonds + self._allotted() - self._claimed_total)

    # --- membership ------------------------------------------------------------------------------------------------

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
        self._tell(Joined(index, account, peer, stake))
        return index

    def unbond(self, account: str) -> None:
        """Begin to leave. The next draw's seed is known: a leaver stays in it, or it could steer it by leaving."""
        index = self._accounts.get(account)
        if index is None:
            raise Reverted("UnknownMember")
        if not self._members[index].active:
            raise Reverted("NotActive")
        self._last_epochs[index] = len(self._committees)
        self._change(index, active=False)
        self._tell(Left(index))

    def withdraw(self, account: str) -> Wei:
        """Give a leaver its stake back once nothing that it may have signed can be contested."""
        index = self._accounts.get(account)
        if index is None:
            raise Reverted("UnknownMember")
        if index not in self._last_epochs or self._members[index].stake == 0:
            raise Reverted("NotLeaving")
        free_epoch = self._last_epochs[index] + EPOCH_LAG_MAX + 1
        if len(self._drawn_s) <= free_epoch or self._now_s() < self._drawn_s[free_epoch] + self.params.unbonding_s:
            raise Reverted("StillLiable")
        member = self._members[index]
        self._change(index, stake=Wei(0))
        del self._accounts[account], self._peers[member.peer]
        self._keys.remove(member.bls_key)
        self._move(self.chain.federation, account, member.stake)
        self._tell(Withdrawn(index, member.stake))
        return member.stake

    def rotate(self) -> None:
        """Draw the next committee; fix the seed and the candidates of the one after it."""
        now = self._now_s()
        if not self._is_rotation_due and now < self._drawn_s[-1] + self.params.rotation_s:
            raise Reverted("TooEarly")
        if not self._members:
            raise Reverted("NoMembers")
        epoch, num_members = len(self._committees), len(self._members)
        is_everybody = num_members <= self.params.committee_size or self._num_candidates is None
        num_candidates = num_members if is_everybody else self._num_candidates
        stakes = [
            member.stake if self._last_epochs.get(member.index, epoch) >= epoch else Wei(0)
            for member in self._members[:num_candidates]
        ]
        self._committees.append(draw_committee(self._seed, stakes, self.params.committee_size))
        self._drawn_s.append(now)
        self._seed = keccak(self._seed)
        self._num_candidates = num_members
        self._is_rotation_due = False
        self._tell(Rotated(epoch, self._committees[-1]))

    # --- rounds and rewards ----------------------------------------------------------------------------------------

    def fund(self, account: str, amount: Wei) -> None:
        """Move tokens into the pool."""
        self._pull(account, amount)
        self._pool += amount
        self._tell(Funded(account, amount))

    def fund_serving(self, account: str, amount: Wei) -> None:
        """Move tokens into the serving pool."""
        self._move(account, SERVING_POOL, self._validate_balance(account, amount))

    def submit_round(self, submission: Submission) -> None:
        """Accept a certified round; see `Federation.submitRound` for the rules, here in the same order."""
        self._validate_place(submission)
        self._validate_sums(submission)
        self._validate_certificate(submission)
        self._pool -= submission.sums.reward_wei
        self._progress_s = self._now_s()
        self._rounds.append(_Record(submission, self._progress_s))
        self._tell(Accepted(msgspec.structs.replace(self._settled(len(self._rounds) - 1), is_final=False)))

    def claim(self, round: Round, index: MemberIndex, proof: Proof) -> Wei:
        """Pay the member at `index` what its leaf says, less what it has drawn already; 0 if nothing is left."""
        position = self.find_position(round)
        if not self._is_final(position):
            raise Reverted("NotFinal")
        record = self._rounds[position].submission
        self._validate_leaf(record, index, proof)
        owed = max(0, proof.leaf.cumulative_wei - self._claimed.get(index, 0))
        if owed == 0:
            return Wei(0)
        if self._claimed_total + owed > self._allotted():
            raise Reverted("Drained")
        self._claimed[index] = self._claimed.get(index, 0) + owed
        self._claimed_total += owed
        self._move(self.chain.federation, self._members[index].account, owed)
        self._tell(Claimed(index, round, Wei(owed)))
        return Wei(owed)

    def claim_served(self, round: Round, index: MemberIndex, proof: Proof) -> Wei:
        """Pay for serving what the leaf at `index` says, less what was drawn, as far as the serving pool goes; see
        `ServingPool.claim`.
        """
        position = self.find_position(round)
        if not self._is_final(position):
            raise Reverted("NotFinal")
        self._validate_leaf(self._rounds[position].submission, index, proof)
        drawn = self._served.get(index, 0)
        owed = min(max(0, proof.leaf.served_wei - drawn), self.get_serving_pool())
        num_epochs = (round + 1) // self.params.rounds_per_epoch
        if sum(self._served.values()) + owed > self.params.serving_per_epoch * num_epochs:
            raise Reverted("OverBudget")
        self._served[index] = drawn + owed
        self._move(SERVING_POOL, self._members[index].account, owed)
        return Wei(owed)

    def restart(self) -> None:
        """After a long time without progress kill outstanding signatures. All accepted rounds are final by then."""
        now = self._now_s()
        if now < self._progress_s + self.params.restart_s:
            raise Reverted("TooEarly")
        self._nonce += 1
        self._progress_s = now
        self._tell(Restarted(self._nonce))

    # --- contests --------------------------------------------------------------------------------------------------

    def demand_leaf(self, account: str, round: Round, index: MemberIndex) -> int:
        """Ask the signers for a leaf, in the challenge window only: so no contest outlasts `contest_s`."""
        position, now = self.find_position(round), self._now_s()
        record = self._rounds[position]
        if now >= record.accepted_s + self.params.challenge_window_s:
            raise Reverted("NotContestable")
        if not 0 <= index < record.submission.num_leaves:
            raise Reverted("UnknownLeaf")
        self._pull(account, self.params.leaf_bond)
        deadline = now + self.params.response_s
        if now >= self._hold_until_s:
            self._hold_from, self._hold_until_s = position, 0
        self._hold_from = min(self._hold_from, position)
        self._hold_until_s = max(self._hold_until_s, deadline + self.params.response_s)
        demand = Demand(len(self._demands), account, position, index, deadline, is_open=True)
        self._demands.append(demand)
        self._demanded.append(record)
        self._tell(Demanded(demand))
        return demand.number

    def show_leaf(self, account: str, number: int, proof: Proof) -> None:
        """Show a demanded leaf in time: it is public then, and the bond is the caller's."""
        demand = self._get_open(number)
        if not self._is_standing(number):
            raise Reverted("UnknownRound")
        if self._now_s() >= demand.deadline_s:
            raise Reverted("TooLate")
        self._validate_leaf(self._rounds[demand.position].submission, demand.index, proof)
        self._close(number)
        self._move(self.chain.federation, account, self.params.leaf_bond)
        self._tell(Shown(number, account, proof.leaf))

    def close_demand(self, number: int) -> None:
        """Give the bond back; if the deadline passed and the round can still be contested, it is void."""
        demand = self._get_open(number)
        if not self._is_standing(number) or self._is_final(demand.position):
            self._refund(demand)
            return
        if self._now_s() < demand.deadline_s:
            raise Reverted("TooEarly")
        self._refund(demand)
        self._condemn(demand.account, demand.position, "leaf")

    def prove_reward(self, account: str, round: Round, index: MemberIndex, proof: Proof) -> None:
        """Void a round whose leaf is not paid by the floor rule."""
        position = self._find_contestable(round)
        record = self._rounds[position].submission
        self._validate_leaf(record, index, proof)
        previous = self._rounds[position - 1].submission.round if position else Round(-1)
        pool = self.params.pool_per_epoch if is_payout_round(round, previous, self.params.rounds_per_epoch) else Wei(0)
        if proof.leaf.reward_wei == compute_reward(pool, proof.leaf.contribution, record.sums.contribution):
            raise Reverted("NoFault")
        self._condemn(account, position, "reward")

    def prove_transition(
        self, account: str, round: Round, index: MemberIndex, before: Proof | None, proof: Proof
    ) -> None:
        """Void a round whose leaf does not add its reward to its sum before (0 where the tree before had no leaf)."""
        position = self._find_contestable(round)
        self._validate_leaf(self._rounds[position].submission, index, proof)
        drawn = 0
        if position and index < self._rounds[position - 1].submission.num_leaves:
            if before is None:
                raise Reverted("BadProof")
            self._validate_leaf(self._rounds[position - 1].submission, index, before)
            drawn = before.leaf.cumulative_wei
        if proof.leaf.cumulative_wei == drawn + proof.leaf.reward_wei:
            raise Reverted("NoFault")
        self._condemn(account, position, "transition")

    def prove_equivocation(self, account: str, first: Submission, second: Submission) -> None:
        """Slash who signed both of two statements about one round. Voids nothing: one liar could void any round so."""
        if (first.epoch, first.nonce, first.round) != (second.epoch, second.nonce, second.round):
            raise Reverted("NoFault")
        if submission_message(self.chain, first) == submission_message(self.chain, second):
            raise Reverted("NoFault")
        committee = self.get_committee(first.epoch)
        for submission in (first, second):
            self._validate_absent(committee, submission.absent)
            self._validate_signature(committee, submission)
        absent = {*first.absent, *second.absent}
        guilty = [index for index in committee if index not in absent and self._members[index].stake]
        if not guilty:
            raise Reverted("NoFault")
        total = self._slash(guilty)
        self._tell(Restarted(self._nonce))
        self._pay_bounty(account, first.round, "equivocation", total)

    # --- rules -----------------------------------------------------------------------------------------------------

    def _validate_place(self, submission: Submission) -> None:
        epoch = len(self._committees) - 1
        if submission.nonce != self._nonce:
            raise Reverted("BadNonce")
        if not max(self._epoch_min, epoch - EPOCH_LAG_MAX) <= submission.epoch <= epoch:
            raise Reverted("BadEpoch")
        head = self._rounds[-1].submission if self._rounds else None
        if head and submission.round <= head.round:
            raise Reverted("StaleRound")
        if submission.prev_root != (head.root if head else EMPTY_ROOT):
            raise Reverted("BadPrevRoot")
        if not (head.num_leaves if head else 0) <= submission.num_leaves <= len(self._members):
            raise Reverted("BadLeaves")

    def _validate_sums(self, submission: Submission) -> None:
        sums = submission.sums
        if sums.cumulative_wei != self._allotted() + sums.reward_wei:
            raise Reverted("BadSums")
        last = self._rounds[-1].submission.round if self._rounds else Round(-1)
        is_paying = is_payout_round(submission.round, last, self.params.rounds_per_epoch)
        if sums.reward_wei > min(self._pool, self.params.pool_per_epoch if is_paying else 0):
            raise Reverted("OverBudget")

    def _validate_certificate(self, submission: Submission) -> None:
        committee = self._committees[submission.epoch]
        self._validate_absent(committee, submission.absent)
        if len(committee) - len(submission.absent) < compute_quorum(len(committee)):
            raise Reverted("BadQuorum")
        self._validate_signature(committee, submission)

    def _validate_absent(self, committee: Sequence[MemberIndex], absent: Sequence[MemberIndex]) -> None:
        if any(later <= earlier for earlier, later in pairwise(absent)) or not set(absent) <= set(committee):
            raise Reverted("BadAbsent")

    def _validate_signature(self, committee: Sequence[MemberIndex], submission: Submission) -> None:
        keys = [self._members[index].bls_key for index in committee if index not in submission.absent]
        message = submission_message(self.chain, submission)
        if not keys or not self._verifier.verify_round(keys, message, submission.signature):
            raise Reverted("BadSignature")

    def _validate_leaf(self, record: Submission, index: MemberIndex, proof: Proof) -> None:
        place = (record.root, record.sums, record.num_leaves)
        if not merkle.verify(*place, index, proof.leaf, proof.siblings):
            raise Reverted("BadProof")

    def find_position(self, round: Round) -> int:
        """Where an accepted round stands in their list. Raises: Reverted (UnknownRound)."""
        positions = (i for i, record in enumerate(self._rounds) if record.submission.round == round)
        position = next(positions, None)
        if position is None:
            raise Reverted("UnknownRound")
        return position

    def _find_contestable(self, round: Round) -> int:
        position = self.find_position(round)
        if self._is_final(position):
            raise Reverted("NotContestable")
        return position

    def _is_final(self, position: int) -> bool:
        """Its window is over, and no demand holds it; none holds it longer than `contest_s`."""
        now, accepted_s = self._now_s(), self._rounds[position].accepted_s
        is_held = position >= self._hold_from and now < self._hold_until_s
        return now >= accepted_s + (self.params.contest_s if is_held else self.params.challenge_window_s)

    def _allotted(self) -> int:
        return self._rounds[-1].submission.sums.cumulative_wei if self._rounds else 0

    def _get_open(self, number: int) -> Demand:
        if not 0 <= number < len(self._demands) or not self._demands[number].is_open:
            raise Reverted("UnknownDemand")
        return self._demands[number]

    def _is_standing(self, number: int) -> bool:
        """Whether the round that was contested is still there."""
        position = self._demands[number].position
        return position < len(self._rounds) and self._rounds[position] is self._demanded[number]

    def _close(self, number: int) -> None:
        self._demands[number] = msgspec.structs.replace(self._demands[number], is_open=False)

    def _refund(self, demand: Demand) -> None:
        self._close(demand.number)
        self._move(self.chain.federation, demand.account, self.params.leaf_bond)
        self._tell(Closed(demand.number))

    def _condemn(self, account: str, position: int, fault: str) -> None:
        """A fault is proven: slash who signed the round, void it and what follows, pay who proved it."""
        record = self._rounds[position].submission
        total = self._slash([i for i in self._committees[record.epoch] if i not in record.absent])
        self._pool += self._allotted()
        del self._rounds[position:]
        self._pool -= self._allotted()
        self._progress_s = self._now_s()
        if self._hold_from >= position:
            self._hold_until_s = 0
        self._tell(Voided(position, record.round, self._nonce))
        self._pay_bounty(account, record.round, fault, total)

    def _slash(self, guilty: Sequence[MemberIndex]) -> Wei:
        """Take their stakes. All that was signed so far and not accepted is dead; a new draw is open at once."""
        total = 0
        for index in guilty:
            amount = self._members[index].stake
            if amount == 0:
                continue
            total += amount
            self._change(index, stake=Wei(0), active=False)
            self._tell(Slashed(index, amount))
        self._epoch_min = len(self._committees)
        self._nonce += 1
        self._is_rotation_due = True
        return Wei(total)

    def _pay_bounty(self, account: str, round: Round, fault: str, total: Wei) -> None:
        bounty = Wei(total // BOUNTY_DIVISOR)
        self._pool += total - bounty
        self._move(self.chain.federation, account, bounty)
        self._tell(Contested(round, fault, account, bounty))

    def _settled(self, position: int) -> SettledRound:
        record = self._rounds[position]
        given = record.submission
        return SettledRound(
            round=given.round,
            epoch=given.epoch,
            nonce=given.nonce,
            prev_root=given.prev_root,
            root=given.root,
            num_leaves=given.num_leaves,
            sums=given.sums,
            data_digest=given.data_digest,
            base=given.base,
            absent=given.absent,
            position=position,
            accepted_s=record.accepted_s,
            is_final=self._is_final(position),
        )

    def _change(self, index: MemberIndex, **changes: object) -> None:
        self._members[index] = msgspec.structs.replace(self._members[index], **changes)

    def _tell(self, what: Happening) -> None:
        self._entries.append(Entry(len(self._entries) + 1, self._now_s(), "", what))

    def _pull(self, account: str, amount: Wei) -> None:
        self._move(account, self.chain.federation, self._validate_balance(account, amount))

    def _validate_balance(self, account: str, amount: Wei) -> Wei:
        if self._balances.get(account, 0) < amount:
            raise Reverted("ERC20InsufficientBalance")
        return amount

    def _move(self, source: str, target: str, amount: int) -> None:
        self._balances[source] = self._balances.get(source, 0) - amount
        self._balances[target] = self._balances.get(target, 0) + amount


class AccountLedger:
    """One account's view: implements `Ledger` on an InMemoryLedger."""

    def __init__(self, ledger: InMemoryLedger, account: str) -> None:
        self._ledger = ledger
        self._account = account

    def get_params(self) -> FederationParams:
        """See Ledger."""
        return self._ledger.get_params()

    def get_roster(self) -> Roster:
        """See Ledger."""
        return self._ledger.get_roster()

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """See Ledger."""
        return self._ledger.get_committee(epoch)

    def get_head(self) -> SettledRound | None:
        """See Ledger."""
        return self._ledger.get_head()

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """See Ledger."""
        return self._ledger.get_rounds(first)

    def get_demands(self) -> tuple[Demand, ...]:
        """See Ledger."""
        return self._ledger.get_demands()

    def get_entries(self) -> tuple[Entry, ...]:
        """See Ledger."""
        return self._ledger.get_entries()

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """See Ledger. Registering again with the same peer and key gives the same index."""
        for member in self._ledger.get_roster().members:
            if (member.account, member.peer, member.bls_key) == (self._account, peer, bls_key) and member.active:
                return member.index
        return self._ledger.register(self._account, peer, bls_key, possession, stake)

    def unbond(self) -> None:
        """See Ledger."""
        self._ledger.unbond(self._account)

    def withdraw(self) -> Wei:
        """See Ledger."""
        return self._ledger.withdraw(self._account)

    def rotate(self) -> None:
        """See Ledger."""
        self._ledger.rotate()

    def fund(self, amount: Wei) -> None:
        """See Ledger."""
        self._ledger.fund(self._account, amount)

    def fund_serving(self, amount: Wei) -> None:
        """See Ledger."""
        self._ledger.fund_serving(self._account, amount)

    def submit_round(self, submission: Submission) -> None:
        """See Ledger. A round that the chain holds already with this root is success: somebody was faster."""
        if is_settled(self._ledger.get_rounds(submission.round), submission):
            return
        self._ledger.submit_round(submission)

    def claim(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger."""
        self._ledger.find_position(round)  # the first thing that a ledger refuses
        return self._ledger.claim(round, index, make_proof(leaves, index))

    def claim_served(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger."""
        self._ledger.find_position(round)
        return self._ledger.claim_served(round, index, make_proof(leaves, index))

    def restart(self) -> None:
        """See Ledger."""
        self._ledger.restart()

    def demand_leaf(self, round: Round, index: MemberIndex) -> int:
        """See Ledger."""
        return self._ledger.demand_leaf(self._account, round, index)

    def show_leaf(self, number: int, leaves: tuple[LeafValue, ...]) -> None:
        """See Ledger."""
        self._ledger.show_leaf(self._account, number, make_proof(leaves, get_demand(self, number).index))

    def close_demand(self, number: int) -> None:
        """See Ledger."""
        self._ledger.close_demand(number)

    def prove_reward(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> None:
        """See Ledger."""
        self._ledger.find_position(round)
        self._ledger.prove_reward(self._account, round, index, make_proof(leaves, index))

    def prove_transition(
        self, round: Round, index: MemberIndex, before: tuple[LeafValue, ...], leaves: tuple[LeafValue, ...]
    ) -> None:
        """See Ledger."""
        self._ledger.find_position(round)
        earlier = make_proof(before, index) if index < len(before) else None
        self._ledger.prove_transition(self._account, round, index, earlier, make_proof(leaves, index))

    def prove_equivocation(self, first: Submission, second: Submission) -> None:
        """See Ledger."""
        self._ledger.prove_equivocation(self._account, first, second)

    def get_claimed(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        return self._ledger.get_claimed(index)

    def get_balance(self, account: str) -> Wei:
        """See Ledger."""
        return self._ledger.get_balance(account)

    def get_pool(self) -> Wei:
        """See Ledger."""
        return self._ledger.get_pool()

    def get_serving_pool(self) -> Wei:
        """See Ledger."""
        return self._ledger.get_serving_pool()

    def get_claimed_served(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        return self._ledger.get_claimed_served(index)
