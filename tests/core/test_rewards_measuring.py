"""Measured again: honest medians lie within what is tolerated, inflated ones do not; an update's worth is a loss."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ledger_worlds import PEERS
from rewards_world import Settled

from nodes.rewards.blobs import Blobs
from nodes.rewards.measuring import (
    ROUNDING_OWN,
    TOLERANCE_SPREADS,
    DeepCheck,
    Meter,
    Remeasured,
    check_rounds,
    compute_balances,
    compute_expected_median,
    draw_audit_seed,
    open_meter,
)
from nodes.rewards.reading import list_rosters
from p2pfm import work
from p2pfm.config import CompressionConfig, NetworkConfig, NodeConfig, ScoringConfig, TrainingConfig
from p2pfm.errors import OperatorError, WorldError
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.delta import decode_tensors, encode_tensors
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.messages import Announcement, Proposal, Score, ScoreReveal
from p2pfm.protocol.committee import draft_proposal, merge_request
from p2pfm.protocol.events import Remembered, ScoreUpdates, Train, Weighted
from p2pfm.protocol.membership import compute_shares
from p2pfm.settlement.rewards import compute_median
from p2pfm.types import Contribution, Digest, MemberIndex, Round, Weight, compute_digest

NUM_PEERS = 3
DRAWS = 6


@dataclass
class Trained:
    """Two rounds of real training and measuring on the tiny model, and where their bytes are."""

    settled: Settled
    blobs: Blobs
    config: NodeConfig
    meter: Meter
    payloads: list[dict[int, Digest]] = field(default_factory=list)

    def check(self, round: int, num_draws: int = DRAWS) -> DeepCheck:
        """One round, measured again."""
        book = self.settled.book()
        roster = list_rosters(book, book.get_reading(Round(round)).settled.position)[0]
        return self.meter.check_round(book, book.get_reading(Round(round)), roster, num_draws, lambda *_: None)


def make_world(folder, num_rounds: int, inflate: int = 1) -> Trained:
    """`inflate`: every judge reveals so many times what it measured of the first peer's update in the last round."""
    torch.set_num_threads(1)
    shards = build_shards(NUM_PEERS, folder, seed=0, corrupted=set())
    probe = read_probe(shards.probe)
    settled = Settled(num_members=NUM_PEERS)
    network: NetworkConfig = msgspec.structs.replace(
        settled.network,
        backbone="tiny",
        probe=probe.digest.hex(),
        training=TrainingConfig(steps=8, batch=4, tokens_max=48, learning_rate=5e-3),
        scoring=ScoringConfig(samples_per_stratum=4),
        compression=CompressionConfig(chunk=512, keep=64),
    )
    settled.network = network
    config = NodeConfig(home=".", data="", rpc="", network=network, probe=str(shards.probe))
    blobs = Blobs(None, ())
    meter = open_meter(config, blobs)
    model, tokenizer = load_backbone("tests/fixtures/tiny-llama")
    learners = [TorchLearner(model, tokenizer, network, read_samples(shards.peers[0]), probe)]
    learners += [
        TorchLearner(*load_backbone("tests/fixtures/tiny-llama"), network, read_samples(path), probe)
        for path in shards.peers[1:]
    ]
    world = Trained(settled, blobs, config, meter)
    base, residuals = blobs.put(encode_tensors(learners[0].initial())), [None] * NUM_PEERS
    draw = random.Random(7)
    for round in range(num_rounds):
        is_last = round == num_rounds - 1
        proposal = settle_round(world, learners, base, residuals, Round(round), draw, inflate if is_last else 1)
        base = proposal.new_base
    return world


def settle_round(
    world: Trained,
    learners: Sequence[TorchLearner],
    base: Digest,
    residuals: list,
    round: Round,
    draw: random.Random,
    inflate: int,
) -> Proposal:
    settled, blobs, network = world.settled, world.blobs, world.settled.network
    roster = settled.world.any.get_roster()
    announcements, payloads = {}, {}
    for author, learner in enumerate(learners):
        trained = work.train_update(learner, blobs, network, Train(round, PEERS[author + 1], base, residuals[author]))
        residuals[author] = trained.residual
        payloads[author] = trained.payload
        announcements[trained.payload] = Announcement(round, PEERS[author + 1], base, trained.payload, 1, 1)
    shares = compute_shares(roster, network.stake_cap())
    previous = settled.previous
    earlier = sorted(previous.updates, key=lambda update: -update.contribution) if previous else ()
    action = ScoreUpdates(
        round,
        base,
        previous.base if previous else None,
        tuple(Weighted(payloads[author], shares[PEERS[author + 1]]) for author in payloads),
        tuple(Remembered(update.payload, is_paid=True) for update in earlier),
    )
    reveals = []
    for judge in range(NUM_PEERS):
        values = work.score_updates(learners[judge], blobs, network, action, draw.getrandbits(60), bytes(32))
        scores = [
            Score(item.payload, Contribution(value * (inflate if item.payload == payloads[0] else 1)))
            for item, value in zip(action.updates, values.contributions, strict=True)
        ]
        scores.sort(key=lambda score: score.payload)
        reveals.append(ScoreReveal(round, MemberIndex(judge), bytes(32), tuple(scores)))
    draft = draft_proposal(network, roster, previous, round, base, reveals, announcements)
    merge = merge_request(draft)
    new_base = base
    if merge is not None:
        new_base = work.merge_updates(blobs, dict(learners[0].shapes()), network, merge).new_base
    world.payloads.append(payloads)
    return settled.accept(msgspec.structs.replace(draft, new_base=new_base))


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Trained:
    return make_world(tmp_path_factory.mktemp("honest"), 2)


def without(blobs: Blobs, *gone: Digest) -> Blobs:
    """The same blobs, but nobody serves some of them."""
    less = Blobs(None, ())
    for digest in list(blobs.kept):
        if digest not in gone:
            less.put(blobs.get(digest))
    return less


def test_honest_medians_are_within_what_is_tolerated(honest: Trained) -> None:
    for round in (0, 1):
        check = honest.check(round)
        assert check.findings == ()
        assert len(check.updates) == NUM_PEERS
        assert all(update.spread > 0 for update in check.updates)
        assert {update.peer for update in check.updates} == set(PEERS[1 : NUM_PEERS + 1])


def test_another_auditor_measures_the_very_same(honest: Trained) -> None:
    other = open_meter(honest.config, honest.blobs)
    book = honest.settled.book()
    roster = list_rosters(book, 1)[0]
    again = other.check_round(book, book.readings[1], roster, DRAWS, lambda *_: None)
    assert again == honest.check(1)


def test_a_committee_that_inflates_one_contribution_is_found(tmp_path) -> None:
    world = make_world(tmp_path, 1, inflate=12)
    assert world.settled.findings() == {0: []}  # the medians are the vectors': nothing on chain is wrong
    check = world.check(0)
    (finding,) = check.findings
    assert finding.startswith("update of member 0: certified")
    liar = next(update for update in check.updates if update.member == 0)
    assert liar.is_finding
    assert liar.certified > 6 * liar.measured


def test_a_merge_that_is_not_the_updates_is_found(tmp_path) -> None:
    world = make_world(tmp_path, 1)
    proposal = world.settled.previous
    assert proposal is not None
    wrong = msgspec.structs.replace(proposal, new_base=proposal.base)
    assert world.meter.compare_merge(proposal) == ()
    (finding,) = world.meter.compare_merge(wrong)
    assert finding.startswith("base: the certified updates merge to")


def test_without_an_update_the_loss_is_that_of_the_others_merge(honest: Trained) -> None:
    book = honest.settled.book()
    reading, payload = book.readings[1], honest.payloads[1][0]
    effect = honest.meter.compare_without(book, reading, payload)
    proposal = honest.settled.previous
    assert proposal is not None
    shapes, learner = dict(honest.meter.learner.shapes()), honest.meter.learner

    def loss(digest: Digest) -> float:
        return learner.evaluate(decode_tensors(honest.blobs.get(digest), shapes))

    assert effect.loss_before == loss(proposal.base)
    assert effect.loss_with == loss(proposal.new_base)
    merge = merge_request(proposal)
    assert merge is not None
    zeroed = tuple(Weighted(i.payload, Weight(0) if i.payload == payload else i.weight) for i in merge.updates)
    other = work.merge_updates(
        honest.blobs, shapes, honest.settled.network, msgspec.structs.replace(merge, updates=zeroed)
    )
    assert effect.loss_without == loss(other.new_base)
    assert effect.gain == effect.loss_without - effect.loss_with != 0


def test_a_base_that_nobody_serves_is_merged_again_from_older_rounds(honest: Trained) -> None:
    book = honest.settled.book()
    base = book.readings[1].proposal.base
    meter = Meter(honest.meter.learner, without(honest.blobs, base), honest.settled.network)
    payload = honest.payloads[1][0]
    assert meter.compare_without(book, book.readings[1], payload) == honest.meter.compare_without(
        book, book.readings[1], payload
    )


def test_missing_payloads_are_named_and_nothing_is_invented(honest: Trained) -> None:
    book = honest.settled.book()
    lost = honest.payloads[1][2]
    meter = Meter(honest.meter.learner, without(honest.blobs, lost), honest.settled.network)
    with pytest.raises(WorldError, match=f"updates of 1 of 3 peers are not served any more .{PEERS[3][-6:]}"):
        meter.compare_without(book, book.readings[1], honest.payloads[1][0])
    check = meter.check_round(book, book.readings[1], list_rosters(book, 1)[0], DRAWS, lambda *_: None)
    assert (check.updates, check.findings) == ((), ())
    assert "not measured: round 1: the updates of 1 of 3 peers" in check.notes[0]
    early = Meter(
        honest.meter.learner,
        without(honest.blobs, book.readings[1].proposal.base, honest.payloads[0][0]),
        honest.settled.network,
    )
    with pytest.raises(WorldError, match="round 0: the updates of 1 of 3"):
        early.find_base(book, book.readings[1])


@pytest.mark.parametrize("is_lie", [True, False])
def test_a_round_without_data_is_not_measured_and_the_others_are(honest: Trained, is_lie: bool) -> None:
    book = honest.settled.book()
    lost = msgspec.structs.replace(book.readings[0], proposal=None, problem="round 0: no data", is_lie=is_lie)
    partial = msgspec.structs.replace(book, readings=(lost, book.readings[1]))
    first, second = check_rounds(
        honest.meter, partial, partial.readings, lambda at: list_rosters(book, at)[0], 3, 600, lambda *_: None
    )
    assert (first.updates, first.notes[0][:30]) == ((), "not measured: round 0: no data")
    assert len(second.updates) == NUM_PEERS
    assert any("data of an earlier round are missing" in note for note in second.notes)


def test_nonsense_of_an_earlier_round_does_not_blind_the_next(honest: Trained) -> None:
    book = honest.settled.book()
    first = book.readings[0].proposal
    assert first is not None
    bogus = msgspec.structs.replace(first.updates[0], payload=first.base)
    lie = msgspec.structs.replace(first, base=first.updates[1].payload, updates=(bogus, *first.updates[1:]))
    readings = (msgspec.structs.replace(book.readings[0], proposal=lie), book.readings[1])
    book = msgspec.structs.replace(book, readings=readings)
    check = honest.meter.check_round(book, readings[1], list_rosters(book, 1)[0], DRAWS, lambda *_: None)
    assert len(check.updates) == NUM_PEERS


def test_an_update_of_another_maker_is_a_finding(honest: Trained) -> None:
    """Whom a payload is paid for stands in its first bytes, and the vectors tell nothing of it."""
    book = honest.settled.book()
    proposal = book.readings[1].proposal
    assert proposal is not None
    first, second, third = proposal.updates
    stolen = msgspec.structs.replace(first, peer=second.peer, member=second.member)
    lie = msgspec.structs.replace(proposal, updates=(stolen, third))
    reading = msgspec.structs.replace(book.readings[1], proposal=lie)
    check = honest.meter.check_round(book, reading, list_rosters(book, 1)[0], DRAWS, lambda *_: None)
    assert check.findings == (f"update of member {second.member}: its payload is of {first.peer}",)


def test_unknown_history_excuses_less_but_never_more_than_measured(honest: Trained) -> None:
    book = honest.settled.book()
    meter = Meter(honest.meter.learner, without(honest.blobs, honest.payloads[0][1]), honest.settled.network)
    check = meter.check_round(book, book.readings[1], list_rosters(book, 1)[0], DRAWS, lambda *_: None)
    assert any("updates of earlier rounds are not served" in note for note in check.notes)
    proposal = book.readings[1].proposal
    (first, *_) = sorted(proposal.updates, key=lambda update: update.member)
    draws = [first.contribution * 9 + offset for offset in range(DRAWS)]
    excused = meter.compare(proposal, first.payload, draws, 0.0, has_gaps=True)
    assert (excused.is_finding, "perhaps for what it repeats" in excused.note) == (False, True)
    assert meter.compare(proposal, first.payload, draws, 0.0, has_gaps=False).is_finding
    low = [first.contribution // 9 + offset for offset in range(DRAWS)]
    assert meter.compare(proposal, first.payload, low, 0.0, has_gaps=True).is_finding


def test_time_is_bounded_and_what_was_not_measured_says_so(honest: Trained) -> None:
    book = honest.settled.book()
    steps: list[tuple[int, int]] = []
    checks = check_rounds(
        honest.meter,
        book,
        book.readings,
        lambda position: list_rosters(book, position)[0],
        3,
        1e-6,
        lambda done, total, what: steps.append((done, total)),
    )
    assert [check.round for check in checks] == [0, 1]
    assert "not measured: no time left" in checks[0].notes[0]
    assert len(checks[1].updates) == NUM_PEERS  # the newest is measured, however little time there is
    assert steps == [(0, 6), (1, 6), (2, 6), (3, 6)]


def test_another_probe_than_the_networks_is_refused(honest: Trained, tmp_path) -> None:
    wrong = tmp_path / "probe.jsonl"
    wrong.write_bytes(b"{}")
    config = msgspec.structs.replace(honest.config, probe=str(wrong))
    with pytest.raises(OperatorError, match="nobody serves the probe set"):
        open_meter(config, Blobs(None, ()))
    with pytest.raises(OperatorError, match="Check the path"):
        open_meter(msgspec.structs.replace(config, probe=str(tmp_path / "none")), Blobs(None, ()))


def test_audit_seeds_are_public_and_differ() -> None:
    digest = compute_digest(b"round")
    seeds = [draw_audit_seed(digest, number) for number in range(50)]
    assert len(set(seeds)) == 50
    assert seeds[:1] == [draw_audit_seed(digest, 0)] != [draw_audit_seed(compute_digest(b"other"), 0)]
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=2, max_size=6), st.integers(1, 7), st.integers(0, 2**30))
def test_the_expected_median_is_that_of_endless_resampling(draws: list[int], count: int, seed: int) -> None:
    draw = random.Random(seed)
    sampled = [compute_median([Contribution(draw.choice(draws)) for _ in range(count)]) for _ in range(4000)]
    mean, spread = compute_expected_median(draws, count)
    width = max(draws) - min(draws)
    rounding = 1e-6  # of sums in floating point
    assert abs(statistics.fmean(sampled) - mean) <= 0.05 * width + rounding
    assert spread >= statistics.stdev(draws) / len(draws) ** 0.5 * 0.999
    assert min(draws) - rounding <= mean <= max(draws) + rounding


def test_readings_that_agree_leave_no_spread_and_nothing_to_measure_is_refused() -> None:
    assert compute_expected_median([5, 5, 5], 4) == (5.0, 0.0)
    for draws, count in (([5], 3), ([5, 6], 0)):
        with pytest.raises(ValueError, match="expected two draws or more"):
            compute_expected_median(draws, count)


def remeasured(certified: int, measured: int, spread: int) -> Remeasured:
    tolerance = round(TOLERANCE_SPREADS * spread + ROUNDING_OWN * measured)
    return Remeasured(MemberIndex(0), PEERS[1], Contribution(certified), measured, spread, tolerance, is_finding=False)


def test_a_small_lie_in_every_round_adds_up_and_chance_does_not() -> None:
    def judge(certified: Sequence[int]) -> bool:
        checks = [DeepCheck(Round(i), (remeasured(c, 100, 20),), (), ()) for i, c in enumerate(certified)]
        (balance,) = compute_balances(checks)
        assert (balance.num_rounds, balance.certified) == (len(certified), sum(certified))
        return balance.is_finding

    assert not judge([160] * 1)
    assert not judge([160] * 4)
    assert judge([160] * 9)
    assert judge([40] * 9)
    assert not judge([160, 40] * 8)


def test_what_was_excused_does_not_enter_the_balance() -> None:
    excused = msgspec.structs.replace(remeasured(0, 10_000, 1), note="repeats")
    assert compute_balances([DeepCheck(Round(0), (excused,), (), ())]) == ()
