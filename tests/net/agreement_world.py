"""One network of eight, run twice: as real processes, and in the simulator with the same rules, peers and data.

Knows how each is started and read; judges nothing. What both tell is of the same kinds: certified proposals by round,
and every peer's event log.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from nodes.fleet import read_rounds
from nodes.homes import CONFIG_NAME, read_config
from nodes.linear import make_learner
from nodes.localnet import PRESETS, localnet
from p2pfm.config import NetworkConfig, PhaseConfig, ScoringConfig
from p2pfm.learner import Learner
from p2pfm.lora.samples import read_samples
from p2pfm.messages import Proposal
from p2pfm.protocol.events import AnyEvent, Received, Scored, Signed, Trained
from p2pfm.protocol.log import LogRecord, read_log
from p2pfm.protocol.phases import compute_round_start
from p2pfm.types import Millis, PeerId, Round
from sim.learners.convex import LinearLab, Problem
from sim.scenarios import LearnerModel, Scenario, WorkTimes
from sim.workshop import TensorWorkshop
from sim.world import World

NUM_PEERS = 8
NUM_ROUNDS = 3
PROBE_SAMPLES = 400
"""A stratum: all of the toy's probe, so that no evaluator's contributions depend on its own secret draw."""

TOY = replace(
    PRESETS["toy"],
    # All are on the committee: who is drawn first depends on the block in which it was drawn.
    scoring=ScoringConfig(committee_size=NUM_PEERS, samples_per_stratum=PROBE_SAMPLES, duplicate_overlap=1.0),
    # Long enough that eight processes on two cores, one of them busy with the chain, are never late.
    phases=PhaseConfig(
        train_ms=Millis(3_500),
        exchange_ms=Millis(2_000),
        score_ms=Millis(3_000),
        reveal_ms=Millis(1_500),
        attest_ms=Millis(2_500),
        merge_ms=Millis(1_500),
    ),
    startup_s=28,
)

WORK = WorkTimes(
    train_ms=(20, 200),
    score_ms=(20, 200),
    merge_ms=(5, 50),
    evaluate_ms=(5, 50),
)
"""As fast as a toy node is, so that the simulated phases suffice, too."""


@dataclass(frozen=True, slots=True)
class Telling:
    """What came of one run."""

    proposals: Mapping[Round, tuple[Proposal, ...]]
    """What any peer holds a certificate of; more than one of a round is a fork."""
    logs: Mapping[PeerId, tuple[LogRecord, ...]]


@dataclass(frozen=True, slots=True)
class Reality:
    """What the real run went by, and what came of it."""

    network: NetworkConfig
    peers: tuple[PeerId, ...]
    """In the registry's order, which is that in which they happened to join."""
    learners: tuple[Learner, ...]
    """Each peer's own, in the same order."""
    told: Telling


def run_for_real(folder: Path) -> Reality:
    """Eight processes, libp2p on loopback, a real EVM; ends after NUM_ROUNDS rounds."""
    with localnet(folder, ("honest",) * NUM_PEERS, TOY, print) as net:
        network = net.network
        end_s = (compute_round_start(network, Round(NUM_ROUNDS)) - network.genesis_ms) / 1000 + TOY.startup_s + 30

        def is_over() -> bool:
            told = [net.get_status(node).get("protocol", {}).get("certified_round") for node in net.nodes]
            return all(round is not None and round >= NUM_ROUNDS - 1 for round in told)

        net.wait_until(f"round {NUM_ROUNDS - 1} is certified", is_over, end_s)
        peers = tuple(member.peer for member in net.ledger.get_roster().members)
    homes = {PeerId(node.peer): node.home for node in net.nodes}
    configs = [read_config(homes[peer] / CONFIG_NAME) for peer in peers]
    learners = tuple(make_learner(config, read_samples(Path(config.data))) for config in configs)
    logs = {peer: tuple(_read_events(homes[peer] / "events")) for peer in peers}
    return Reality(network, peers, learners, Telling(read_rounds(net.nodes).proposals, logs))


def run_simulated(reality: Reality, learners: Sequence[Learner]) -> Telling:
    """The same network in virtual time: its rules, its peers' ids in their order in the registry, and these learners,
    one a peer in the same order."""
    scenario = Scenario(
        num_peers=NUM_PEERS,
        num_rounds=NUM_ROUNDS,
        committee_size=NUM_PEERS,
        phases=reality.network.phases,
        work=WORK,
        keep_logs=tuple(range(NUM_PEERS)),
    )
    lab = LinearLab(Problem(reality.network.adapter.seed), NUM_PEERS)
    workshop = TensorWorkshop(reality.network, LearnerModel(), lab, learners)
    world = World(scenario, config=reality.network, names=reality.peers, workshop=workshop)
    world.run()
    proposals = {round: (certificate.proposal,) for round, certificate in world.checks.certificates.items()}
    logs = {host.me: tuple(_read_parts(map(bytes, host.logs))) for host in world.hosts}
    return Telling(proposals, logs)


def get_content(proposal: Proposal) -> dict[str, object]:
    """What a certificate says of learning and pay, without who said so."""
    names = ("round", "base", "new_base", "prev_root", "root", "updates", "leaves")
    return {name: getattr(proposal, name) for name in names}


def measure_delays(network: NetworkConfig, told: Telling, kind: type[AnyEvent]) -> list[float]:
    """When each peer was ready with a kind of work in a round, since the round's start [ms]."""
    return [
        float(record.now_ms - compute_round_start(network, record.event.round))
        for records in told.logs.values()
        for record in records
        if isinstance(record.event, kind) and record.event.round < NUM_ROUNDS
    ]


def describe_timing(reality: Reality, simulated: Telling) -> str:
    """A table of what differs."""
    lines = ["median ms after the round's start, and how far the latest was, real / simulated:"]
    for kind in (Trained, Scored, Signed):
        real, virtual = (measure_delays(reality.network, told, kind) for told in (reality.told, simulated))
        lines.append(
            f"{kind.__name__:>8}: {median(real):6.0f} ({max(real):6.0f}) / {median(virtual):6.0f} ({max(virtual):6.0f})"
        )
    heard = [_count(told) for told in (reality.told, simulated)]
    lines.append(f"messages heard a peer and round: {heard[0]:.0f} / {heard[1]:.0f}")
    return "\n".join(lines)


def _count(told: Telling) -> float:
    heard = [record for records in told.logs.values() for record in records if isinstance(record.event, Received)]
    return len(heard) / NUM_PEERS / NUM_ROUNDS


def _read_events(folder: Path) -> Iterator[LogRecord]:
    return _read_parts(path.read_bytes() for path in sorted(folder.glob("*.events")))


def _read_parts(parts: Iterator[bytes]) -> Iterator[LogRecord]:
    for part in parts:
        yield from read_log(part)[1]
