"""How bytes travel in a simulated network: its laws, and how far its short cuts are from the long way."""

import heapq
import itertools
from hashlib import sha256
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.errors import ConfigError
from p2pfm.types import Millis
from sim.hops import NEVER_MS, compute_flood, draw_mesh
from sim.network import (
    NATS,
    WORLD,
    Gossip,
    LinkClass,
    Network,
    NetworkModel,
    Partition,
    Regions,
    get_regions,
    validate_network_model,
)

GENESIS_MS = Millis(1_000_000)

HOME = (LinkClass(0.5, 1_250, 6_250), LinkClass(0.3, 2_500, 12_500), LinkClass(0.2, 12_500, 12_500))
FIBRE = (LinkClass(1.0, 12_500, 12_500),)
RADIO = (LinkClass(0.5, 1_250, 6_250, loss=0.02), LinkClass(0.5, 12_500, 12_500))

FULL = NetworkModel(
    loss=0.05,
    regions="world",
    links=RADIO,
    behind_nat=0.4,
    symmetric_nat=0.2,
    partitions=(
        Partition(0, 5_000, num_hosts=3),
        Partition(2_000, 9_000, share=0.5),
        Partition(0, 1, regions=("europe",)),
    ),
)

MODELS = {
    "plain": NetworkModel(),
    "lossy": NetworkModel(loss=0.2, bytes_per_ms=100),
    "world": NetworkModel(regions="world"),
    "full": FULL,
    "gossip": msgspec.structs.replace(FULL, gossip=Gossip(degree=6)),
}


def make_network(model: NetworkModel, num_hosts: int, seed: object = 1) -> Network:
    validate_network_model(model, num_hosts)
    return Network(model, num_hosts, GENESIS_MS, Random(str(seed)))


def flatten(wave: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    return [(delay_ms, host) for delay_ms, hosts in wave for host in hosts]


# --- waves


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 60), st.integers(0, 10_000), st.data())
def test_a_wave_reaches_each_target_once_at_most_in_order_and_not_across_a_cut(
    name: str, num_hosts: int, after_ms: int, data: st.DataObject
) -> None:
    network = make_network(MODELS[name], max(num_hosts, 4))
    targets = data.draw(st.lists(st.integers(0, num_hosts - 1), unique=True))
    now_ms = Millis(GENESIS_MS + after_ms)
    wave = network.draw_wave(0, targets, 500, now_ms)
    reached = [host for _, host in flatten(wave)]
    assert set(reached) <= set(targets)
    assert len(set(reached)) == len(reached)
    delays = [delay_ms for delay_ms, _ in wave]
    assert delays == sorted(set(delays))
    assert all(delay_ms % MODELS[name].quantum_ms == 0 and delay_ms > 0 for delay_ms in delays)
    assert all(hosts for _, hosts in wave)
    assert not any(network.is_cut(0, host, now_ms) for host in reached)
    if name in ("plain", "world"):
        assert set(reached) == set(targets)


@pytest.mark.parametrize("name", ["plain", "lossy", "world", "full"])
def test_a_wave_is_spread_as_single_messages_are(name: str) -> None:
    # What is sent straight must punch holes: gossip need not.
    model = msgspec.structs.replace(MODELS[name], partitions=(), quantum_ms=1, behind_nat=0.0, symmetric_nat=0.0)
    num_hosts, num_draws, num_bytes = 40, 300, 20_000
    network = make_network(model, num_hosts)
    others = np.arange(1, num_hosts)
    by_wave = [pair for _ in range(num_draws) for pair in flatten(network.draw_wave(0, others, num_bytes, GENESIS_MS))]
    singly: list[tuple[int, int]] = []
    for number in range(num_draws):
        together = network.draw_delays(0, others, num_bytes, GENESIS_MS) if number % 2 else None
        drawn = (
            zip(together, range(1, num_hosts), strict=True)
            if together
            else ((network.draw_delay(0, host, num_bytes, GENESIS_MS), host) for host in range(1, num_hosts))
        )
        singly += [(delay_ms, host) for delay_ms, host in drawn if delay_ms is not None]
    expected = num_draws * (num_hosts - 1)
    assert abs(len(by_wave) - len(singly)) <= 0.02 * expected
    for host in (1, 17, 39):
        left = np.sort([delay_ms for delay_ms, target in by_wave if target == host])
        right = np.sort([delay_ms for delay_ms, target in singly if target == host])
        assert left[0] == pytest.approx(right[0], abs=12)
        assert left[-1] == pytest.approx(right[-1], abs=12)
        assert np.mean(left) == pytest.approx(np.mean(right), abs=15)  # of 180 ms width: four standard errors


@pytest.mark.parametrize(("latency_ms", "delay_ms"), [(0, 10), (4, 10), (14, 10), (15, 20), (41, 40), (46, 50)])
@pytest.mark.parametrize("num_hosts", [4, 40])
def test_a_receiver_is_put_to_the_nearest_quantum_after_now(latency_ms: int, delay_ms: int, num_hosts: int) -> None:
    network = make_network(NetworkModel(latency_ms=(latency_ms, latency_ms), quantum_ms=10), num_hosts)
    targets = list(range(num_hosts - 1, 0, -1))
    assert network.draw_wave(0, targets, 100, GENESIS_MS) == [(delay_ms, targets)]
    assert network.draw_wave(0, [], 100, GENESIS_MS) == []


def test_the_quantum_makes_waves_neither_slower_nor_faster_on_average() -> None:
    model = NetworkModel(regions="world")
    network = make_network(model, 400)
    others = np.arange(1, 400)
    sums = [0, 0]
    for _ in range(30):
        sums[0] += sum(delay_ms for delay_ms, _ in flatten(network.draw_wave(0, others, 100, GENESIS_MS)))
        sums[1] += sum(delay_ms or 0 for delay_ms in network.draw_delays(0, others, 100, GENESIS_MS))
    assert abs(sums[0] - sums[1]) / 30 / 399 < 1.0


def test_delays_of_minutes_are_kept_in_order_too() -> None:
    network = make_network(NetworkModel(latency_ms=(1_000, 300_000), quantum_ms=1), 200)
    wave = network.draw_wave(0, range(1, 200), 100, GENESIS_MS)
    delays = [delay_ms for delay_ms, _ in wave]
    assert delays == sorted(set(delays))
    assert delays[0] < 65_536 < delays[-1]
    assert sorted(host for _, host in flatten(wave)) == list(range(1, 200))


def test_loss_is_as_given_by_network_and_link() -> None:
    links = (LinkClass(0.5, 1_000, 1_000, loss=0.1), LinkClass(0.5, 1_000, 1_000))
    network = make_network(NetworkModel(loss=0.2, links=links), 2_000)
    others = np.arange(1, 2_000)
    heard = sum(len(flatten(network.draw_wave(0, others, 9, GENESIS_MS))) for _ in range(10)) / len(others) / 10
    mine = 0.9 if network.get_link(0) == links[0] else 1.0
    assert heard == pytest.approx(0.8 * mine * 0.95, abs=0.02)


def test_a_seed_decides_every_draw_on_every_machine() -> None:
    def draw_trace(name: str) -> str:
        network, digest = make_network(MODELS[name], 50), sha256()
        for number in range(5):
            now_ms = Millis(GENESIS_MS + 1_500 * number)
            wave = network.draw_wave(number, [host for host in range(50) if host != number], 700, now_ms)
            straight = network.draw_delay(number, 9, 700, now_ms), network.draw_transfer(number, 9, 70_000, now_ms)
            digest.update(
                repr((wave, straight, network.draw_transfers(range(1, 20), 0, [9_000] * 19, now_ms))).encode()
            )
        return digest.hexdigest()[:16]

    drawn = {name: draw_trace(name) for name in MODELS}
    assert drawn == {name: draw_trace(name) for name in MODELS}
    assert len(set(drawn.values())) == len(MODELS)
    assert drawn == PINNED


# Drawn on Linux, x86-64: wherever this differs, a seed does not replay.
PINNED = {
    "plain": "217baf91bff344d6",
    "lossy": "41e95ba5eeba4819",
    "world": "d0aa194a5f551a89",
    "full": "bdba3e81517c1183",
    "gossip": "dee19f24c52b40c2",
}


# --- who can reach whom


def test_hosts_are_dealt_by_their_shares() -> None:
    network = make_network(FULL, 1_000)
    of = [network.get_region(index) for index in range(1_000)]
    assert {name: of.count(name) for name in WORLD.names} == {
        "north_america": 332,
        "europe": 499,
        "south_america": 9,
        "asia_pacific": 118,
        "japan": 23,
        "australia": 19,
    }
    assert [network.get_utc_hours()[index] for index in range(3)] == [
        WORLD.utc_hours[WORLD.names.index(name)] for name in of[:3]
    ]
    nats = [network.get_nat(index) for index in range(1_000)]
    assert [nats.count(nat) for nat in NATS] == [400, 400, 200]


def test_hosts_behind_nats_meet_by_hole_punching_in_a_share_of_pairs_that_stays() -> None:
    network = make_network(NetworkModel(latency_ms=(7, 7), behind_nat=0.5, symmetric_nat=0.2), 200)
    nats = [network.get_nat(index) for index in range(200)]
    met: dict[frozenset[str], list[bool]] = {}
    for left, right in itertools.combinations(range(200), 2):
        can_meet = network.can_meet(left, right)
        assert network.can_meet(right, left) == can_meet
        met.setdefault(frozenset((nats[left], nats[right])), []).append(can_meet)
    shares = {pair: np.mean(found) for pair, found in met.items()}
    for pair, share in shares.items():
        assert share == (1 if "open" in pair else 0 if pair == {"symmetric"} else pytest.approx(0.7, abs=0.02))
    assert len(shares) == 6


def test_a_punched_hole_costs_one_more_round_trip() -> None:
    network = make_network(NetworkModel(latency_ms=(7, 7), behind_nat=0.5), 40)
    hidden = [index for index in range(40) if network.get_nat(index) != "open"]
    sources = [index for index in range(40) if index != hidden[0]]
    expected = [None if not network.can_meet(index, hidden[0]) else 14 if index in hidden else 7 for index in sources]
    assert {None, 7, 14} == set(expected)
    assert network.draw_delays(hidden[0], sources, 100, GENESIS_MS) == expected
    assert network.draw_transfers(sources, hidden[0], [100] * 39, GENESIS_MS) == expected
    assert [network.draw_delay(index, hidden[0], 100, GENESIS_MS) for index in sources] == expected
    assert [network.draw_transfer(index, hidden[0], 100, GENESIS_MS) for index in sources] == expected
    assert len(flatten(network.draw_wave(hidden[0], sources, 100, GENESIS_MS))) == 39  # gossip goes round by others


def test_two_behind_symmetric_nats_exchange_nothing_straight_but_each_does_with_others() -> None:
    network = make_network(NetworkModel(symmetric_nat=0.5), 40)
    hidden = [index for index in range(40) if network.get_nat(index) == "symmetric"]
    sources = [index for index in range(40) if index != hidden[0]]
    expected = [None if index in hidden else True for index in sources]
    assert len(hidden) == 20
    drawn = network.draw_transfers(sources, hidden[0], [1_000] * 39, GENESIS_MS)
    assert [delay_ms and True for delay_ms in drawn] == expected
    single = [network.draw_transfer(source, hidden[0], 1_000, GENESIS_MS) for source in sources]
    assert [delay_ms and True for delay_ms in single] == expected
    assert network.draw_delay(hidden[1], hidden[0], 10, GENESIS_MS) is None


def test_several_partitions_cut_by_number_by_share_and_by_region() -> None:
    network = make_network(FULL, 200)
    hosts = range(200)
    assert [network.is_cut(0, host, Millis(GENESIS_MS + 1_000)) for host in hosts] == [host >= 3 for host in hosts]
    apart = [network.is_cut(0, host, Millis(GENESIS_MS + 8_000)) for host in hosts]
    assert sum(apart) == 100
    is_european = [network.get_region(host) == "europe" for host in hosts]
    first = [network.is_cut(0, host, GENESIS_MS) for host in hosts]
    assert first == [(host >= 3) or is_european[host] != is_european[0] for host in hosts]
    heard = make_network(msgspec.structs.replace(FULL, loss=0, links=()), 200).draw_delays(
        0, hosts, 100, Millis(GENESIS_MS + 8_000)
    )
    assert [delay_ms is None for delay_ms in heard] == apart
    assert not any(network.is_cut(0, host, Millis(GENESIS_MS + 9_000)) for host in hosts)
    assert not any(network.is_cut(0, host, Millis(GENESIS_MS - 1)) for host in hosts)


def test_bridges_reach_both_sides_of_a_partition() -> None:
    part = Partition(0, 9_000, hosts=(3, 5), bridges=(0, 7))
    network = make_network(NetworkModel(partitions=(part,)), 9)
    cut = {(a, b) for a in range(9) for b in range(9) if network.is_cut(a, b, GENESIS_MS)}
    inside, outside = {3, 5}, {1, 2, 4, 6, 8}
    assert cut == {(a, b) for a in range(9) for b in range(9) if {a, b} & inside and {a, b} & outside}
    heard = network.draw_delays(3, range(9), 100, GENESIS_MS)
    assert [delay_ms is not None for delay_ms in heard] == [host in (0, 3, 5, 7) for host in range(9)]


# --- payloads

transfers = st.lists(
    st.tuples(st.integers(0, 3_000), st.integers(0, 4), st.integers(0, 4), st.integers(0, 200_000)), max_size=40
).map(sorted)


@settings(max_examples=40, deadline=None)
@given(transfers, st.integers(0, 99))
def test_no_link_carries_more_than_its_bandwidth(asked: list[tuple[int, int, int, int]], seed: int) -> None:
    network = make_network(NetworkModel(latency_ms=(0, 0), links=HOME), 5, seed)
    done = []
    for after_ms, source, target, num_bytes in asked:
        delay_ms = network.draw_transfer(source, target, num_bytes, Millis(GENESIS_MS + after_ms))
        assert delay_ms is not None
        done.append((after_ms, after_ms + delay_ms, source, target, num_bytes))
    for host in range(5):
        link = network.get_link(host)
        for side, rate in ((2, link.up_bytes_per_ms), (3, link.down_bytes_per_ms)):
            mine = [transfer for transfer in done if transfer[side] == host]
            for begin_ms in {transfer[0] for transfer in mine}:
                for end_ms in {transfer[1] for transfer in mine}:
                    carried = sum(row[4] for row in mine if begin_ms <= row[0] and row[1] <= end_ms)
                    assert carried <= rate * max(0, end_ms - begin_ms)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 39), st.integers(0, 200_000)), max_size=30), st.integers(0, 2))
def test_payloads_asked_for_at_once_take_as_long_as_one_after_the_other(
    asked: list[tuple[int, int]], which: int
) -> None:
    model = NetworkModel(latency_ms=(7, 7), links=((), HOME, FIBRE)[which])
    left, right = make_network(model, 40), make_network(model, 40)
    for _ in range(2):
        sources, sizes = [source for source, _ in asked], [num_bytes for _, num_bytes in asked]
        together = left.draw_transfers(sources, 0, sizes, GENESIS_MS)
        assert together == [right.draw_transfer(source, 0, size, GENESIS_MS) for source, size in asked]


def test_a_payload_alone_takes_its_bytes_at_the_slower_of_two_links() -> None:
    links = (LinkClass(0.5, 1_000, 4_000), LinkClass(0.5, 8_000, 2_000))
    network = make_network(NetworkModel(latency_ms=(10, 10), links=links), 2)
    slow = 0 if network.get_link(0) == links[0] else 1
    assert network.draw_transfer(slow, 1 - slow, 100_000, GENESIS_MS) == 10 + 100
    assert network.draw_transfer(1 - slow, slow, 100_000, GENESIS_MS) == 10 + 25
    assert network.draw_transfer(slow, 1 - slow, 100_000, GENESIS_MS) == 10 + 200  # behind the first


def share_fairly(flows: list[tuple[int, int, int, int]], up: list[int], down: list[int]) -> list[float]:
    """When each of (start [ms], source, target, bytes) ends where links are shared max-min fairly at every moment."""
    rest = [float(flow[3]) for flow in flows]
    ends = [0.0] * len(flows)
    todo, now = set(range(len(flows))), 0.0
    while todo:
        live = sorted(flow for flow in todo if flows[flow][0] <= now)
        rates = fill(live, flows, up, down)
        moments = [flows[flow][0] - now for flow in todo if flows[flow][0] > now]
        step = min([*moments, *(rest[flow] / rates[flow] for flow in live)])
        now += step
        for flow in live:
            rest[flow] -= rates[flow] * step
            if rest[flow] < 1e-3:
                ends[flow] = now
                todo.discard(flow)
    return ends


def fill(live: list[int], flows: list[tuple[int, int, int, int]], up: list[int], down: list[int]) -> dict[int, float]:
    """Max-min fair rates by progressive filling."""
    left: dict[Any, float] = {("up", host): float(rate) for host, rate in enumerate(up)}
    left |= {("down", host): float(rate) for host, rate in enumerate(down)}
    rates: dict[int, float] = {}
    while len(rates) < len(live):
        users: dict[Any, list[int]] = {}
        for flow in live:
            if flow not in rates:
                users.setdefault(("up", flows[flow][1]), []).append(flow)
                users.setdefault(("down", flows[flow][2]), []).append(flow)
        tight = min(users, key=lambda link: left[link] / len(users[link]))
        share = left[tight] / len(users[tight])
        for flow in users[tight]:
            rates[flow] = share
            left["up", flows[flow][1]] -= share
            left["down", flows[flow][2]] -= share
    return rates


@pytest.mark.parametrize(("spread_ms", "least"), [(4_000, 0.75), (400, 0.65), (0, 0.45)])
def test_links_in_turn_are_near_to_links_shared_fairly(spread_ms: int, least: float) -> None:
    """The last payload of all is there at the same time; a host's own last one is early, by half at the very worst:
    when all ask for all in one moment, the first to ask is served first."""
    num_hosts, rng = 10, Random(spread_ms)
    network = make_network(NetworkModel(latency_ms=(0, 0), links=HOME), num_hosts)
    flows = [
        (rng.randint(0, spread_ms), source, target, rng.randint(50_000, 150_000))
        for target in range(num_hosts)
        for source in range(num_hosts)
        if source != target
    ]
    flows.sort(key=lambda flow: flow[0])
    ends = []
    for start_ms, source, target, num_bytes in flows:
        delay_ms = network.draw_transfer(source, target, num_bytes, Millis(GENESIS_MS + start_ms))
        assert delay_ms is not None
        ends.append(start_ms + delay_ms)
    links = [network.get_link(host) for host in range(num_hosts)]
    fair = share_fairly(flows, [link.up_bytes_per_ms for link in links], [link.down_bytes_per_ms for link in links])
    assert max(ends) == pytest.approx(max(fair), rel=0.05)

    def compute_last(moments: list[Any]) -> float:
        return sum(
            max(moment for moment, flow in zip(moments, flows, strict=True) if flow[2] == host)
            for host in range(num_hosts)
        )

    assert least <= compute_last(ends) / compute_last(fair) <= 1.05


# --- gossip


def flood_exactly(
    network: Network, source: int, num_hosts: int, gossip: Gossip, num_bytes: int, rng: Random
) -> list[int]:
    """Arrivals [ms] of one message at all but its source, by Dijkstra's algorithm: a mesh, every link drawn singly."""
    neighbours: list[list[int]] = [[] for _ in range(num_hosts)]
    for _ in range(gossip.degree // 2):
        order = rng.sample(range(num_hosts), num_hosts)
        for left, right in zip(order, order[1:] + order[:1], strict=True):
            neighbours[left].append(right)
            neighbours[right].append(left)
    arrivals: dict[int, int] = {}
    heap = [(0, source)]
    while heap:
        now, host = heapq.heappop(heap)
        if host in arrivals:
            continue
        arrivals[host] = now
        rng.shuffle(neighbours[host])
        for turn, other in enumerate(neighbours[host]):
            delay_ms = network.draw_delay(host, other, 0, GENESIS_MS)
            if delay_ms is not None:
                sent_ms = (turn + 1) * num_bytes // network.get_link(host).up_bytes_per_ms
                heapq.heappush(heap, (now + delay_ms + gossip.forward_ms + sent_ms, other))
    return [moment for moment in arrivals.values() if moment]


@pytest.mark.parametrize("name", ["plain", "world", "lossy links"])
@pytest.mark.parametrize("num_bytes", [300, 30_000])
def test_a_broadcast_over_hops_arrives_as_in_a_flood_of_the_whole_mesh(name: str, num_bytes: int) -> None:
    gossip, num_hosts, rng = Gossip(degree=8), 400, Random(name)
    model = {
        "plain": NetworkModel(gossip=gossip),
        "world": NetworkModel(gossip=gossip, regions="world"),
        "lossy links": NetworkModel(gossip=gossip, regions="world", links=RADIO, loss=0.3),
    }[name]
    network = make_network(msgspec.structs.replace(model, quantum_ms=1), num_hosts)
    exact, drawn = [], []
    for _ in range(20):
        source = rng.randrange(num_hosts)
        exact += flood_exactly(network, source, num_hosts, gossip, num_bytes, rng)
        others = [host for host in range(num_hosts) if host != source]
        drawn += [delay_ms for delay_ms, _ in flatten(network.draw_wave(source, others, num_bytes, GENESIS_MS))]
    assert len(drawn) == pytest.approx(len(exact), rel=0.02)
    shares = np.linspace(0.01, 0.99, 99)
    apart_ms = np.abs(np.quantile(drawn, shares) - np.quantile(exact, shares)).mean()
    assert apart_ms <= 0.15 * np.mean(exact)  # 2 % to 7 % as a rule, much of it the exact one's chance


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 70), st.sampled_from([2, 4, 8]), st.integers(0, 1 << 32))
def test_a_flood_without_loss_reaches_every_host_at_the_earliest(num_hosts: int, degree: int, seed: int) -> None:
    bits = np.random.PCG64(seed)
    mesh = draw_mesh(num_hosts, degree, bits)
    link_ms = (bits.random_raw(mesh.size) % np.uint64(90)).astype(np.int64).reshape(mesh.shape) + 10
    arrivals = compute_flood(mesh, link_ms, 0)
    heard = (arrivals[mesh] + link_ms).min(axis=0)
    assert arrivals[0] == 0
    assert (arrivals[1:] == heard[1:]).all()
    assert (arrivals < NEVER_MS).all()


def test_a_larger_mesh_takes_longer_and_hops_come_through_loss() -> None:
    network = make_network(NetworkModel(gossip=Gossip(), latency_ms=(50, 100), loss=0.2), 4_000)
    means = []
    for num_targets in (8, 100, 3_999):
        pairs = flatten(network.draw_wave(0, np.arange(1, num_targets + 1), 300, GENESIS_MS))
        assert len(pairs) >= 0.98 * num_targets - 1
        means.append(sum(delay_ms for delay_ms, _ in pairs) / len(pairs))
    assert 55 <= means[0] < means[1] < means[2] < 600


# --- scenarios


def test_a_network_is_read_from_toml() -> None:
    text = b"""
        loss = 0.01
        behind_nat = 0.5
        links = [
            { share = 0.7, up_bytes_per_ms = 2500, down_bytes_per_ms = 12500, loss = 0.01 },
            { share = 0.3, up_bytes_per_ms = 125000, down_bytes_per_ms = 125000 },
        ]
        partitions = [{ start_ms = 0, end_ms = 60000, regions = ["east"] }]
        gossip = { degree = 6 }
        [regions]
        names = ["east", "west"]
        shares = [0.25, 0.75]
        latency_ms = [[10, 80], [85, 12]]
        jitter = 0.5
    """
    model = msgspec.toml.decode(text, type=NetworkModel)
    network = make_network(model, 8)
    assert [network.get_region(host) for host in range(8)].count("east") == 2
    assert get_regions(msgspec.toml.decode(b'regions = "world"', type=NetworkModel)) == WORLD


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (NetworkModel(latency_ms=(5, 4)), "latency_ms"),
        (NetworkModel(loss=1.5), "loss"),
        (NetworkModel(quantum_ms=0), "quantum_ms"),
        (NetworkModel(behind_nat=0.6, symmetric_nat=0.6), "symmetric_nat"),
        (NetworkModel(regions=Regions(("a",), (1.0,), ((1, 2),))), "columns"),
        (NetworkModel(regions=Regions(("a", "b"), (0.5, 0.2), ((1, 2), (2, 1)))), "sum"),
        (NetworkModel(links=(LinkClass(1.0, 0, 5),)), "up_bytes_per_ms"),
        (NetworkModel(links=(LinkClass(0.3, 5, 5),)), "sum"),
        (NetworkModel(gossip=Gossip(degree=5)), "degree"),
        (NetworkModel(partitions=(Partition(0, 9),)), "one of"),
        (NetworkModel(partitions=(Partition(0, 9, hosts=(1,), num_hosts=1),)), "one of"),
        (NetworkModel(partitions=(Partition(0, 9, hosts=(10_000,)),)), "partitions.hosts"),
        (NetworkModel(partitions=(Partition(0, 9, num_hosts=1, bridges=(-1,)),)), "partitions.bridges"),
        (NetworkModel(partitions=(Partition(9, 0, share=0.5),)), "start_ms"),
        (NetworkModel(partitions=(Partition(9, 9, share=0.5),)), "start_ms"),
        (NetworkModel(partitions=(Partition(0, 9, num_hosts=10),)), "hosts on both sides"),
        (NetworkModel(partitions=(Partition(0, 9, share=0.04),)), "hosts on both sides"),
        (NetworkModel(partitions=(Partition(0, 9, share=1),)), "hosts on both sides"),
        (NetworkModel(partitions=(Partition(0, 9, hosts=(1, 2), bridges=(1, 2)),)), "hosts on both sides"),
        (NetworkModel(regions="world", partitions=(Partition(0, 9, regions=("japan",)),)), "hosts on both sides"),
        (NetworkModel(partitions=(Partition(0, 9, regions=("mars",)),)), "mars"),
    ],
)
def test_a_network_that_cannot_be_is_refused_by_name(model: NetworkModel, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        validate_network_model(model, 10)
