"""What does not pay: copies, replays, splitting, inflation, doing nothing. On a convex problem whose slope is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm import work
from p2pfm.config import ChainConfig, CompressionConfig, NetworkConfig, ScoringConfig
from p2pfm.contribution.duplicates import Limits, find_leaders
from p2pfm.contribution.repeats import PARAMETERS_PER_VECTOR, compute_repeated_gains, compute_room
from p2pfm.contribution.similarity import BLOCK, FEW, Sparse, compute_cosines, compute_overlaps
from p2pfm.contribution.work_proof import check_work, draw_work
from p2pfm.learner import Training
from p2pfm.lora.delta import decode_tensors, encode_tensors, flatten, subtract
from p2pfm.protocol.events import Merge, Remembered, ScoreUpdates, Train, Weighted
from p2pfm.protocol.membership import compute_shares
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.types import WEIGHT_ONE, MemberIndex, Millis, PeerId, Round, Wei, Weight, compute_digest

LIMITS = Limits(cosine=0.9, overlap=0.4)
SIZE = 3 * BLOCK + 17


def draw_sparse(rng, size=SIZE, count=2_000):
    positions = np.sort(rng.choice(size, count, replace=False))
    return Sparse(positions, rng.standard_normal(count).astype(np.float32))


def spread(vector, size=SIZE):
    dense = np.zeros(size, np.float64)
    dense[vector.positions] = vector.values
    return dense


def gather(dense):
    positions = np.flatnonzero(dense)
    return Sparse(positions, dense[positions].astype(np.float32))


# --- similarity


def test_cosines_are_those_of_dense_vectors_from_block_to_block():
    rng = np.random.default_rng(1)
    rows = [draw_sparse(rng) for _ in range(4)]
    rows += [Sparse(rows[0].positions, -3 * rows[0].values), Sparse(np.zeros(0, np.int64), np.zeros(0, np.float32))]
    dense = np.stack([spread(row) for row in rows])
    norms = np.linalg.norm(dense, axis=1)
    expected = np.divide(
        dense @ dense.T, np.outer(norms, norms), out=np.zeros((6, 6)), where=np.outer(norms, norms) > 0
    )
    assert compute_cosines(rows, SIZE) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_rows", [0, 1, FEW, FEW + 1])
def test_cosines_with_others_are_a_part_of_those_of_all(num_rows):
    rng = np.random.default_rng(3)
    rows, others = [draw_sparse(rng) for _ in range(num_rows)], [draw_sparse(rng) for _ in range(5)]
    others.append(Sparse(np.zeros(0, np.int64), np.zeros(0, np.float32)))
    expected = compute_cosines([*rows, *others], SIZE)[:num_rows, num_rows:]
    found = compute_cosines(rows, SIZE, others)
    assert found.shape == (num_rows, 6)
    assert found == pytest.approx(expected, abs=1e-6)


def test_overlap_is_nothing_by_chance_and_all_for_a_part():
    rng = np.random.default_rng(2)
    whole, other = draw_sparse(rng, 40_000, 10_000), draw_sparse(rng, 40_000, 10_000)
    part = Sparse(whole.positions[::3], whole.values[::3])
    everything = Sparse(np.arange(40_000), np.ones(40_000, np.float32))
    overlaps = compute_overlaps([whole, other, part, everything], 40_000)
    assert abs(overlaps[0, 1]) < 0.02
    assert overlaps[0, 2] == overlaps[0, 0] == 1
    assert overlaps[0, 3] == 0


@pytest.mark.parametrize(
    ("positions", "message"),
    [([2, 1], "ascending"), ([1, 1], "distinct"), ([-1, 2], "of at least 0"), ([0, 9], "positions from 0 to 8, got 9")],
)
def test_similarity_rejects_positions_that_are_none(positions, message):
    with pytest.raises(ValueError, match=message):
        compute_cosines([Sparse(np.array(positions), np.ones(2, np.float32))], 9)


# --- duplicates


def test_the_first_announced_of_equal_updates_leads():
    rng = np.random.default_rng(3)
    mine, other = draw_sparse(rng), draw_sparse(rng)
    scaled = Sparse(mine.positions, (7 * mine.values).astype(np.float32))
    assert find_leaders([mine, other, scaled], SIZE, LIMITS) == [0, 1, 0]
    assert find_leaders([scaled, mine, other], SIZE, LIMITS) == [0, 0, 2]


def test_noise_on_the_same_positions_hides_nothing():
    rng = np.random.default_rng(4)
    mine = draw_sparse(rng)
    noisy = Sparse(mine.positions, (mine.values + 2 * rng.standard_normal(len(mine.values))).astype(np.float32))
    assert find_leaders([mine, noisy], SIZE, LIMITS) == [0, 0]


@pytest.mark.parametrize("order", list(itertools.permutations(("first", "second", "bridge"))))
def test_a_bridge_between_two_honest_updates_joins_one_of_them_and_never_both(order):
    rng = np.random.default_rng(5)
    updates = {"first": draw_sparse(rng), "second": draw_sparse(rng)}
    mixed = spread(updates["first"]) + spread(updates["second"])
    mixed[rng.permutation(SIZE)[: SIZE // 10]] = 0
    updates["bridge"] = gather(mixed)
    leaders = find_leaders([updates[name] for name in order], SIZE, LIMITS)
    repeats = [name for index, name in enumerate(order) if leaders[index] != index]
    if order[0] == "bridge":
        # Announced before both are known: only a guess of both could be. Then it stands for them.
        assert repeats == list(order[1:])
    else:
        assert repeats == ["bridge"]


def test_alikeness_is_not_passed_on():
    rng = np.random.default_rng(6)
    base = draw_sparse(rng, SIZE, 3_000)
    chain = [
        Sparse(base.positions[start : start + 1_500], base.values[start : start + 1_500]) for start in (0, 700, 1_400)
    ]
    # The second is like both, the third is like the second only.
    assert find_leaders(chain, SIZE, LIMITS) == [0, 0, 2]


def test_zero_updates_are_no_duplicates_and_limits_of_one_join_nobody():
    rng = np.random.default_rng(7)
    mine, nothing = draw_sparse(rng), Sparse(np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert find_leaders([nothing, nothing, mine, mine], SIZE, LIMITS) == [0, 1, 2, 2]
    assert find_leaders([mine, mine], SIZE, Limits(cosine=1.0, overlap=1.0)) == [0, 1]


# --- repeats


@given(st.integers(0, 2**32), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_earlier_updates_is_all_repeated(seed, mix):
    rng = np.random.default_rng(seed)
    earlier = [draw_sparse(rng, 4_096, 200) for _ in range(4)]
    slope = rng.standard_normal(4_096)
    mixed = gather(sum(share * spread(vector, 4_096) for share, vector in zip(mix, earlier, strict=True)))
    gain = -float(slope @ spread(mixed, 4_096))
    (repeated,) = compute_repeated_gains([mixed], earlier, slope, np.ones((1, 4), np.bool_))
    assert repeated == pytest.approx(gain, abs=1e-3)


def test_the_repeated_part_is_the_projection_even_where_earlier_updates_repeat_each_other():
    rng = np.random.default_rng(8)
    first, second, update = (draw_sparse(rng, 4_096, 1_000) for _ in range(3))
    earlier = [
        first,
        second,
        Sparse(first.positions, 5 * first.values),
        gather(spread(first, 4_096) - spread(second, 4_096)),
    ]
    slope = rng.standard_normal(4_096)
    axes, _ = np.linalg.qr(np.stack([spread(first, 4_096), spread(second, 4_096)]).T)
    projected = axes @ (axes.T @ spread(update, 4_096))
    (repeated,) = compute_repeated_gains([update], earlier, slope, np.ones((1, 4), np.bool_))
    assert repeated == pytest.approx(-float(slope @ projected), rel=1e-3)


def test_what_does_not_count_against_an_update_is_not_held_against_it():
    rng = np.random.default_rng(9)
    mine, other = draw_sparse(rng, 4_096, 300), draw_sparse(rng, 4_096, 300)
    slope = -spread(mine, 4_096)
    counts = np.array([[True, True], [False, True]])
    gains = compute_repeated_gains([mine, mine], [mine, other], slope, counts)
    assert gains[0] == pytest.approx(float(np.sum(mine.values.astype(np.float64) ** 2)), rel=1e-5)
    assert abs(gains[1]) < 0.02 * gains[0]
    assert compute_repeated_gains([mine], [], slope, np.ones((1, 0), np.bool_)) == [0.0]


# --- proof of computation


def test_every_peer_and_round_draws_another_batch():
    drawn = {
        draw_work(compute_digest(network), Round(round), PeerId(peer))
        for network in (b"a", b"b") for round in range(3) for peer in ("x", "y")
    }  # fmt: skip
    assert len(drawn) == 12


def test_an_update_passes_its_proof_only_on_its_own_batch_and_nothing_proves_nothing():
    def loss(at, seed):
        return float(np.sum((at["t"] - np.random.default_rng(seed).standard_normal(50)) ** 2))

    base = {"t": np.zeros(50, np.float32)}
    seeds = [11, 12, 13]
    trained = [{"t": np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 0.3} for seed in seeds]
    assert check_work(loss, base, trained, seeds, secret=1) == [True, True, True]
    assert check_work(loss, base, trained, [12, 13, 11], secret=1) == [False, False, False]
    assert check_work(loss, base, [base], [11], secret=1) == [False]


# --- a round's scores

NUM_HONEST = 6
SHAPES = {"a": (64, 64), "b": (32, 128)}
NUM_PARAMETERS = 8_192
COMPRESSION = CompressionConfig(chunk=1024, keep=64)
CONFIG = NetworkConfig(
    name="gaming",
    genesis_ms=Millis(0),
    backbone="a quadratic",
    probe="00" * 32,
    chain=ChainConfig(1, "", ""),
    compression=COMPRESSION,
    scoring=ScoringConfig(),
)


class Quadratic:
    """A Learner whose loss is half the squared distance to a target; what a peer sees of it in a round is a sixth, with
    noise; peer 0's with little."""

    def __init__(self, peer):
        self.peer = peer
        self.delta = None
        rng = np.random.default_rng(0)
        self.target = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}

    def shapes(self):
        return SHAPES

    def train(self, base, round, work=None):
        if self.delta is not None:
            return Training(self.delta, 1, 0.0)
        rng = np.random.default_rng([1, self.peer, round])
        delta = {}
        for name, part in sorted(self.target.items()):
            errors = part + (2 if self.peer else 1) * rng.standard_normal(part.shape) - base[name]
            is_seen = rng.random(part.shape) < 1 / 6
            delta[name] = (0.3 * errors * is_seen).astype(np.float32)
        return Training(delta, 1, 0.0)

    def gradient(self, at, seed):
        return 0.0, subtract(at, self.target)


class Blobs(dict):
    def put(self, data):
        self[compute_digest(data)] = data
        return compute_digest(data)

    def get(self, digest):
        return self[digest]


class Federation:
    """Six honest peers; whoever else takes part has an id of its own and gives its delta."""

    def __init__(self):
        self.blobs = Blobs()
        self.base = self.blobs.put(
            encode_tensors({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
        )
        self.previous = None
        self.round = Round(0)
        self.earlier = ()

    def announce(self, name, delta=None, peer=0):
        learner = Quadratic(peer)
        learner.delta = delta
        return work.train_update(learner, self.blobs, CONFIG, Train(self.round, PeerId(name), self.base, None)).payload

    def honest(self, num=NUM_HONEST):
        return [self.announce(f"honest {peer}", peer=peer) for peer in range(num)]

    def score(self, payloads, weights=None, earlier=None):
        weights = weights or [Weight(WEIGHT_ONE // len(payloads))] * len(payloads)
        updates = tuple(Weighted(payload, weight) for payload, weight in zip(payloads, weights, strict=True))
        remembered = self.earlier if earlier is None else earlier
        action = ScoreUpdates(self.round, self.base, self.previous, updates, remembered)
        return work.score_updates(Quadratic(0), self.blobs, CONFIG, action, seed=1, salt=bytes(32)).contributions

    def close(self, payloads, *, is_certified=True):
        self.earlier = (*(Remembered(payload, is_certified) for payload in payloads), *self.earlier)
        if is_certified:
            updates = tuple(Weighted(payload, Weight(WEIGHT_ONE // len(payloads))) for payload in payloads)
            merged = work.merge_updates(self.blobs, SHAPES, CONFIG, Merge(bytes(32), self.base, updates))
            self.previous, self.base = self.base, merged.new_base
        self.round = Round(self.round + 1)

    def decode(self, payload):
        coded = work.split_payload(self.blobs.get(payload))[1]
        return work.decode_payload(coded, SHAPES, COMPRESSION, 1 << 20).tensors()

    def moved(self):
        return subtract(*(decode_tensors(self.blobs.get(base), SHAPES) for base in (self.base, self.previous)))


@pytest.fixture
def second_round():
    """A federation after one merged round; (it, that round's payloads)."""
    federation = Federation()
    payloads = federation.honest()
    assert min(federation.score(payloads)) > 0
    federation.close(payloads)
    return federation, payloads


def test_a_zero_update_earns_exactly_nothing():
    federation = Federation()
    zero = federation.announce("lazy", {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
    scores = federation.score([*federation.honest(), zero])
    assert scores[-1] == 0
    assert min(scores[:-1]) > 0


def test_replaying_the_last_aggregate_earns_nothing_with_noise_or_without(second_round):
    federation, _ = second_round
    moved, rng = federation.moved(), np.random.default_rng(1)
    noisy = {name: part + rng.normal(0, np.std(part), part.shape).astype(np.float32) for name, part in moved.items()}
    cheats = [federation.announce("replay", moved), federation.announce("noise", noisy)]
    scores = federation.score([*federation.honest(), *cheats])
    fair = np.mean(scores[:-2])
    assert max(scores[-2:]) < 0.05 * fair
    undefended = federation.score([*federation.honest(), cheats[0]], earlier=())
    assert undefended[-1] < 0.05 * fair  # the aggregate alone is known from the bases


def test_anothers_update_of_an_earlier_round_earns_nothing_however_it_is_mixed(second_round):
    federation, payloads = second_round
    first, second, third = (federation.decode(payload) for payload in payloads[:3])
    copies = [
        first,
        {name: -5 * second[name] for name in SHAPES},
        {name: first[name] + 0.5 * second[name] + 0.3 * third[name] for name in SHAPES},
    ]
    cheats = [federation.announce(f"copy {number}", delta) for number, delta in enumerate(copies)]
    scores = federation.score([*federation.honest(), *cheats])
    fair = np.mean(scores[:6])
    assert abs(scores[6]) < 1e-3 * fair
    assert scores[7] < 0  # a harmful one is not excused for being an old one's opposite
    assert scores[8] < 0.1 * fair  # half of the mix is cut off by the codec, so it is not quite a mix any more
    undefended = federation.score([*federation.honest(), cheats[0]], earlier=())
    assert undefended[-1] > 0.2 * fair


def test_a_void_rounds_work_is_its_makers_own_to_announce_again():
    federation = Federation()
    payloads = federation.honest()
    federation.close(payloads, is_certified=False)
    delta = federation.decode(payloads[0])
    again, copy = federation.announce("honest 0", delta), federation.announce("copycat", delta)
    others = federation.honest()[1:]
    assert federation.score([again, *others])[0] > 0.5 * np.mean(federation.score(payloads, earlier=()))
    assert abs(federation.score([copy, *others])[0]) < 1e-3 * federation.score([again, *others])[0]
    federation.earlier = tuple(Remembered(item.payload, is_paid=True) for item in federation.earlier)
    assert abs(federation.score([again, *others])[0]) < 1e-3 * federation.score([copy, *others], earlier=())[0]


def test_earlier_updates_that_are_lost_are_only_not_remembered(second_round):
    federation, payloads = second_round
    copy = federation.announce("copy", federation.decode(payloads[0]))
    others = federation.honest()
    for payload in payloads:
        del federation.blobs[payload]
    assert federation.score([*others, copy]) == federation.score([*others, copy], earlier=())


@pytest.mark.parametrize(
    ("num_parameters", "num_values", "room"),
    [(64, 32, 0), (460_800, 28_800, 450), (8_000_000, 500_000, 33), (8_000_000, 8_000_000, 2), (10**9, 10**9, 0)],
)
def test_what_is_remembered_is_bounded_by_the_adapters_size_and_by_what_it_takes_to_decode(
    num_parameters, num_values, room
):
    assert compute_room(num_parameters, num_values) == room


def test_a_small_adapter_remembers_few_updates(second_round):
    federation, payloads = second_round
    room = NUM_PARAMETERS // PARAMETERS_PER_VECTOR
    rng = np.random.default_rng(0)
    noise = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(room)
    ]
    filler = tuple(
        Remembered(federation.announce(f"filler {number}", delta), is_paid=True) for number, delta in enumerate(noise)
    )
    copy = federation.announce("copy", federation.decode(payloads[0]))
    known = Remembered(payloads[0], is_paid=True)
    others = federation.honest()
    newest, oldest = (
        federation.score([*others, copy], earlier=earlier)[-1] for earlier in ((known, *filler), (*filler, known))
    )
    assert abs(newest) < 0.01 * oldest


def test_of_equal_updates_only_the_first_announced_is_paid():
    federation = Federation()
    honest = federation.honest()
    twin = federation.announce("twin", federation.decode(honest[0]))
    alone = federation.score(
        [*honest, federation.announce("idle", {n: np.zeros(s, np.float32) for n, s in SHAPES.items()})]
    )
    late, early = federation.score([*honest, twin]), federation.score([twin, *honest])
    assert late[6] == 0
    assert late[:6] == pytest.approx(alone[:6], rel=1e-2)  # one more update moves the median norm
    assert early[1] == 0
    assert early[0] == pytest.approx(late[0], rel=1e-2)


def make_roster(stakes):
    members = tuple(
        Member(MemberIndex(index), f"0x{index:040x}", PeerId(f"peer {index}"), bytes(48), Wei(stake), active=True)
        for index, stake in enumerate(stakes)
    )
    return Roster(1, 0, members, (MemberIndex(0),))


def shares_of(stakes, cap=10**24):
    shares = compute_shares(make_roster(stakes), Wei(cap))
    return [shares[PeerId(f"peer {index}")] for index in range(len(stakes))]


@pytest.mark.parametrize("num", [2, 5, 10])
def test_splitting_one_stake_earns_no_more(num):
    federation = Federation()
    honest = federation.honest()
    whole = federation.score(honest, shares_of([100] * 6))
    delta = federation.decode(honest[0])
    clones = [federation.announce(f"clone {number}", delta) for number in range(num)]
    split = federation.score([*honest[1:], *clones], shares_of([100] * 5 + [100 // num] * num))
    assert split[6:] == (0,) * (num - 1)
    assert sum(split[5:]) < 0.7 * whole[0]
    # Each with draws of its own is work of its own, but for the same stake.
    workers = [federation.announce(f"worker {number}", peer=50 + number) for number in range(num)]
    split = federation.score([*honest[1:], *workers], shares_of([100] * 5 + [100 // num] * num))
    assert sum(split[5:]) == pytest.approx(np.mean(split[:5]), rel=0.2)


def test_stake_over_the_cap_gives_no_weight():
    assert shares_of([10**24, 10**24], cap=10**23) == shares_of([10**23, 10**25], cap=10**23)


@pytest.mark.parametrize("scale", [3, 10, 1e6])
def test_an_inflated_update_earns_what_its_direction_is_worth(scale):
    federation = Federation()
    deltas = [federation.decode(payload) for payload in federation.honest()]
    norms = [float(np.linalg.norm(flatten(delta))) for delta in deltas]
    player = int(np.argmax(norms))
    plain = federation.score([federation.announce(f"peer {i}", delta) for i, delta in enumerate(deltas)])
    deltas[player] = {name: np.float32(scale) * part for name, part in deltas[player].items()}
    inflated = federation.score([federation.announce(f"peer {i}", delta) for i, delta in enumerate(deltas)])
    assert inflated == pytest.approx(plain, rel=0.01)
