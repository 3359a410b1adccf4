"""What a network does when the chain voids rounds: it goes back to the newest that stands, and on from there."""

import msgspec

from p2pfm.protocol.phases import compute_round_start
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Submission
from p2pfm.settlement.memory_ledger import make_proof
from p2pfm.settlement.rewards import compute_sums, from_wire, submission_message
from p2pfm.types import Digest, MemberIndex, Millis, Round, Wei
from sim.learners import LinearLearner, Problem
from sim.scenarios import Scenario
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
        roster = chain.roster
        unsigned = Submission(
            round=self.round,
            epoch=roster.epoch,
            nonce=roster.nonce,
            prev_root=head.root if head else merkle.EMPTY_ROOT,
            root=merkle.compute_root(self.leaves).digest,
            num_leaves=len(self.leaves),
            sums=compute_sums(self.leaves),
            data_digest=Digest(bytes(32)),
            base=Digest(bytes(32)),
            absent=tuple(sorted(roster.committee[:2])),
            signature=b"",
        )
        message = submission_message(self.world.config.chain, unsigned)
        signers = [index for index in roster.committee if index not in unsigned.absent]
        signatures = self.world._signatures
        signed = signatures.aggregate([signatures.sign(roster.members[i].bls_key, message) for i in signers])
        chain.ledger.submit_round(msgspec.structs.replace(unsigned, signature=signed))
        self.world.tell_chain()

    def prove_it(self) -> None:
        ledger = self.world.chain.ledger
        ledger.prove_reward("auditor", self.round, MemberIndex(0), make_proof(self.leaves, MemberIndex(0)))
        assert ledger.get_held() == ledger.get_owed()
        ledger.rotate()
        self.world.tell_chain()


def run(void: Round) -> World:
    problem = Problem(SCENARIO.seed)
    world = World(SCENARIO, lambda index: LinearLearner(problem, index))
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


def test_a_network_begins_anew_when_its_first_round_was_void() -> None:
    world = run(Round(0))
    assert [settled.round for settled in world.chain.ledger.get_rounds(Round(0))] == [1, 2, 3, 4, 5]
    assert len({host.durable.base for host in world.hosts}) == 1
