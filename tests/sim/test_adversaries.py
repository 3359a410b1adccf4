"""What each adversary costs an honest network at most, what it earns, and who is blamed for it. See `sim.faults`."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from p2pfm.errors import ConfigError
from p2pfm.lora.delta import flatten
from p2pfm.messages import (
    Announcement,
    Envelope,
    Leaf,
    Score,
    ScoreReveal,
    SyncReply,
    SyncRequest,
    wei_from_wire,
    wei_to_wire,
)
from p2pfm.protocol.events import (
    Accuse,
    AnswerSync,
    AnyAction,
    Publish,
    Received,
    RosterChanged,
    Scored,
    ScoreUpdates,
    SyncAsked,
    Weighted,
)
from p2pfm.protocol.gossip import SLOTS_MAX
from p2pfm.protocol.membership import compute_ranks
from p2pfm.settlement.ledger import Slashed
from p2pfm.types import Array, Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, Weight, compute_digest
from sim.adversaries.filters import CABAL_TOKENS, Colluder, Eclipser, Splitter, pay_only
from sim.churn import ChurnModel
from sim.faults import make_learners
from sim.host import Host
from sim.learners.convex import LinearLearner, Problem
from sim.network import NetworkModel, Partition
from sim.scenarios import STAKE, AdversaryKind, Scenario, validate_scenario
from sim.world import World

ROUNDS = 4


@cache
def run(*kinds: AdversaryKind, num_peers: int = 12, rounds_per_epoch: int = ROUNDS, seed: int = 5) -> World:
    """A world of four rounds whose first peers are these."""
    scenario = Scenario(
        seed=seed, num_peers=num_peers, num_rounds=ROUNDS, rounds_per_epoch=rounds_per_epoch, adversaries=kinds
    )
    world = World(scenario)
    world.run()
    return world


def rewards(world: World) -> list[float]:
    """Share of an even split that each peer drew."""
    claimed = world.chain.get_claimed()
    return [len(claimed) * amount / sum(claimed) for amount in claimed]


def certified(world: World) -> list[int]:
    return sorted(world.checks.certificates)


def loss_beside_honest(world: World) -> float:
    """Held-out loss at the end, by that of the same network without adversaries."""
    honest = run(num_peers=world.scenario.num_peers)
    return world.losses[Round(ROUNDS - 1)] / honest.losses[Round(ROUNDS - 1)]


def rounds_proposed_by(world: World, *numbers: int) -> set[int]:
    """Rounds in which one of these is first-ranked."""
    roster = world.chain.roster
    first = {member.index for member in roster.members if member.peer in names(world, *numbers)}
    return {number for number in range(ROUNDS) if compute_ranks(roster, Round(number))[0] in first}


def names(world: World, *numbers: int) -> set[PeerId]:
    return {world.hosts[number].me for number in numbers}


# --- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["alie", "ipm", "minmax", "label_flip"])
def test_a_quarter_of_poisoners_does_no_harm_and_draws_less_than_its_share(kind: AdversaryKind) -> None:
    world = run(kind, kind, kind)
    assert certified(world) == [0, 1, 2, 3]
    assert loss_beside_honest(world) < 1.05
    assert sum(rewards(world)[:3]) < 1.6  # ALIE and MinMax send one near-honest update, which is paid once
    assert world.checks.blamed == set()


@pytest.mark.parametrize("kind", ["ipm", "label_flip"])
def test_who_pushes_backwards_earns_nothing(kind: AdversaryKind) -> None:
    assert max(rewards(run(kind, kind, kind))[:3]) == 0


def test_all_members_of_a_cabal_announce_one_update_made_of_their_honest_ones() -> None:
    problem = Problem(1)
    honest = [LinearLearner(problem, index) for index in range(6)]
    learners = make_learners(("ipm", None, "ipm", "ipm", None, None), honest, 1)
    base = learners[0].initial()
    announced = [flatten(learners[index].train(base, Round(2)).delta) for index in (0, 2, 3)]
    mean = np.mean([flatten(honest[index].train(base, Round(2)).delta) for index in (0, 2, 3)], axis=0)
    assert all(np.array_equal(announced[0], other) for other in announced)
    np.testing.assert_allclose(announced[0], -0.5 * mean, atol=1e-6)
    assert learners[1] is honest[1]


def test_two_cabals_do_not_know_each_other() -> None:
    problem = Problem(1)
    honest = [LinearLearner(problem, index) for index in range(4)]
    alone, *_ = make_learners(("ipm", None, None, None), honest, 1)
    beside, *_ = make_learners(("ipm", "alie", "alie", None), honest, 1)
    base = honest[0].initial()
    assert np.array_equal(flatten(alone.train(base, Round(0)).delta), flatten(beside.train(base, Round(0)).delta))


def test_flipped_labels_change_what_is_learned_and_not_what_is_measured() -> None:
    honest = LinearLearner(Problem(1), 0)
    (flipped,) = make_learners(("label_flip",), [honest], 1)
    base = honest.initial()
    own, poisoned = flatten(honest.train(base, Round(0)).delta), flatten(flipped.train(base, Round(0)).delta)
    np.testing.assert_allclose(poisoned, -own, atol=1e-6)  # from zeros, negated targets are the mirror image
    assert flipped.evaluate(base) == honest.evaluate(base)
    assert flipped.gradient(base, 3)[0] == honest.gradient(base, 3)[0]


def test_a_backdoor_needs_a_learner_with_labels() -> None:
    with pytest.raises(ConfigError, match="backdoor"):
        World(Scenario(num_peers=3, num_rounds=1, adversaries=("backdoor",)))


def announce(*kinds: AdversaryKind | None, seed: int = 1, round: int = 3) -> list[Array]:
    """What each of these peers announces from the base that all begin with; its data do not depend on `seed`."""
    honest = [LinearLearner(Problem(1), index) for index in range(len(kinds))]
    base = honest[0].initial()
    return [flatten(learner.train(base, Round(round)).delta) for learner in make_learners(kinds, honest, seed)]


def compute_cosine(left: Array, right: Array) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("kind", ["noise", "gaussian"])
def test_noise_is_another_for_every_peer_seed_and_round_and_the_same_when_drawn_again(kind: AdversaryKind) -> None:
    first, second = announce(kind, kind)
    others = [second, announce(kind, seed=2)[0], announce(kind, round=4)[0]]
    assert [abs(compute_cosine(first, other)) < 0.5 for other in others] == [True] * 3  # of 64 values: 4 deviations
    assert np.array_equal(first, announce(kind)[0])  # whoever else there is


def test_replays_in_disguise_are_each_disguised_otherwise() -> None:
    honest = [LinearLearner(Problem(1), index) for index in range(2)]
    base = honest[0].initial()
    moved = {name: part + 1 for name, part in base.items()}
    said = []
    for learner in make_learners(("noisy_replay", "noisy_replay"), honest, 1):
        learner.train(base, Round(0))
        said.append(flatten(learner.train(moved, Round(1)).delta))
    assert not np.array_equal(*said)
    assert compute_cosine(*said) > 0.9


def test_a_copycat_copies_the_last_honest_peer_be_it_where_it_may() -> None:
    honest = announce(None, None, None, None)
    assert np.array_equal(announce("copycat", None, None, None)[0], honest[3])
    assert np.array_equal(announce("copycat", None, "sign_flip", "copycat")[0], honest[1])
    assert np.array_equal(announce("copycat", None, "sign_flip", "copycat")[3], honest[1])


def test_a_copycat_among_attackers_alone_does_its_own_work() -> None:
    assert np.array_equal(announce("copycat", "zero")[0], announce(None, None)[0])


def test_identities_of_one_owner_differ_slightly_from_its_update_and_from_each_other() -> None:
    own, *others = announce("sybil", "sybil", "sybil", None)[:3]
    assert np.array_equal(own, announce(None)[0])
    for left, right in combinations((own, *others), 2):
        assert not np.array_equal(left, right)
        assert compute_cosine(left, right) > 0.99


def test_free_riders_noise_is_not_joined_as_duplicates() -> None:
    # Equal noise would be one update: all but the first of them worth exactly 0.
    first = run(*(("noise",) * 4)).checks.certificates[Round(0)].proposal
    assert sum(update.contribution == 0 for update in first.updates) == 0


def test_many_peers_of_one_owner_are_paid_as_one() -> None:
    world = run("sybil", "sybil", "sybil", "sybil")
    assert sum(rewards(world)[:4]) < 1.5
    # What one of them is not paid for comes again in the next round: one owner's data count for somewhat more.
    assert loss_beside_honest(world) < 1.3
    assert world.checks.blamed == set()


# --- announcements ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["garbler", "thief", "forger"])
def test_who_announces_what_it_did_not_make_is_blamed_and_never_paid(kind: AdversaryKind) -> None:
    world = run(kind, num_peers=9)
    assert world.checks.blamed == names(world, 0)
    assert rewards(world)[0] == 0
    assert certified(world) == [0, 1, 2, 3]


def test_a_forger_does_not_bring_blame_on_the_peer_that_it_names() -> None:
    world = run("zero", "forger", num_peers=9)
    assert world.checks.blamed == names(world, 1)


def test_who_announces_when_payloads_are_public_is_not_scored() -> None:
    world = run("latecomer", "latecomer")
    assert rewards(world)[:2] == [0, 0]
    assert world.checks.blamed == set()
    included = {
        update.peer for certificate in world.checks.certificates.values() for update in certificate.proposal.updates
    }
    assert not included & names(world, 0, 1)


def test_words_for_other_rounds_are_worth_nothing() -> None:
    world = run("untimely", "untimely")
    assert certified(world) == [0, 1, 2, 3]
    assert loss_beside_honest(world) == pytest.approx(1.0, rel=0.02)


# --- evaluators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lazy", "colluder"])
def test_evaluators_that_measure_nothing_change_little_below_a_third(kind: AdversaryKind) -> None:
    world = run(kind, kind)
    assert certified(world) == [0, 1, 2, 3]
    assert loss_beside_honest(world) < 1.05
    assert world.checks.blamed == set()


def test_a_vector_revealed_too_late_is_left_out() -> None:
    world = run("late_reveal", "late_reveal", num_peers=9)
    assert certified(world) == [0, 1, 2, 3]
    members = {member.index for member in world.chain.roster.members if member.peer in names(world, 0, 1)}
    for certificate in world.checks.certificates.values():
        assert not members & {reveal.member for reveal in certificate.proposal.reveals} - {
            certificate.proposal.proposer
        }
    assert world.checks.blamed == set()


def say(peer: str, round: int, tokens: int) -> Announcement:
    return Announcement(Round(round), PeerId(peer), Digest(bytes(32)), name_payload(peer, round), 10, tokens)


def name_payload(peer: str, round: int) -> Digest:
    return compute_digest(f"{peer} {round}".encode())


def measure(colluder: Colluder, *payloads: Digest) -> tuple[Contribution, ...]:
    """What a colluder tells of these, each of which it measured to be worth 5."""
    updates = tuple(Weighted(payload, Weight(1)) for payload in payloads)
    colluder.act([ScoreUpdates(Round(1), Digest(bytes(32)), None, updates)])
    told = colluder.hear(Scored(Round(1), (Contribution(5),) * len(payloads), bytes(32), ()))
    assert isinstance(told, Scored)
    return told.contributions


def test_a_colluder_praises_the_friends_that_announced_before_it_those_after_it_and_itself() -> None:
    colluder = Colluder()
    for word in (say("old", 0, CABAL_TOKENS), say("early", 1, CABAL_TOKENS), say("stranger", 1, 9)):
        colluder.hear(Received(Envelope(word.peer, b"", b""), word))
    colluder.act([Publish(say("me", 1, 0))])
    late = say("late", 1, CABAL_TOKENS)
    colluder.hear(Received(Envelope(late.peer, b"", b""), late))
    makers = ("early", "late", "me", "stranger")
    told = measure(colluder, *(name_payload(peer, 1) for peer in makers), name_payload("old", 0))
    assert told == (10, 10, 10, -5, -5)  # a cabal's payloads of earlier rounds are forgotten


def test_praise_of_friends_pays_them_nothing_below_a_majority() -> None:
    world = run("colluder", "colluder", "colluder", "colluder", num_peers=9)
    assert max(rewards(world)[:4]) < 0.02


def test_praise_of_friends_by_a_majority_takes_everything_but_the_pool() -> None:
    # The limit of any median: who sits on a committee is drawn by stake, and a majority of it is a majority.
    world = run("colluder", "colluder", "colluder", "colluder", "colluder", num_peers=9)
    assert max(rewards(world)[5:]) == 0
    assert sum(world.chain.get_claimed()) <= world.chain.deposits


def test_an_overpaying_proposal_is_signed_by_its_friends_alone() -> None:
    world = run("overpayer", "overpayer", num_peers=9, rounds_per_epoch=1)
    assert set(range(ROUNDS)) - set(certified(world)) <= rounds_proposed_by(world, 0, 1)
    assert max(rewards(world)[:2]) == 0
    assert world.checks.blamed == set()


def test_two_thirds_of_a_committee_can_pay_themselves_the_pool_and_no_more() -> None:
    world = run(*(("overpayer",) * 7), num_peers=9, rounds_per_epoch=1)
    assert certified(world) == [0, 1, 2, 3]
    assert sum(rewards(world)[:7]) > 8.5
    assert sum(world.chain.get_claimed()) <= world.chain.deposits


def test_pay_only_keeps_the_sums() -> None:
    def leaf(cumulative: int, reward: int) -> Leaf:
        return Leaf(wei_to_wire(Wei(cumulative)), wei_to_wire(Wei(reward)), Contribution(3))

    paid = pay_only({MemberIndex(1), MemberIndex(2), MemberIndex(9)}, [leaf(10, 4), leaf(8, 3), leaf(0, 0)])
    assert [wei_from_wire(each.reward_wei) for each in paid] == [0, 4, 3]
    assert [wei_from_wire(each.cumulative_wei) for each in paid] == [6, 9, 3]
    assert [each.contribution for each in paid] == [3, 3, 3]


def watch_accusations(world: World) -> list[MemberIndex]:
    """Whom anybody accuses from now on."""
    accused: list[MemberIndex] = []
    after_step = world.checks.after_step

    def record(host: Host, now_ms: Millis, actions: list[AnyAction]) -> None:
        accused.extend(action.member for action in actions if isinstance(action, Accuse))
        after_step(host, now_ms, actions)

    world.checks.after_step = record  # type: ignore[method-assign, assignment]
    return accused


def test_who_splits_the_votes_voids_its_own_rounds_and_is_accused() -> None:
    world = World(Scenario(seed=5, num_peers=9, num_rounds=9, adversaries=("split_votes",)))
    accused = watch_accusations(world)
    world.run()
    splitter = next(member.index for member in world.chain.roster.members if member.peer in names(world, 0))
    assert set(accused) == {splitter}
    assert [member.index for member in world.chain.roster.members if not member.stake] == [splitter]
    assert world.checks.blamed == names(world, 0)
    assert len(certified(world)) == 8


def test_members_that_sign_both_of_two_proposals_are_accused_below_a_third() -> None:
    world = World(Scenario(seed=5, num_peers=9, num_rounds=9, adversaries=("split_votes", "split_votes")))
    accused = watch_accusations(world)
    world.run()
    splitters = {member.index for member in world.chain.roster.members if member.peer in names(world, 0, 1)}
    assert set(accused) == splitters
    assert {member.index for member in world.chain.roster.members if not member.stake} == splitters
    assert len(certified(world)) >= 7


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_an_eclipse_by_a_third_does_not_part_the_victim_from_the_others() -> None:
    world = run("eclipse", "eclipse", "eclipse", "eclipse")
    assert certified(world) == [0, 1, 2, 3]
    assert all(world.hosts[-1].me in holders for holders in world.checks.holders.values())
    assert rewards(world)[-1] > 0.5


def test_a_whole_eclipse_lasts_as_long_as_its_partition_and_the_victim_comes_back() -> None:
    """The victim reaches only eclipsers for two rounds: it learns nothing, signs nothing false, and then catches up."""
    round_ms = 60_000
    partition = Partition(0, 2 * round_ms, hosts=(11,), bridges=(0, 1))
    scenario = Scenario(  # of a seed by which the victim is not to propose, and no eclipser passes on what it said
        seed=7, num_peers=12, num_rounds=4, adversaries=("eclipse",) * 2, network=NetworkModel(partitions=(partition,))
    )
    world = World(scenario)
    world.run()
    assert certified(world) == [0, 1, 2, 3]
    victim = world.hosts[-1].me
    assert [victim in world.checks.holders[round] for round in sorted(world.checks.holders)][2:] == [True, True]
    assert victim not in world.checks.blamed
    proposals = [world.checks.certificates[round].proposal for round in sorted(world.checks.certificates)]
    paid = [victim in {update.peer for update in proposal.updates} for proposal in proposals]
    assert paid == [False, False, True, True]


def test_an_eclipser_keeps_all_from_its_victim_alone() -> None:
    roster = run(num_peers=9).chain.roster
    victim, other = roster.members[-1].peer, roster.members[0].peer
    eclipser = Eclipser()
    eclipser.hear(RosterChanged(roster))
    word = ScoreReveal(Round(0), MemberIndex(0), bytes(32), (Score(Digest(bytes(32)), Contribution(1)),))
    (deed,) = eclipser.act([Publish(word)])
    assert deed.but == {victim}
    request = SyncRequest(Round(0), (), -1)
    for token, asker in enumerate((victim, other)):
        eclipser.hear(SyncAsked(asker, request, token))
    head = next(iter(run(num_peers=9).checks.certificates.values()))
    answers = [eclipser.act([AnswerSync(token, SyncReply((), head))])[0].action for token in (0, 1)]
    assert answers == [AnswerSync(0, SyncReply((), None)), AnswerSync(1, SyncReply((), head))]


def test_a_flood_fills_no_queue_and_costs_the_honest_nothing() -> None:
    world = run("spammer", "spammer", num_peers=9)
    assert world.checks.blamed == names(world, 0, 1)
    assert rewards(world)[:2] == [0, 0]
    assert set(range(ROUNDS)) - set(certified(world)) <= rounds_proposed_by(world, 0, 1)
    for host in world.hosts[2:]:
        assert host.peer is not None
        assert len(host.peer.state.log) <= SLOTS_MAX * 5 * 9


# --- in shards -------------------------------------------------------------------------------------------------------


def test_in_shards_the_same_ones_are_blamed_and_none_is_honest() -> None:
    kinds: tuple[AdversaryKind, ...] = ("equivocator", "garbler", "thief", "colluder", "late", "zero")
    world = World(Scenario(seed=4, num_peers=40, num_rounds=3, shard_size=10, committee_size=7, adversaries=kinds))
    world.run()
    assert certified(world) == [0, 1, 2]
    assert world.checks.blamed == names(world, 0, 1, 2)
    shares = rewards(world)
    assert max(shares[:4]) == shares[5] == 0
    assert min(shares[6:]) > 0.3


# --- all at once -----------------------------------------------------------------------------------------------------


def test_a_third_of_everything_with_crashes_is_survived_and_no_honest_peer_blamed() -> None:
    kinds: tuple[AdversaryKind, ...] = (
        "alie", "alie", "thief", "garbler", "latecomer", "spammer", "untimely", "lazy", "split_votes", "eclipse",
    )  # fmt: skip
    world = World(Scenario(seed=3, num_peers=30, num_rounds=3, churn=ChurnModel(crash=0.05), adversaries=kinds))
    world.run()
    assert len(certified(world)) >= 2
    assert world.checks.blamed <= names(world, 2, 3, 5, 6, 8)


def test_adversaries_keep_to_one_trace_a_seed() -> None:
    kinds: tuple[AdversaryKind, ...] = ("minmax", "minmax", "colluder", "spammer", "split_votes", "sybil", "sybil")
    scenario = Scenario(seed=3, num_peers=12, num_rounds=2, adversaries=kinds)
    worlds = [World(scenario), World(scenario)]
    for world in worlds:
        world.run()
    assert worlds[0].trace_digest() == worlds[1].trace_digest()


def test_a_splitter_without_a_reveal_to_spare_splits_nothing() -> None:
    # The quorum is all three: it tells its one proposal to one half, and the others ask for what they lack.
    world = run("split_votes", num_peers=3)
    assert isinstance(world.hosts[0].filter, Splitter)
    assert world.checks.blamed == set()
    assert certified(world) == [0, 1, 2, 3]


def test_a_kind_stakes_what_the_scenario_says_and_loses_all_of_it() -> None:
    scenario = Scenario(num_peers=8, num_rounds=4, adversaries=("split_votes",), stakes={"split_votes": 3, "honest": 2})
    world = World(scenario)
    assert [member.stake // STAKE for member in world.chain.roster.members] == [3, *[2] * 7]
    world.run()
    slashed = [entry.what for entry in world.chain.ledger.get_entries() if isinstance(entry.what, Slashed)]
    assert [(what.index, what.amount) for what in slashed] == [(0, 3 * STAKE)]


@pytest.mark.parametrize("stake", [0.5, float("nan"), 1e9])
def test_a_stake_below_the_least_or_beyond_all_bounds_is_refused(stake: float) -> None:
    with pytest.raises(ConfigError, match="stakes"):
        validate_scenario(Scenario(stakes={"honest": stake}))
