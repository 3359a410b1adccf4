"""Specification and contract side by side: whatever is called in whatever order, both answer, pay and tell the same.

A hypothesis state machine; each example is a new federation on the embedded chain and a new one in memory with the
same addresses, so that one signature is good for both. Time passes in steps of `UNIT_S` and a little, so that the few
seconds between a call and its block never decide.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger_worlds import ACCOUNTS, BLS_KEYS, PEERS, SECRETS, SPONSOR, TOKENS, chain_world, running_chain

from p2pfm.errors import Reverted
from p2pfm.runtime.chain_rpc import Rpc
from p2pfm.runtime.web3_ledger import READ_ONLY_KEY
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import (
    Accepted,
    Contested,
    Demanded,
    FederationParams,
    Funded,
    Happening,
    LeafValue,
    Ledger,
    SettledRound,
    Slashed,
    Submission,
    Sums,
)
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.settlement.rewards import compute_leaves, is_payout_round, submission_message
from p2pfm.types import Digest, MemberIndex, Round, Wei

EXAMPLES = 12
STEPS = 25
UNIT_S = 100_000
"""All periods are multiples of it."""
SLACK_S = 500
"""More than the chain's clock may run ahead of the calls, 25 times which is less than a unit."""
MEMBERS = range(1, 7)
"""Accounts that may join."""
RULES = FederationParams(
    committee_size=4,
    min_stake=Wei(10),
    challenge_window_s=3 * UNIT_S,
    pool_per_epoch=Wei(1000),
    rounds_per_epoch=2,
    rotation_s=2 * UNIT_S,
    restart_s=7 * UNIT_S,
    members_max=6,
    response_s=UNIT_S,
    unbonding_s=6 * UNIT_S,
    leaf_bond=Wei(7),
)

accounts = st.sampled_from([*MEMBERS, SPONSOR])
members = st.sampled_from(list(MEMBERS))
indices = st.integers(0, 6).map(MemberIndex)
rounds = st.integers(0, 2)
"""Counted from the newest back."""
contributions = st.lists(st.integers(-3, 9), max_size=6)
seats = st.sampled_from([set(), set(), {0}, {1}, {3}, {0, 1}])
most_seats = st.sets(st.integers(0, 3), min_size=1, max_size=3)
FALSE_TREES = ("reward", "transition", "garbage")
WRONG_FIELDS = ("nonce", "epoch", "early epoch", "round", "prev_root", "num_leaves", "sums", "budget", "signature")


class Ledgers(RuleBasedStateMachine):
    """The same calls to both."""

    url: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        world = chain_world(self.url, RULES)
        self.chain, self.on_chain = world.chain, world.ledgers
        self.advance = world.advance
        reader = Rpc(self.url, None, READ_ONLY_KEY)
        seed = reader.contract("Federation", self.chain.federation).functions.seed()
        self.read_seed: Callable[[], bytes] = lambda: bytes(reader.call(seed))
        self.read_clock: Callable[[], int] = lambda: reader.get_block()[2] + 1  # when a call would run now [s]
        self.now_s = self.read_clock()
        tokens = dict.fromkeys(ACCOUNTS[1:], TOKENS)
        self.spec = InMemoryLedger(self.chain, RULES, bls.BlsVerifier(), lambda: self.now_s, tokens)
        self.in_memory = [self.spec.as_account(account) for account in ACCOUNTS]
        self.trees: dict[Digest, tuple[LeafValue, ...]] = {}
        """By root."""

    def both(self, account: int, call: Callable[[Ledger], object]) -> object:
        """Make a call on both sides; they must give the same, or refuse for the same reason."""
        self.now_s = self.read_clock()
        expected, got = (outcome(ledgers[account], call) for ledgers in (self.in_memory, self.on_chain))
        assert got == expected
        event(f"{call.__qualname__.split('.')[1]}: {expected if isinstance(expected, str) else 'done'}")
        return expected

    @property
    def any(self) -> Ledger:
        return self.in_memory[SPONSOR]

    def pick(self, back: int) -> Round:
        """A round that stands, counted from the newest; one that does not, if there is none."""
        known = self.any.get_rounds(Round(0))
        return known[-1 - back % len(known)].round if known else Round(999)

    def tree_of(self, round: Round) -> tuple[LeafValue, ...]:
        known = {settled.round: settled.root for settled in self.any.get_rounds(Round(0))}
        return self.trees.get(known.get(round, merkle.EMPTY_ROOT), ())

    def tree_before(self, round: Round) -> tuple[LeafValue, ...]:
        earlier = [settled.root for settled in self.any.get_rounds(Round(0)) if settled.round < round]
        return self.trees.get(earlier[-1], ()) if earlier else ()

    # --- membership ---------------------------------------------------------------------------------------------------

    @initialize(count=st.integers(3, 6))
    def found(self, count: int) -> None:
        for member in range(1, count + 1):
            self.join(member, 10 * member, member)
        self.fund(SPONSOR, 1500)
        self.rotate()

    @rule(member=members, stake=st.sampled_from([9, 10, 25, 3000]), prover=members)
    def join(self, member: int, stake: int, prover: int) -> None:
        keys = SECRETS[member], self.chain, ACCOUNTS[prover if stake == 25 else member], PEERS[member]
        proof = bls.prove_possession(*keys)
        self.both(member, lambda ledger: ledger.register(PEERS[member], BLS_KEYS[member], proof, Wei(stake)))

    @rule(member=members)
    def unbond(self, member: int) -> None:
        self.both(member, lambda ledger: ledger.unbond())

    @rule(member=members)
    def withdraw(self, member: int) -> None:
        self.both(member, lambda ledger: ledger.withdraw())

    @rule(member=members, num_rotations=st.integers(1, 3))
    def leave(self, member: int, num_rotations: int) -> None:
        """To the end, or not quite."""
        self.unbond(member)
        for _ in range(num_rotations):
            self.pass_time(2)
            self.rotate()
        self.pass_time(6)
        self.withdraw(member)

    @rule()
    def rotate(self) -> None:
        self.spec._seed = self.read_seed()  # the chain's own is of its making: take it over for the next draw
        self.both(SPONSOR, lambda ledger: ledger.rotate())

    @rule(units=st.sampled_from([1, 2, 3, 7]))
    def pass_time(self, units: int) -> None:
        self.advance(units * UNIT_S + SLACK_S)
        self.now_s = self.read_clock()

    # --- rounds and rewards -------------------------------------------------------------------------------------------

    @rule(account=accounts, amount=st.sampled_from([0, 1, 400, 1000, 5000]))
    def fund(self, account: int, amount: int) -> None:
        self.both(account, lambda ledger: ledger.fund(Wei(amount)))

    def make_round(self, step: int, shares: Sequence[int], absent: set[int], **changes: Any) -> Submission:
        """An honest one that follows the head, not yet signed; changed as told."""
        roster, head = self.any.get_roster(), self.any.get_head()
        round = Round(head.round + step if head else step - 1)
        is_payout = is_payout_round(round, head.round if head else Round(-1), RULES.rounds_per_epoch)
        before = self.trees.get(head.root, ()) if head else ()
        if head and len(before) < head.num_leaves:  # after a root that stands for nothing
            before = (*before, *(leaf(0, 0, 0),) * (head.num_leaves - len(before)))
        given = {MemberIndex(i): share for i, share in enumerate(shares[: len(roster.members)])}
        budget = min(RULES.pool_per_epoch, self.any.get_pool()) if is_payout else Wei(0)
        leaves = compute_leaves(before, given, len(roster.members), budget, is_payout, is_epoch_start=True)
        tree = self.keep(leaves)
        submission = Submission(
            round=round,
            epoch=roster.epoch,
            nonce=roster.nonce,
            prev_root=head.root if head else merkle.EMPTY_ROOT,
            root=tree.digest,
            num_leaves=len(leaves),
            sums=tree.sums,
            data_digest=Digest(bytes([step]) * 32),
            base=Digest(round.to_bytes(32, "big")),
            absent=tuple(sorted(index for seat, index in enumerate(roster.committee) if seat in absent)),
            signature=bytes(96),
        )
        return msgspec.structs.replace(submission, **changes)

    def keep(self, leaves: Sequence[LeafValue]) -> merkle.Node:
        tree = merkle.compute_root(leaves)
        self.trees[tree.digest] = tuple(leaves)
        return tree

    def sign(self, submission: Submission) -> Submission:
        roster = self.any.get_roster()
        secrets = dict(zip(BLS_KEYS, SECRETS, strict=True))
        committee = self.any.get_committee(submission.epoch) or roster.committee
        present = [roster.members[index].bls_key for index in committee if index not in submission.absent]
        signers = present or BLS_KEYS[:1]  # where nobody is left to sign, a stranger does
        message = submission_message(self.chain, submission)
        signatures = [bls.sign(secrets[key], message) for key in signers]
        return msgspec.structs.replace(submission, signature=bls.aggregate(signatures))

    def revive(self) -> None:
        """Draw a committee if the present one is dead: else nothing would ever be settled again."""
        if self.spec._epoch_min >= len(self.spec._committees):
            self.rotate()

    def submit(self, submission: Submission) -> None:
        self.both(SPONSOR, lambda ledger: ledger.submit_round(submission))

    @rule(step=st.integers(1, 3), shares=contributions, absent=seats)
    def settle(self, step: int, shares: list[int], absent: set[int]) -> None:
        self.revive()
        self.submit(self.sign(self.make_round(step, shares, absent)))

    @rule(step=st.integers(1, 2), wrong=st.sampled_from(WRONG_FIELDS), shares=contributions)
    def settle_wrongly(self, step: int, wrong: str, shares: list[int]) -> None:
        good = self.make_round(step, shares, set())
        change = {
            "nonce": {"nonce": good.nonce + 1},
            "epoch": {"epoch": good.epoch + 1},
            "early epoch": {"epoch": max(1, good.epoch - 1), "absent": ()},
            "round": {"round": Round(max(0, good.round - step))},
            "prev_root": {"prev_root": Digest(b"\x05" * 32)},
            "num_leaves": {"num_leaves": good.num_leaves + (1 if step == 1 else -1)},
            "sums": {"sums": msgspec.structs.replace(good.sums, cumulative_wei=Wei(good.sums.cumulative_wei + 1))},
            "budget": {
                "sums": Sums(Wei(good.sums.cumulative_wei + 999), Wei(good.sums.reward_wei + 999), 1),
            },
            "signature": {},
        }[wrong]
        bad = self.sign(msgspec.structs.replace(good, **change))
        self.submit(msgspec.structs.replace(bad, base=Digest(b"\x06" * 32)) if wrong == "signature" else bad)

    @rule(
        kind=st.sampled_from(FALSE_TREES), absent=seats, first=indices, second=indices, back=rounds, demander=accounts
    )
    def cheat(
        self, kind: str, absent: set[int], first: MemberIndex, second: MemberIndex, back: int, demander: int
    ) -> None:
        """A certified round whose sums are right and whose tree is not; contested at once, or not."""
        self.revive()
        good = self.make_round(2, [4, 4, 1, 1], absent)
        leaves = list(self.trees[good.root])
        i, j = (position % max(1, len(leaves)) for position in (first, second))
        if back < 2 and leaves:  # where it hurts: else most have nothing to lose
            worth = [one.reward_wei if kind == "reward" else one.cumulative_wei - one.reward_wei for one in leaves]
            j = max(range(len(leaves)), key=worth.__getitem__)
            i = (j + 1) % len(leaves)
        if kind == "garbage" or not leaves:
            good = msgspec.structs.replace(good, root=Digest(b"\x07" * 31 + bytes([len(self.trees) % 256])))
        elif kind == "reward":  # j's goes to i, the sums with it
            amount = leaves[j].reward_wei
            leaves[j] = leaf(leaves[j].cumulative_wei - amount, 0, leaves[j].contribution)
            leaves[i] = leaf(leaves[i].cumulative_wei + amount, leaves[i].reward_wei + amount, leaves[i].contribution)
        else:  # a transition: what j has of old goes to i
            amount = leaves[j].cumulative_wei
            leaves[j] = msgspec.structs.replace(leaves[j], cumulative_wei=Wei(0))
            leaves[i] = msgspec.structs.replace(leaves[i], cumulative_wei=Wei(leaves[i].cumulative_wei + amount))
        if kind != "garbage" and leaves:
            tree = self.keep(leaves)
            good = msgspec.structs.replace(good, root=tree.digest, sums=tree.sums)
        self.submit(self.sign(good))
        if back < 2:
            contest = {"reward": self.prove_reward, "transition": self.prove_transition}.get(kind)
            if contest:
                contest(0, MemberIndex(j), demander)
            else:
                self.demand(demander, 0, MemberIndex(j), is_default=True)

    @rule(account=accounts, back=rounds, index=indices, is_wrong=st.booleans())
    def claim(self, account: int, back: int, index: MemberIndex, is_wrong: bool) -> None:
        round = self.pick(back)
        leaves = self.tree_of(round)
        if is_wrong:
            leaves = (*leaves[:1], *leaves[:1], *leaves[2:])
        leaves = padded(leaves, index)
        self.both(account, lambda ledger: ledger.claim(round, index, leaves))

    @rule(back=rounds)
    def claim_all(self, back: int) -> None:
        """As nodes do, after the window."""
        self.pass_time(3)
        for index in range(len(self.any.get_roster().members)):
            self.claim(SPONSOR, back, MemberIndex(index), is_wrong=False)

    @rule(is_late=st.booleans())
    def restart(self, is_late: bool) -> None:
        if is_late:
            self.pass_time(7)
        self.both(SPONSOR, lambda ledger: ledger.restart())

    # --- contests -----------------------------------------------------------------------------------------------------

    @rule(back=rounds, index=indices, account=accounts)
    def prove_reward(self, back: int, index: MemberIndex, account: int) -> None:
        round = self.pick(back)
        leaves = padded(self.tree_of(round), index)
        self.both(account, lambda ledger: ledger.prove_reward(round, index, leaves))

    @rule(back=rounds, index=indices, account=accounts)
    def prove_transition(self, back: int, index: MemberIndex, account: int) -> None:
        round = self.pick(back)
        before, leaves = self.tree_before(round), padded(self.tree_of(round), index)
        self.both(account, lambda ledger: ledger.prove_transition(round, index, before, leaves))

    @rule(account=accounts, back=rounds, index=indices, is_default=st.booleans())
    def demand(self, account: int, back: int, index: MemberIndex, is_default: bool) -> None:
        round = self.pick(back)
        self.both(account, lambda ledger: ledger.demand_leaf(round, index))
        if is_default:
            self.pass_time(1)
            self.close(account, 0)

    @precondition(lambda self: self.spec.get_demands())
    @rule(account=accounts, back=rounds)
    def show(self, account: int, back: int) -> None:
        number = len(self.any.get_demands()) - 1 - back
        demands = self.any.get_demands()
        known = self.any.get_rounds(Round(0))
        position = demands[number].position if 0 <= number < len(demands) else 0
        leaves = self.trees.get(known[position].root, ()) if position < len(known) else ()
        leaves = padded(leaves, demands[number].index if 0 <= number < len(demands) else MemberIndex(0))
        self.both(account, lambda ledger: ledger.show_leaf(number, leaves))

    @precondition(lambda self: self.spec.get_demands())
    @rule(account=accounts, back=rounds)
    def close(self, account: int, back: int) -> None:
        number = len(self.any.get_demands()) - 1 - back
        self.both(account, lambda ledger: ledger.close_demand(number))

    @rule(account=accounts, one=most_seats, other=most_seats, is_same=st.booleans())
    def equivocate(self, account: int, one: set[int], other: set[int], is_same: bool) -> None:
        first = self.make_round(1, [], one)
        base = first.base if is_same else Digest(b"\x09" * 32)
        second = self.make_round(1, [], other, base=base)
        if len(first.absent) == len(self.any.get_roster().committee):
            return
        pair = self.sign(first), self.sign(second)
        self.both(account, lambda ledger: ledger.prove_equivocation(*pair))

    # --- what holds always --------------------------------------------------------------------------------------------

    @invariant()
    def both_tell_the_same(self) -> None:
        told: Ledger = self.on_chain[SPONSOR]
        self.now_s = self.read_clock()
        assert told.get_roster() == self.any.get_roster()
        assert timeless(told.get_rounds(Round(0))) == timeless(self.any.get_rounds(Round(0)))
        assert told.get_pool() == self.any.get_pool()
        assert [what_of(entry.what) for entry in told.get_entries()] == [
            what_of(entry.what) for entry in self.any.get_entries()
        ]
        demands = [
            [msgspec.structs.replace(d, deadline_s=0) for d in ledger.get_demands()] for ledger in (told, self.any)
        ]
        assert demands[0] == demands[1]
        assert told.get_balance(self.chain.federation) == self.spec.get_held()

    @invariant()
    def nothing_is_paid_that_nobody_gave(self) -> None:
        head, happened = self.any.get_head(), [entry.what for entry in self.any.get_entries()]
        allotted = head.sums.cumulative_wei if head else 0
        drawn = sum(self.any.get_claimed(member.index) for member in self.any.get_roster().members)
        given = sum(what.amount for what in happened if isinstance(what, Funded | Slashed))
        bounties = sum(what.bounty for what in happened if isinstance(what, Contested))
        assert self.spec.get_held() == self.spec.get_owed()
        assert drawn <= allotted <= given
        assert allotted + self.any.get_pool() == given - bounties
        for what in happened:
            assert not isinstance(what, Accepted) or what.settled.sums.reward_wei <= RULES.pool_per_epoch

    def teardown(self) -> None:
        told: Ledger = self.on_chain[SPONSOR]
        for member in self.any.get_roster().members:
            assert told.get_claimed(member.index) == self.any.get_claimed(member.index)
        for account in ACCOUNTS[1:]:
            assert told.get_balance(account) == self.any.get_balance(account)


def leaf(cumulative: int, reward: int, contribution: int) -> LeafValue:
    return LeafValue(Wei(cumulative), Wei(reward), contribution)


def padded(leaves: tuple[LeafValue, ...], index: MemberIndex) -> tuple[LeafValue, ...]:
    """Leaves that have one at `index`, so that it is the ledger that finds it to be none."""
    return leaves if index < len(leaves) else (*leaves, *(leaf(0, 0, 0),) * (index + 1 - len(leaves)))


def outcome(ledger: Ledger, call: Callable[[Ledger], object]) -> object:
    """What a call gives, or why it is refused."""
    try:
        return call(ledger)
    except Reverted as refusal:
        return refusal.reason


def timeless(settled: Sequence[SettledRound]) -> list[SettledRound]:
    """Without the second of acceptance, which the chain's blocks decide."""
    return [msgspec.structs.replace(one, accepted_s=0) for one in settled]


def what_of(what: Happening) -> Happening:
    if isinstance(what, Accepted):
        return Accepted(timeless([what.settled])[0])
    return Demanded(msgspec.structs.replace(what.demand, deadline_s=0)) if isinstance(what, Demanded) else what


@pytest.mark.slow
def test_specification_and_contract_agree_whatever_happens() -> None:
    with ExitStack() as stack:
        url = stack.enter_context(running_chain("embedded"))
        machine = type("Machine", (Ledgers,), {"url": url})
        machine.TestCase.settings = settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],  # a failing example is told as it is: shrinking takes an hour
            suppress_health_check=list(HealthCheck),
        )
        machine.TestCase("runTest").runTest()
