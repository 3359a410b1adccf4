"""What a network does when the chain voids rounds: it goes back to the newest that stands, and on from there."""

from collections.abc import Sequence

import msgspec
import pytest

from p2pfm.protocol.phases import compute_round_start, get_durations
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Slashed, Submission
from p2pfm.settlement.proofs import make_proof
from p2pfm.settlement.rewards import compute_sums, from_wire, submission_message
from p2pfm.types import Digest, MemberIndex, Millis, Round, Wei, compute_digest
from sim.scenarios import LearnerModel, Outage, Scenario, make_network
from sim.world import World

SCENARIO = Scenario(seed=11, num_peers=10, num_rounds=6, committee_size=7)


class Collusion:
    """More than two thirds of the committee sign a false round, and somebody proves it."""

    def __init__(self, world: World, round: Round) -> None:
        self.world = world
        self.round = round
        self.leaves: tuple[LeafValue, ...] = ()
        start = compute_round_start(world.config, round)
        world.schedule.at(Millis(start + 1_000), self.settle_a_false_round)
        world.schedule.at(Millis(start + 15_000), self.prove_it)

    def settle_a_false_round(self) -> None:
        chain, head = self.world.chain, self.world.chain.get_head()
        before = from_wire(self.world.checks.certificates[head.round].proposal.leaves) if head else ()
        pool = self.world.config.pool_per_epoch()
        self.leaves = tuple(
            LeafValue(
                Wei((before[index].cumulative_wei if before else 0) + (pool if index == 0 else 0)),
                Wei(pool if index == 0 else 0),
                1,
            )
            for index in range(SCENARIO.num_peers)
        )
        false = msgspec.structs.replace(
            chain_statement(self.world, b"false"),
            round=self.round,
            prev_root=head.root if head else merkle.EMPTY_ROOT,
            root=merkle.compute_root(self.leaves).digest,
            num_leaves=len(self.leaves),
            sums=compute_sums(self.leaves),
        )
        chain.ledger.submit_round(sign(self.world, false, chain.roster.committee[2:]))
        self.world.settling.tell()

    def prove_it(self) -> None:
        ledger = self.world.chain.ledger
        ledger.prove_reward("auditor", self.round, MemberIndex(0), make_proof(self.leaves, MemberIndex(0)))
        assert ledger.get_held() == ledger.get_owed()
        ledger.rotate()
        self.world.settling.tell()


def chain_statement(world: World, base: bytes) -> Submission:
    """Some statement about round 3, signed by nobody yet."""
    roster = world.chain.roster
    return Submission(
        round=Round(3),
        epoch=roster.epoch,
        nonce=roster.nonce,
        prev_root=merkle.EMPTY_ROOT,
        root=merkle.EMPTY_ROOT,
        num_leaves=SCENARIO.num_peers,
        sums=compute_sums(()),
        data_digest=Digest(bytes(32)),
        base=compute_digest(base),
        absent=(),
        signature=b"",
    )


def sign(world: World, statement: Submission, signers: Sequence[MemberIndex]) -> Submission:
    """By these members of the committee; the others are absent."""
    roster, signatures = world.chain.roster, world._signatures
    message = submission_message(world.config.chain, statement)
    signed = signatures.aggregate([signatures.sign(roster.members[i].bls_key, message) for i in signers])
    absent = tuple(sorted(index for index in roster.committee if index not in signers))
    return msgspec.structs.replace(statement, signature=signed, absent=absent)


def make_world(scenario: Scenario) -> World:
    return World(scenario)


def run(void: Round) -> World:
    world = make_world(SCENARIO)
    Collusion(world, void)
    world.run()
    return world


def test_a_network_goes_on_after_its_chain_voided_a_round() -> None:
    world = run(Round(2))
    rounds = world.chain.ledger.get_rounds(Round(0))
    assert [settled.round for settled in rounds] == [0, 1, 3, 4, 5], "the round in which it happened is lost"
    assert [settled.nonce for settled in rounds] == [0, 0, 1, 1, 1]
    assert len({host.durable.base for host in world.hosts}) == 1
    assert world.losses[Round(5)] < world.losses[Round(1)]
    active = [member.active for member in world.chain.roster.members]
    assert active.count(False) == 5
    assert all(host.durable.head is not None for host in world.hosts)


def test_what_was_certified_without_a_chain_dies_with_a_slash_and_all_go_back() -> None:
    """Rounds 2 and 3 wait for a chain that is away; meanwhile a member of their committee is slashed on it."""
    length_s = sum(get_durations(make_network(SCENARIO))) // 1000
    outage = Outage(Millis(2 * length_s * 1000), Millis((4 * length_s + 5) * 1000))
    world = make_world(msgspec.structs.replace(SCENARIO, outages=(outage,)))

    def slash() -> None:
        chain = world.chain
        liar = chain.roster.committee[0]
        statements = [chain_statement(world, base) for base in (b"one", b"two")]
        assert len(world.checks.certificates) == 4
        chain.ledger.prove_equivocation("auditor", *(sign(world, told, [liar]) for told in statements))
        chain.ledger.rotate()
        world.settling.tell()

    world.schedule.at(Millis(compute_round_start(world.config, Round(4)) + 2_000), slash)
    world.run()
    rounds = world.chain.ledger.get_rounds(Round(0))
    assert [(settled.round, settled.nonce) for settled in rounds] == [(0, 0), (1, 0), (5, 1)]
    assert rounds[2].prev_root == rounds[1].root
    assert {host.durable.base for host in world.hosts} == {rounds[2].base}
    assert all(host.certificates[Round(5)].proposal.base == rounds[1].base for host in world.hosts)


def test_a_network_begins_anew_when_its_first_round_was_void() -> None:
    world = run(Round(0))
    assert [settled.round for settled in world.chain.ledger.get_rounds(Round(0))] == [1, 2, 3, 4, 5]
    assert len({host.durable.base for host in world.hosts}) == 1


@pytest.mark.parametrize("seed", [1, 4, 5, 7])
def test_what_is_certified_after_a_slash_reaches_the_chain(seed: int) -> None:
    """A round began between a slash and the next draw: certified, but by a committee that the contract knew as dead,
    so that nothing after it was settled either.
    """
    shares = {"split_votes": 0.05 if seed == 7 else 0.2}
    learner = LearnerModel(kind="digests")
    world = World(Scenario(seed=seed, num_peers=30, num_rounds=8, adversary_shares=shares, learner=learner))
    world.run()
    entries = world.chain.ledger.get_entries()
    assert any(isinstance(entry.what, Slashed) for entry in entries)
    settled = {record.round for record in world.chain.ledger.get_rounds(Round(0))}
    assert settled == set(world.checks.certificates)
    assert len(settled) >= 6
    roster = world.chain.roster
    assert roster.epoch >= roster.epoch_min, "another committee is drawn within seconds"
