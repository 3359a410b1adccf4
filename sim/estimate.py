"""What a run will need, told before it starts: memory and CPU time by learner, peers and rounds. Knows no World.

A peer costs something by itself and something for all that it hears of and keeps: with a seat, every peer of its shard,
and every shard whose payload it pulls. The coefficients are fits to runs on one machine; `bench/estimate.py` measures
them again.
"""

from pathlib import Path

import msgspec
import psutil

from p2pfm.errors import ConfigError
from p2pfm.protocol.shards import FOLLOWED_MAX
from sim.scenarios import LearnerModel, Scenario, compute_kinds, make_network

MEMORY_SHARE_MAX = 0.9
"""Of the free memory, what a run may take; the rest is for the report and for whoever else is here."""


class Cost(msgspec.Struct, frozen=True):
    """What a learner's runs cost."""

    base_bytes: float
    """The interpreter, libraries, data and models that all peers share."""
    peer_bytes: float
    pair_bytes: float
    """For every peer of its shard, and every shard, that a peer hears of (`compute_pairs`)."""
    round_bytes: float
    """What a round leaves behind, for each peer."""
    peer_s: float
    """CPU time a round."""
    pair_s: float
    """CPU time a round, for the same."""


COSTS: dict[str, Cost] = {
    "digests": Cost(8.0e7, 3.5e4, 1.1e3, 5.0e3, 0.0005, 1.6e-5),
    "convex": Cost(8.0e7, 2.3e4, 1.1e3, 8.5e3, 0.0042, 2.6e-5),
    "mlp": Cost(3.6e8, 7.8e5, 3.4e3, 2.7e4, 0.0196, 2.6e-5),
    "mlp modelled": Cost(3.6e8, 7.8e5, 3.4e3, 2.7e4, 0.0008, 9e-5),
    "lora": Cost(5.2e8, 8e5, 1.1e3, 1.7e5, 0.2, 0.0),
}
"""Measured by bench/estimate.py with 8 to 1,000 peers and 3 to 24 rounds, and by bench/simulator.py with up to 10,000,
on one core (Python 3.11, torch 2.13) in 2026-11. Lora was measured up to 96 peers."""


EVM_PEER_S, EVM_ROUND_S = 0.25, 0.1
"""CPU time of a real EVM for a peer's joining and claims, and for a round: 5 to 40 peers, 2 and 6 rounds."""

LOG_PAIR_BYTES, LOG_PAIR_S = 6.2e3, 1.7e-5
"""What an event log holds, and the CPU time of writing it, for whom its peer hears of, a round: 20 to 100 peers."""

FLOOD_S, FLOOD_FAR_S = 1.2e-3, 1.2e-4
"""CPU time of what a spammer says in a minute, for each peer of its shard, and for each of another: of 24 to 600 peers
5 to 20 spammers."""

FLOOD_LOG_BYTES, FLOOD_LOG_S = 1.0e6, 2.4e-3
"""What that is in the event log of any peer, and the CPU time of writing it."""


class Estimate(msgspec.Struct, frozen=True):
    """What a scenario will take, within a factor of about two."""

    memory_bytes: float
    cpu_s: float


def compute_estimate(scenario: Scenario) -> Estimate:
    """Memory and CPU time of a run of this scenario."""
    learner, num_peers = scenario.learner, scenario.num_peers
    cost = COSTS.get(f"{learner.kind} {learner.codec}", COSTS[learner.kind])
    chain_s = EVM_PEER_S * num_peers + EVM_ROUND_S * scenario.num_rounds if scenario.ledger == "evm" else 0.0
    num_pairs = compute_pairs(num_peers, scenario.shard_size, make_network(scenario).scoring.committee_size)
    num_heard, num_far = compute_floods(scenario)
    logged_share = sum(index < num_peers for index in scenario.keep_logs) / num_peers
    log_bytes = logged_share * (LOG_PAIR_BYTES * num_pairs + FLOOD_LOG_BYTES * (num_heard + num_far))
    log_s = logged_share * (LOG_PAIR_S * num_pairs + FLOOD_LOG_S * (num_heard + num_far))
    flood_s = FLOOD_S * num_heard + FLOOD_FAR_S * num_far
    round_s = cost.peer_s * num_peers + cost.pair_s * num_pairs + flood_s + log_s
    return Estimate(
        memory_bytes=cost.base_bytes
        + cost.peer_bytes * num_peers
        + cost.pair_bytes * num_pairs
        + (cost.round_bytes * num_peers + log_bytes) * scenario.num_rounds,
        cpu_s=round_s * scenario.num_rounds + chain_s,
    )


def compute_pairs(num_peers: int, shard_size: int, committee_size: int) -> int:
    """Of whom all peers together hear: everybody of everybody; where there are shards a committee of its own shard, and
    who follows by the shards' payloads of all shards.
    """
    num_shards = -(-num_peers // shard_size)
    if num_shards == 1:
        return num_peers**2
    members = -(-num_peers // num_shards)
    num_seats = num_shards * min(committee_size, members)
    num_followers = num_peers if num_shards <= FOLLOWED_MAX else num_seats
    return num_seats * members + num_followers * num_shards


def compute_floods(scenario: Scenario) -> tuple[float, float]:
    """Pairs of a spammer and a hearer, of its own shard and of others, times the minutes of a round."""
    num_spammers = compute_kinds(scenario).count("spammer")
    num_shards = -(-scenario.num_peers // scenario.shard_size)
    members = scenario.num_peers / num_shards
    minutes = sum(msgspec.structs.astuple(scenario.phases)) / 60_000
    return num_spammers * members * minutes, num_spammers * (scenario.num_peers - members) * minutes


def validate_memory(scenario: Scenario, free_bytes: float) -> Estimate:
    """Refuse a run that would not fit into the memory that is free.

    Raises:
        ConfigError: tells what it needs, what there is, and what to change.
    """
    estimate = compute_estimate(scenario)
    if estimate.memory_bytes <= MEMORY_SHARE_MAX * free_bytes:
        return estimate
    advice = f"at most {_find_peers_max(scenario, free_bytes):,} peers fit"
    if scenario.learner.kind != "digests":
        light = msgspec.structs.replace(scenario, learner=LearnerModel(kind="digests"))
        if compute_estimate(light).memory_bytes <= MEMORY_SHARE_MAX * free_bytes:
            advice += ', and learner.kind = "digests" would fit as it is'
    raise ConfigError(
        f"not enough memory: {scenario.num_peers:,} peers with learner {scenario.learner.kind} need about "
        f"{estimate.memory_bytes / 1e9:.1f} GB, of {free_bytes / 1e9:.1f} GB free {MEMORY_SHARE_MAX:.0%} may be used; "
        f"{advice}"
    )


def get_free_bytes() -> float:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    free = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
        return free if limit == "max" else min(free, float(limit) - float(used))
    except OSError:
        return free  # no control group of the second version: the machine's figure holds


def describe(estimate: Estimate) -> str:
    """For people."""
    minutes = estimate.cpu_s / 60
    span = (
        f"{estimate.cpu_s:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )
    return f"about {span} of CPU time and {estimate.memory_bytes / 1e9:.1f} GB of memory"


def _find_peers_max(scenario: Scenario, free_bytes: float) -> int:
    low, high = 0, scenario.num_peers
    while low < high:
        middle = (low + high + 1) // 2
        needed = compute_estimate(msgspec.structs.replace(scenario, num_peers=middle)).memory_bytes
        low, high = (middle, high) if needed <= MEMORY_SHARE_MAX * free_bytes else (low, middle - 1)
    return low
