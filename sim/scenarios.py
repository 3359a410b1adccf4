"""What a simulated run is: who takes part, what the network does to them, and the rules that they agree on.

Knows no peer; a Scenario and nothing else decides a run, to the last byte of its trace.
"""

from collections import Counter
from fractions import Fraction
from math import floor
from random import Random
from typing import Literal, NamedTuple

import msgspec

from p2pfm.config import (
    GOSSIP_BYTES_MAX,
    WEI_PER_PFM,
    ChainConfig,
    CompressionConfig,
    LimitConfig,
    NetworkConfig,
    PhaseConfig,
    ScoringConfig,
    SettlementConfig,
    validate_network,
)
from p2pfm.errors import ConfigError
from p2pfm.types import Millis, Wei, compute_digest
from sim.churn import ChurnModel, validate_churn_model
from sim.clocks import ClockModel, validate_clock_model
from sim.network import NetworkModel, validate_network_model

PEERS_MAX = 14_000
"""Two levels of shards reach so many, and one message must hold a leaf for each."""

SHARD_SIZE_MAX = 128
"""Peers that hear each other's every word: the protocol's bound (ALGORITHMS, part 1)."""

COMMITTEE_SIZE = 9
"""Members of a committee where a scenario does not say."""

COMMITTEE_SIZE_MAX = 128
"""The protocol's bound (see `p2pfm.config`)."""

AdversaryKind = Literal[
    "zero",
    "replay",
    "noisy_replay",
    "sign_flip",
    "boosted",
    "noise",
    "gaussian",
    "copycat",
    "skipper",
    "liar",
    "equivocator",
    "two_faced",
    "silent",
    "withholder",
    "late",
    "alie",
    "ipm",
    "minmax",
    "label_flip",
    "backdoor",
    "sybil",
    "latecomer",
    "garbler",
    "forger",
    "thief",
    "late_reveal",
    "lazy",
    "colluder",
    "overpayer",
    "split_votes",
    "eclipse",
    "spammer",
    "untimely",
]
"""See `sim.faults`, which makes them."""


STAKE = Wei(100 * WEI_PER_PFM)
"""The least that a member stakes."""

STAKES_MAX = 10_000
"""Times the least."""


class WorkTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Virtual time that heavy work takes: least and greatest [ms]."""

    train_ms: tuple[int, int] = (3_000, 8_000)
    score_ms: tuple[int, int] = (1_000, 3_000)
    merge_ms: tuple[int, int] = (50, 200)
    evaluate_ms: tuple[int, int] = (50, 200)
    sign_ms: tuple[int, int] = (2, 10)
    aggregate_ms: tuple[int, int] = (5, 30)


class Outage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chain cannot be reached from `start_ms` to `end_ms` after genesis."""

    start_ms: int
    end_ms: int


class LearnerModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the peers learn, and how much of it is real.

    digests  no tensors: payloads are names, contributions are drawn. For the protocol alone, at 10,000 peers.
    convex   linear regression with a known optimum (`sim.learners.convex`).
    mlp      a 50,000-parameter classifier of handwritten digits, all peers' steps batched (`sim.learners.mlp`).
    lora     LoRA adapters on one shared transformer backbone, batched the same way (`sim.learners.lora`).
    """

    kind: Literal["digests", "convex", "mlp", "lora"] = "convex"
    batched: bool = True
    """Train the peers of a round together; False: one after the other, with the same result within 1e-5."""
    codec: Literal["real", "modelled"] = "real"
    """"modelled": updates are chosen and rounded as ever, but not coded: payloads weigh what their entropy says. The
    coder takes most of a small model's time."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    title: str = ""
    """One line for people."""
    seed: int = 1
    num_peers: int = 8
    """All participants, adversaries included."""
    num_rounds: int = 3
    learner: LearnerModel = LearnerModel()
    churn: ChurnModel = ChurnModel()
    network: NetworkModel = NetworkModel()
    clocks: ClockModel = ClockModel()
    adversaries: tuple[AdversaryKind, ...] = ()
    """One peer each, from the first peer on."""
    adversary_shares: dict[AdversaryKind, float] = {}
    """Share of all peers that is of a kind, beside `adversaries`; which ones is drawn from the seed."""
    are_attackers_honest: bool = False
    """All of them do honest work, with the stakes of what they would be: what an attack's harm is measured from."""
    stakes: dict[Literal["honest"] | AdversaryKind, float] = {}
    """What each peer of a kind stakes, in multiples of the least that the contract takes; 1 for kinds that stand not
    here. Stake draws committees, and is what slashing takes."""
    ledger: Literal["memory", "evm"] = "memory"
    """The contract's specification in memory, or the contract itself in a real EVM (slow: for small runs)."""
    outages: tuple[Outage, ...] = ()
    work: WorkTimes = WorkTimes()
    phases: PhaseConfig = PhaseConfig(
        train_ms=Millis(20_000),
        exchange_ms=Millis(10_000),
        score_ms=Millis(10_000),
        reveal_ms=Millis(5_000),
        attest_ms=Millis(8_000),
        merge_ms=Millis(7_000),
    )
    committee_size: int = 0
    """0: nine, or all peers where there are fewer. The chain's is drawn of all peers; a shard has one of its own, which
    is all of the shard where that has fewer."""
    shard_size: int = 128
    """More peers than this are dealt into shards, anew every epoch (ALGORITHMS, part 1)."""
    work_steps: int = 0
    """Proofs of computation: see `ScoringConfig`."""
    rounds_per_epoch: int = 1
    keep_logs: tuple[int, ...] = ()
    """Peers (by their number) whose event logs are kept, as a node keeps its own."""


class Rules(NamedTuple):
    """What a learner needs of a network's rules."""

    backbone: str
    compression: CompressionConfig
    duplicate_overlap: float = ScoringConfig().duplicate_overlap


RULES: dict[str, Rules] = {
    "digests": Rules("none", CompressionConfig()),
    # Half of all positions are kept: which ones tells little.
    "convex": Rules("linear regression", CompressionConfig(chunk=16, keep=8), 1.0),
    # One pass over a few digits moves the same hidden units of whoever has the same classes.
    "mlp": Rules("perceptron on digits", CompressionConfig(), 1.0),
    "lora": Rules("tiny", CompressionConfig()),
}
"""By `LearnerModel.kind`."""


def validate_scenario(scenario: Scenario) -> None:
    """Refuse what cannot run.

    Raises:
        ConfigError: names the field, what is allowed, and what it was.
    """
    num_peers, shard_size = scenario.num_peers, scenario.shard_size
    checks: tuple[tuple[str, float, float, float], ...] = (
        ("shard_size", shard_size, 2, SHARD_SIZE_MAX),
        ("num_rounds", scenario.num_rounds, 1, 100_000),
        ("seed", scenario.seed, 0, 2**63 - 1),
    )
    for key, value, low, high in checks:
        if not low <= value <= high:
            raise ConfigError(f"scenario {key}: expected {low:,} to {high:,}, got {value:,}")
    peers_max = min(PEERS_MAX, shard_size**2)
    if not 1 <= num_peers <= peers_max:
        hint = f" (two levels of shards of {shard_size}: raise shard_size)" if peers_max < PEERS_MAX else ""
        raise ConfigError(f"scenario num_peers: expected 1 to {peers_max:,}{hint}, got {num_peers:,}")
    committee_max = min(num_peers, COMMITTEE_SIZE_MAX)
    if not 0 <= scenario.committee_size <= committee_max:
        hint = "add peers or take" if num_peers < COMMITTEE_SIZE_MAX else "take"
        raise ConfigError(
            f"scenario committee_size: expected 0 to {committee_max}, got {scenario.committee_size}: {hint} a smaller "
            "committee"
        )
    _validate_times(scenario)
    validate_churn_model(scenario.churn)
    validate_clock_model(scenario.clocks)
    validate_network_model(scenario.network, scenario.num_peers)
    _validate_shares(scenario)
    num_named, num_drawn = len(scenario.adversaries), compute_counts(scenario).total()
    if num_named + num_drawn > num_peers:
        raise ConfigError(
            f"scenario adversaries: expected no more than the {num_peers} peers, got {num_named} by name and "
            f"{num_drawn} by adversary_shares: add peers or take fewer"
        )
    _validate_kinds(scenario)
    missing = [index for index in scenario.keep_logs if not 0 <= index < num_peers]
    if missing:
        raise ConfigError(
            f"scenario keep_logs: expected numbers of peers, 0 to {num_peers - 1}, got {missing[0]}: add peers or "
            "leave it out"
        )
    for kind, stake in scenario.stakes.items():
        if not 1 <= stake <= STAKES_MAX:
            raise ConfigError(f"scenario stakes.{kind}: expected 1 to {STAKES_MAX:,} times the least, got {stake:g}")
    validate_network(make_network(scenario))


def _validate_shares(scenario: Scenario) -> None:
    for kind, share in scenario.adversary_shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"scenario adversary_shares.{kind}: expected a share of 0 to 1, got {share:g}")
    shares = sum(map(_make_exact, scenario.adversary_shares.values()))
    if shares > 1:
        raise ConfigError(f"scenario adversary_shares: expected 1 at most for all together, got {float(shares):g}")


def _validate_kinds(scenario: Scenario) -> None:
    """Refuse a kind that nobody can be with this scenario's learner and rules."""
    kinds = {*scenario.adversaries, *compute_counts(scenario).elements()}
    if scenario.learner.kind == "convex" and "backdoor" in kinds:
        raise ConfigError(
            "scenario adversaries: expected kinds that the learner convex can be, got backdoor, and linear regression "
            "knows no triggers: take learner.kind mlp or lora"
        )
    if "skipper" in kinds and not scenario.work_steps and scenario.learner.kind != "digests":
        raise ConfigError(
            "scenario adversaries: expected proofs of computation for a skipper to skip, got work_steps of 0: --set "
            "work_steps=1, without which it is honest"
        )


def _validate_times(scenario: Scenario) -> None:
    for key, (low, high) in msgspec.structs.asdict(scenario.work).items():
        if not 0 <= low <= high:
            raise ConfigError(
                f"scenario work.{key}: expected the least time, 0 or more, and then the greatest, got [{low}, {high}]"
            )
    for number, outage in enumerate(scenario.outages):
        if not 0 <= outage.start_ms < outage.end_ms:
            raise ConfigError(
                f"scenario outages[{number}]: expected a start_ms of 0 or more and a later end_ms, got "
                f"{outage.start_ms} and {outage.end_ms}"
            )


def compute_counts(scenario: Scenario) -> Counter[AdversaryKind]:
    """How many peers of each kind its share comes to, beside those that are named one by one.

    Rounded together by largest remainder, of equal ones by name: many small shares come to as many peers as their sum.
    """
    exact = {kind: _make_exact(share) * scenario.num_peers for kind, share in sorted(scenario.adversary_shares.items())}
    counts = Counter({kind: floor(value) for kind, value in exact.items()})
    num_left = floor(sum(exact.values()) + Fraction(1, 2)) - counts.total()
    for kind in sorted(exact, key=lambda kind: counts[kind] - exact[kind])[:num_left]:
        counts[kind] += 1
    return counts


def _make_exact(share: float) -> Fraction:
    """The number that was written: its binary neighbour would make equal remainders differ."""
    return Fraction(str(share))


def compute_kinds(scenario: Scenario) -> tuple[AdversaryKind | None, ...]:
    """What each peer is, by its number; None: honest."""
    return (None,) * scenario.num_peers if scenario.are_attackers_honest else _draw_kinds(scenario)


def _draw_kinds(scenario: Scenario) -> tuple[AdversaryKind | None, ...]:
    drawn: list[AdversaryKind | None] = list(compute_counts(scenario).elements())
    drawn += [None] * (scenario.num_peers - len(scenario.adversaries) - len(drawn))
    Random(f"{scenario.seed} kinds").shuffle(drawn)
    return (*scenario.adversaries, *drawn)


def compute_stakes(scenario: Scenario) -> tuple[Wei, ...]:
    """What each peer stakes, by its number."""
    return tuple(Wei(int(STAKE * scenario.stakes.get(kind or "honest", 1))) for kind in _draw_kinds(scenario))


def make_network(scenario: Scenario) -> NetworkConfig:
    """The rules that the peers of a scenario agree on."""
    rules = RULES[scenario.learner.kind]
    return NetworkConfig(
        name=f"simulation {scenario.seed}",
        genesis_ms=Millis(1_000_000),
        backbone=rules.backbone,
        probe=compute_digest(b"p2pfm simulated probe" + scenario.seed.to_bytes(8, "big")).hex(),
        chain=ChainConfig(chain_id=31337, federation="0x" + "fe" * 20, token="0x" + "70" * 20),
        compression=rules.compression,
        phases=scenario.phases,
        scoring=ScoringConfig(
            committee_size=scenario.committee_size or min(COMMITTEE_SIZE, scenario.num_peers),
            duplicate_overlap=rules.duplicate_overlap,
            work_steps=scenario.work_steps,
        ),
        settlement=SettlementConfig(rounds_per_epoch=scenario.rounds_per_epoch, pool_per_epoch_pfm=100),
        limits=LimitConfig(
            peers_max=max(scenario.num_peers, scenario.shard_size),
            shard_peers_max=scenario.shard_size,
            message_bytes_max=GOSSIP_BYTES_MAX,
        ),
    )
