"""What a simulated run came to: numbers a program can read and a table a person can. Knows a finished World."""

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from p2pfm.config import WEI_PER_PFM
from p2pfm.types import NANO, PeerId, Round
from sim.scenarios import Scenario
from sim.world import World


class RoundReport(msgspec.Struct, frozen=True):
    """One round."""

    round: Round
    is_certified: bool
    num_holders: int
    """Peers that adopted its certificate by the end of the run."""
    num_updates: int
    loss_nats: float | None
    """Held-out loss of its base; None: void."""


class PeerReport(msgspec.Struct, frozen=True):
    """One peer."""

    peer: PeerId
    kind: str
    """"honest", or the adversary's kind."""
    reward_pfm: float
    bytes_sent: int
    bytes_received: int
    is_blamed: bool


class SimReport(msgspec.Struct, frozen=True):
    """A whole run."""

    scenario: Scenario
    trace: str
    """SHA-256 over every step (hex): equal for equal scenarios, on every machine."""
    optimum_loss_nats: float
    num_steps: int
    num_crashes: int
    num_bases: int
    """Different bases that peers hold at the end."""
    cpu_s: float
    rounds: tuple[RoundReport, ...]
    peers: tuple[PeerReport, ...]


def make_report(world: World, cpu_s: float) -> SimReport:
    """All figures of a finished world."""
    checks, losses = world.checks, world.losses
    rounds = []
    for number in range(world.scenario.num_rounds):
        round = Round(number)
        certificate = checks.certificates.get(round)
        loss_nats = losses[round] / NANO if round in losses else None
        num_updates = len(certificate.proposal.updates) if certificate else 0
        num_holders = len(checks.holders.get(round, ()))
        rounds.append(RoundReport(round, certificate is not None, num_holders, num_updates, loss_nats))
    claimed = world.chain.get_claimed()
    peers = tuple(
        PeerReport(
            host.me,
            host.kind or "honest",
            claimed[host.index] / WEI_PER_PFM,
            host.num_bytes_sent,
            host.num_bytes_received,
            host.me in checks.blamed,
        )
        for host in world.hosts
    )
    return SimReport(
        scenario=world.scenario,
        trace=world.trace_digest(),
        optimum_loss_nats=world.workshop.get_optimum_loss() or 0.0,
        num_steps=checks.num_steps,
        num_crashes=world.num_crashes,
        num_bases=len({host.durable.base for host in world.hosts}),
        cpu_s=cpu_s,
        rounds=tuple(rounds),
        peers=peers,
    )


def render(report: SimReport) -> RenderableType:
    """Two tables: rounds, and peers by kind."""
    return Group(_render_rounds(report), _render_kinds(report), _render_totals(report))


def _render_rounds(report: SimReport) -> Table:
    table = Table(title="Rounds", title_justify="left")
    for name in ("round", "certified", "updates", "holders", "held-out loss", "above the optimum"):
        table.add_column(name, justify="right")
    for item in report.rounds:
        loss = "" if item.loss_nats is None else f"{item.loss_nats:.4f}"
        above = "" if item.loss_nats is None else f"{item.loss_nats - report.optimum_loss_nats:.4f}"
        verdict = "yes" if item.is_certified else "[red]void"
        holders = f"{item.num_holders}/{len(report.peers)}"
        table.add_row(str(item.round), verdict, str(item.num_updates), holders, loss, above)
    return table


def _render_kinds(report: SimReport) -> Table:
    table = Table(title="Peers", title_justify="left")
    for name in ("kind", "peers", "reward a peer [PFM]", "kB sent a peer and round", "kB received", "blamed"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    kinds = sorted({peer.kind for peer in report.peers}, key=lambda kind: (kind != "honest", kind))
    for kind in kinds:
        peers = [peer for peer in report.peers if peer.kind == kind]
        per_round = 1000 * len(peers) * len(report.rounds)
        table.add_row(
            kind,
            str(len(peers)),
            f"{sum(peer.reward_pfm for peer in peers) / len(peers):.3f}",
            f"{sum(peer.bytes_sent for peer in peers) / per_round:.1f}",
            f"{sum(peer.bytes_received for peer in peers) / per_round:.1f}",
            str(sum(peer.is_blamed for peer in peers)),
        )
    return table


def _render_totals(report: SimReport) -> Text:
    certified = sum(item.is_certified for item in report.rounds)
    return Text(
        f"{certified} of {len(report.rounds)} rounds certified, {len(report.rounds) - certified} void; "
        f"{report.num_crashes} crashes; {report.num_bases} base(s) held at the end; optimum "
        f"{report.optimum_loss_nats:.4f}\n{report.num_steps} steps in {report.cpu_s:.2f} CPU seconds "
        f"({report.cpu_s / len(report.rounds):.2f} a round); trace {report.trace[:16]}"
    )
