"""What a simulated run came to: numbers a program can read, tables a person can. Knows Worlds and their Recorders."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import sqrt
from statistics import fmean, stdev

import msgspec
import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from p2pfm.config import WEI_PER_PFM
from p2pfm.errors import ConfigError
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.types import NANO, PeerId, Round
from sim.breakdowns import telling_breakdowns
from sim.recorder import HONEST, Record, Recorder, compute_gini
from sim.scenarios import STAKE, Scenario, compute_kinds
from sim.workshop import Workshop
from sim.world import World

ROWS_MAX = 40
"""Rounds that the table on the screen shows: the first and the last ones."""


class RoundReport(Record, frozen=True):
    """One round: its record, and what became of it by the end of the run."""

    is_certified: bool
    num_holders: int
    """Peers that adopted its certificate by the end of the run."""
    num_updates: int
    """Merged: peers' updates, or shards' where the network is dealt into shards."""
    loss_nats: float | None
    """Held-out loss of its base; None: void, or not measured."""
    void_reasons: tuple[str, ...]
    """Why peers held it void, the most frequent reason first."""
    backdoor: float | None = None
    """Share of held-out inputs with a backdoor's trigger that its base answers as planted; None: nobody plants one."""
    is_settled: bool = False
    """It stands on chain at the end of the run: what is certified and not settled pays nobody."""


class PeerReport(msgspec.Struct, frozen=True):
    """One peer."""

    peer: PeerId
    kind: str
    """"honest", or the adversary's kind."""
    reward_pfm: float
    """Allotted by the newest root on chain."""
    slashed_pfm: float
    bytes_sent: int
    """In the report's rounds: not in one that was interrupted, nor after the last."""
    bytes_received: int
    """The same."""
    is_blamed: bool


class KindReport(msgspec.Struct, frozen=True):
    """All peers of one kind; what an attack cost beside what it brought."""

    kind: str
    num_peers: int
    num_blamed: int
    reward_pfm: float
    """A mean a peer."""
    together_pfm: float
    """Of all peers of the kind: they may have one owner."""
    slashed_pfm: float
    """A mean a peer."""
    gain_pfm: float | None
    """Of a peer over honest work: its reward less what an honest peer drew and what it lost by slashing. 0: honest;
    None: there is no honest peer."""
    gain_error_pfm: float | None
    """Its standard error, if rewards of this kind differed among themselves as honest ones do; None: fewer than two
    honest peers, or none was paid, tell nothing of that."""
    sent_bytes: float
    """A mean a peer and round."""
    received_bytes: float
    """A mean a peer and round."""
    stake_pfm: float
    """Locked by each peer as long as it takes part."""
    gas: float | None
    """For a peer's own transactions: approval, registration, and a claim if it drew anything; a mean a peer. None: the
    ledger is in memory, which has none."""


class Beside(msgspec.Struct, frozen=True):
    """The same scenario and seed with every attacker made honest: what an attack's harm is measured from."""

    losses_nats: tuple[float | None, ...]
    """By round; None: void, or not measured."""
    num_certified: int
    rewards_pfm: tuple[float, ...]
    """By peer."""


class Harm(msgspec.Struct, frozen=True):
    """What all attackers together did to the others, beside the same run with them made honest; below 0: a gain."""

    loss_nats: float | None
    """Held-out loss at the end that is theirs; None: not measured on either side."""
    num_void: int
    """Rounds that were certified without them."""
    pay_pfm: float | None
    """What a peer that is honest in both lost, a mean: below 0 where attackers earn nothing, for the rest share it.
    None: nobody is honest in both."""


class SimReport(msgspec.Struct, frozen=True):
    """A whole run."""

    scenario: Scenario
    is_complete: bool
    """False: interrupted; the figures are of the rounds so far."""
    trace: str
    """SHA-256 over every step (hex): equal for equal scenarios, wherever the learner's sums are."""
    optimum_loss_nats: float | None
    """The least loss that anything reaches; None: not known."""
    num_steps: int
    """Of its rounds."""
    num_departures: int
    """How often a peer went down: crashed, left, or by its schedule."""
    num_bases: int
    """Different bases that peers hold that are up at the end: who is away keeps what it had."""
    cpu_s: float
    rounds: tuple[RoundReport, ...]
    peers: tuple[PeerReport, ...]
    gas: dict[str, int] = {}
    """Spent by kind of transaction, set-up and claims included; empty: the ledger is in memory."""
    beside: Beside | None = None
    """None: nobody asked for it."""


OpenWorld = Callable[[Scenario], AbstractContextManager[World]]

OTHER_LEDGERS: dict[str, OpenWorld] = {}
"""Worlds on ledgers that the simulator does not know itself; `nodes.cli`, which knows both drivers, adds them."""


@contextmanager
def open_world(scenario: Scenario, workshop: Workshop | None = None) -> Iterator[World]:
    """A scenario's world on its ledger, which is there until this is left.

    Raises:
        ConfigError: a scenario that cannot run.
    """
    if scenario.ledger in OTHER_LEDGERS and workshop is None:
        with OTHER_LEDGERS[scenario.ledger](scenario) as world:
            yield world
    else:
        yield World(scenario, workshop=workshop)


def run_scenario(scenario: Scenario, on_world: Callable[[World], None] | None = None) -> SimReport:
    """Run a scenario and report on it.

    Args:
        scenario: what to run.
        on_world: told the world before it runs.

    Raises:
        ConfigError: a scenario that cannot run.
        Violation: an invariant does not hold; a Breakdown, if code of ours raised.
    """
    started_s = time.process_time()
    with telling_breakdowns(scenario), open_world(scenario) as world:
        recorder = Recorder(world)
        if on_world:
            on_world(world)
        world.run(recorder.on_round)
        return make_report(world, recorder, time.process_time() - started_s)


def make_report(world: World, recorder: Recorder, cpu_s: float, is_complete: bool = True) -> SimReport:
    """All figures of a world that is finished, or was stopped: then of its rounds so far."""
    rewards = recorder.compute_rewards()
    recorder.count_slashed()  # evidence of the last round comes when it is over
    settled = {held.round for held in world.chain.ledger.get_rounds(Round(0))}
    return SimReport(
        scenario=world.scenario,
        is_complete=is_complete,
        trace=world.trace_digest(),
        optimum_loss_nats=world.workshop.get_optimum_loss(),
        num_steps=recorder.num_steps,
        num_departures=world.num_departures,
        num_bases=len({host.durable.base for host in world.hosts if host.peer is not None}),
        cpu_s=cpu_s,
        rounds=tuple(_make_round(world, recorder, record, settled) for record in recorder.records),
        peers=tuple(
            PeerReport(
                host.me,
                host.kind or HONEST,
                float(rewards[host.index]),
                recorder.slashed_wei.get(host.index, 0) / WEI_PER_PFM,
                int(recorder.sent[host.index]),
                int(recorder.received[host.index]),
                host.me in world.checks.blamed,
            )
            for host in world.hosts
        ),
        gas={} if isinstance(world.chain.ledger, InMemoryLedger) else dict(world.chain.ledger.get_gas()),
    )


def make_honest(scenario: Scenario) -> Scenario:
    """The same with every attacker made honest, at its own stake.

    Raises:
        ConfigError: there is none.
    """
    if not any(compute_kinds(scenario)):
        raise ConfigError("--beside-honest: this scenario has no adversaries, so there is no harm to measure")
    return msgspec.structs.replace(scenario, are_attackers_honest=True)


def set_beside(report: SimReport, honest: SimReport) -> SimReport:
    """The report with the run of `make_honest` at its side."""
    losses = tuple(item.loss_nats for item in honest.rounds)
    num_certified = sum(item.is_certified for item in honest.rounds)
    beside = Beside(losses, num_certified, tuple(peer.reward_pfm for peer in honest.peers))
    return msgspec.structs.replace(report, beside=beside)


def compute_harm(report: SimReport) -> Harm | None:
    """What the attackers did to the others; None: there is no run to hold it against."""
    if report.beside is None:
        return None
    ends = [
        next((loss for loss in reversed(losses) if loss is not None), None)
        for losses in ([item.loss_nats for item in report.rounds], report.beside.losses_nats)
    ]
    loss = None if ends[0] is None or ends[1] is None else ends[0] - ends[1]
    pairs = zip(report.peers, report.beside.rewards_pfm, strict=True)
    lost = [without_pfm - peer.reward_pfm for peer, without_pfm in pairs if peer.kind == HONEST]
    num_void = report.beside.num_certified - sum(item.is_certified for item in report.rounds)
    return Harm(loss, num_void, fmean(lost) if lost else None)


def describe_harm(harm: Harm) -> str:
    """For people."""
    loss = "not measured" if harm.loss_nats is None else f"{harm.loss_nats:+.4f} nats"
    pay = "not measured" if harm.pay_pfm is None else f"{-harm.pay_pfm:+.3g} PFM"
    return f"loss {loss}, void rounds {harm.num_void:+d}, an honest peer's pay {pay}"


def _make_round(world: World, recorder: Recorder, record: Record, settled: set[Round]) -> RoundReport:
    certificate = world.checks.certificates.get(record.round)
    loss = world.losses.get(record.round)
    return RoundReport(
        **msgspec.structs.asdict(record),
        is_certified=certificate is not None,
        num_holders=len(world.checks.holders.get(record.round, ())),
        num_updates=len(certificate.proposal.updates) if certificate else 0,
        loss_nats=None if loss is None else loss / NANO,
        void_reasons=() if certificate else recorder.get_reasons(record.round),
        backdoor=world.workshop.get_backdoor(certificate.proposal.new_base) if certificate else None,
        is_settled=record.round in settled,
    )


def compute_kinds_report(report: SimReport) -> tuple[KindReport, ...]:
    """The report's peers by kind, honest ones first; empty where there is no round yet."""
    num_rounds = len(report.rounds)
    kinds = sorted({peer.kind for peer in report.peers}, key=lambda kind: (kind != HONEST, kind))
    honest = [peer.reward_pfm for peer in report.peers if peer.kind == HONEST]
    honest_pfm = fmean(honest) if honest else None
    spread_pfm = stdev(honest) if len(honest) > 1 and any(honest) else None
    num_paid = sum(peer.reward_pfm > 0 for peer in report.peers)
    # Rounds are brought on chain once for all. The sponsor approves once, too.
    join_gas = report.gas.get("register", 0) / len(report.peers) + report.gas.get("approve", 0) / (
        len(report.peers) + 1
    )
    claim_gas = report.gas.get("claim", 0) / max(1, num_paid)
    stakes = {str(kind): times for kind, times in report.scenario.stakes.items()}
    reports = []
    for kind in kinds if num_rounds else ():
        peers = [peer for peer in report.peers if peer.kind == kind]
        reward_pfm, slashed_pfm = fmean(p.reward_pfm for p in peers), fmean(p.slashed_pfm for p in peers)
        reports.append(
            KindReport(
                kind=kind,
                num_peers=len(peers),
                num_blamed=sum(peer.is_blamed for peer in peers),
                reward_pfm=reward_pfm,
                together_pfm=sum(peer.reward_pfm for peer in peers),
                slashed_pfm=slashed_pfm,
                gain_pfm=_compute_gain(kind, reward_pfm - slashed_pfm, honest_pfm),
                gain_error_pfm=_compute_gain_error(kind, len(peers), len(honest), spread_pfm),
                sent_bytes=fmean(peer.bytes_sent for peer in peers) / num_rounds,
                received_bytes=fmean(peer.bytes_received for peer in peers) / num_rounds,
                stake_pfm=STAKE / WEI_PER_PFM * stakes.get(kind, 1.0),
                gas=join_gas + claim_gas * fmean(peer.reward_pfm > 0 for peer in peers) if report.gas else None,
            )
        )
    return tuple(reports)


def _compute_gain(kind: str, drawn_pfm: float, honest_pfm: float | None) -> float | None:
    if kind == HONEST:
        return 0.0
    return None if honest_pfm is None else drawn_pfm - honest_pfm


def _compute_gain_error(kind: str, num_peers: int, num_honest: int, spread_pfm: float | None) -> float | None:
    if kind == HONEST:
        return 0.0
    return None if spread_pfm is None else spread_pfm * sqrt(1 / num_peers + 1 / num_honest)


def compute_end_ginis(report: SimReport) -> tuple[float | None, float | None]:
    """Gini of all peers' rewards, and of the honest ones', by the newest root: it may come after the last round.

    None: none of them was paid, and no pay is not equal pay.
    """
    everyone = np.array([peer.reward_pfm for peer in report.peers])
    honest = np.array([peer.reward_pfm for peer in report.peers if peer.kind == HONEST])
    ginis = [compute_gini(amounts) if amounts.any() else None for amounts in (everyone, honest)]
    return ginis[0], ginis[1]


def describe_gain(kind: KindReport) -> str:
    """For people."""
    if kind.kind == HONEST:
        return ""
    if kind.gain_pfm is None:
        return "–"
    error = "" if kind.gain_error_pfm is None else f" ± {kind.gain_error_pfm:.2g}"
    return f"{kind.gain_pfm:+.3g}{error}"


def render(report: SimReport) -> RenderableType:
    """Tables of rounds and of peers by kind, where there are attackers of their costs, and the totals; a sentence where
    no round has ended."""
    if not report.rounds:
        return Text(f"no round of {report.scenario.num_rounds} has ended")
    costs = [_render_costs(report)] if any(peer.kind != HONEST for peer in report.peers) else []
    return Group(_render_rounds(report), _render_kinds(report), *costs, _render_totals(report))


def _render_rounds(report: SimReport) -> RenderableType:
    names = ("round", "certified", "held-out\nloss", "kB sent\na peer", "Gini", "updates", "holders", "up")
    rows = [
        ["…"] * len(names)
        if item is None
        else [
            str(item.round),
            "[red]void" if not item.is_certified else "yes" if item.is_settled else "[yellow]not on chain",
            "" if item.loss_nats is None else f"{item.loss_nats:.4f}",
            f"{item.sent.mean_bytes / 1000:.1f}",
            f"{item.gini:.3f}",
            str(item.num_updates),
            f"{item.num_holders}/{len(report.peers)}",
            f"{item.availability:.0%}",
        ]
        for item in _cut(report.rounds)
    ]
    return _Fitting("Rounds", names, rows)


def _cut(rounds: Sequence[RoundReport]) -> list[RoundReport | None]:
    if len(rounds) <= ROWS_MAX:
        return list(rounds)
    return [*rounds[: ROWS_MAX // 2], None, *rounds[-ROWS_MAX // 2 :]]


def _render_kinds(report: SimReport) -> RenderableType:
    names = ("kind", "peers", "reward", "gain over\nhonest", "slashed", "blamed", "together")
    rows = [
        [
            kind.kind,
            str(kind.num_peers),
            f"{kind.reward_pfm:.4g}",
            describe_gain(kind),
            f"{kind.slashed_pfm:.2f}",
            str(kind.num_blamed),
            f"{kind.together_pfm:.4g}",
        ]
        for kind in compute_kinds_report(report)
    ]
    return _Fitting("Peers", names, rows, "PFM; means a peer, but for what all of a kind drew together")


def _render_costs(report: SimReport) -> RenderableType:
    names = ("kind", "stake locked\n[PFM]", "kB sent\na round", *(("gas of\nits own",) if report.gas else ()))
    rows = [
        [
            kind.kind,
            f"{kind.stake_pfm:.4g}",
            f"{kind.sent_bytes / 1000:.3g}",
            *(() if kind.gas is None else (f"{kind.gas:,.0f}",)),
        ]
        for kind in compute_kinds_report(report)
    ]
    harm = compute_harm(report)
    beside = "harm done, beside the same seed with all of them honest: "
    return _Fitting("What it costs to be one", names, rows, beside + describe_harm(harm) if harm else "")


class _Fitting:
    """A table whose last columns are left out, one by one, where the screen is too narrow: no figure is ever cut."""

    def __init__(self, title: str, names: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        self._title, self._names, self._rows, self._caption = title, names, rows, caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        num = len(self._names)
        while num > 2 and console.measure(self._make(num), options=options.update(max_width=999)).maximum > (
            options.max_width
        ):
            num -= 1
        table = self._make(num)
        missing = ", ".join(name.replace("\n", " ") for name in self._names[num:])
        told = [self._caption, f"no room here for: {missing}" if missing else ""]
        table.caption = "\n".join(text for text in told if text) or None
        yield table

    def _make(self, num: int) -> Table:
        table = Table(title=self._title, title_justify="left", caption_justify="left")
        for name in self._names[:num]:
            table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row[:num])
        return table


def _render_totals(report: SimReport) -> Text:
    certified, num = sum(item.is_certified for item in report.rounds), len(report.rounds)
    settled = sum(item.is_settled for item in report.rounds)
    optimum = "" if report.optimum_loss_nats is None else f"; optimum {report.optimum_loss_nats:.4f}"
    spent = f"; {sum(report.gas.values()):,} gas with set-up and claims" if report.gas else ""
    so_far = "" if report.is_complete else f"interrupted after {num} of {report.scenario.num_rounds} rounds; "
    return Text(
        f"{so_far}{certified} of {num} rounds certified, {num - certified} void, {settled} on chain; "
        f"{report.num_departures} departures; "
        f"{report.num_bases} base(s) held by who is up at the end{optimum}{spent}\n{report.num_steps} steps in "
        f"{report.cpu_s:.2f} CPU seconds ({report.cpu_s / max(1, num):.2f} a round); trace {report.trace[:16]}"
    )
