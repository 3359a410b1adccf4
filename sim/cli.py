"""`p2pfm sim`: run a simulated network, or replay a node's event log. The door for people; knows no rule.

Exit codes, as everywhere in p2pfm: 0 done; 2 a scenario or file that cannot work; 3 an invariant was violated, or a
replay differs.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2pfm.errors import OperatorError
from p2pfm.types import Round
from sim.checks import Violation
from sim.churn import ChurnModel
from sim.network import NetworkModel
from sim.replay import ReplayReport, replay_path
from sim.report import SimReport, make_report, render
from sim.scenarios import AdversaryKind, Scenario
from sim.world import World

EXIT_VIOLATED = 3
EXIT_UNUSABLE = 2

app = typer.Typer(
    help="Simulate a network of peers in virtual time, or replay a node's event log.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command(
    epilog="Example: p2pfm sim run --peers 50 --rounds 5 --crash 0.1 --adversary zero --adversary equivocator --seed 7"
)
def run(
    peers: Annotated[int, typer.Option(min=1, help="How many peers, adversaries included.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="All randomness comes from this.")] = 1,
    crash: Annotated[float, typer.Option(min=0, max=1, help="Share of the peers killed in each round.")] = 0.0,
    loss: Annotated[float, typer.Option(min=0, max=1, help="Share of the messages that never arrive.")] = 0.0,
    adversary: Annotated[
        list[str] | None, typer.Option(help=f"One adversary; repeat for more: {', '.join(get_args(AdversaryKind))}.")
    ] = None,
    scenario: Annotated[
        str, typer.Option(help="A whole scenario as JSON, as a violation prints it; other options are ignored.")
    ] = "",
    logs: Annotated[
        Path | None, typer.Option(help="Folder for the event log of every peer, for `p2pfm sim replay`.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a network of simulated peers: the node's own core, in virtual time, on a convex problem with a known optimum.

    Invariants are checked after every step; a violation prints the command that replays it.
    """
    screen = Console(stderr=json)
    try:
        chosen = _parse_scenario(scenario) if scenario else _make_scenario(peers, rounds, seed, crash, loss, adversary)
        if logs is not None:
            chosen = msgspec.structs.replace(chosen, keep_logs=tuple(range(chosen.num_peers)))
        screen.print(f"seed {chosen.seed}", highlight=False)
        report = _simulate(chosen, screen, logs)
    except OperatorError as error:
        _fail(screen, str(error), EXIT_UNUSABLE)
    except Violation as error:
        _fail(screen, str(error), EXIT_VIOLATED)
    if json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        screen.print(render(report))


@app.command(epilog="Example: p2pfm sim replay ~/.p2pfm/alice/events/000000.events")
def replay(
    log: Annotated[Path, typer.Argument(help="An event log, or a node's home folder: all its logs.")],
    json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Replay a node's event log into a fresh core, and compare every action with what the node did."""
    screen = Console(stderr=json)
    try:
        reports = replay_path(log)
    except (OperatorError, OSError) as error:
        _fail(screen, str(error), EXIT_UNUSABLE)
    if json:
        sys.stdout.write(msgspec.json.encode(reports).decode() + "\n")
    for report in reports:
        screen.print(_describe(report), highlight=False)
    if any(report.difference for report in reports):
        raise typer.Exit(EXIT_VIOLATED)


def _make_scenario(
    peers: int, rounds: int, seed: int, crash: float, loss: float, adversaries: list[str] | None
) -> Scenario:
    known = get_args(AdversaryKind)
    for name in adversaries or ():
        if name not in known:
            raise OperatorError(f"adversary: expected one of {', '.join(known)}; got {name!r}")
    return Scenario(
        seed=seed,
        num_peers=peers,
        num_rounds=rounds,
        churn=ChurnModel(crash=crash),
        network=NetworkModel(loss=loss),
        adversaries=msgspec.convert(tuple(adversaries or ()), tuple[AdversaryKind, ...]),
    )


def _parse_scenario(text: str) -> Scenario:
    try:
        return msgspec.json.decode(text, type=Scenario)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise OperatorError(f"scenario: {error}") from error


def _simulate(scenario: Scenario, screen: Console, logs: Path | None) -> SimReport:
    started_s = time.process_time()
    world = World(scenario)
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("rounds", total=scenario.num_rounds)

        def on_round(_: Round) -> None:
            progress.advance(task)

        try:
            world.run(on_round)
        finally:
            if logs is not None:
                _write_logs(world, logs)
    return make_report(world, time.process_time() - started_s)


def _write_logs(world: World, folder: Path) -> None:
    for host in world.hosts:
        home = folder / host.me / "events"
        home.mkdir(parents=True, exist_ok=True)
        for number, log in enumerate(host.logs):
            (home / f"{number:06d}.events").write_bytes(log)


def _describe(report: ReplayReport) -> str:
    what = (
        f"{report.peer}: {report.num_events} events of rounds {report.first_round} to {report.last_round}, "
        f"newest certificate of round {report.head_round}"
    )
    if report.difference is None:
        return f"{what}: every action as in the log"
    difference = report.difference
    return (
        f"{what}: differs at record {difference.position} ({difference.event} at {difference.now_ms} ms): expected "
        f"actions {difference.expected[:16]}, got {difference.got[:16]}: {', '.join(difference.actions) or 'none'}"
    )


def _fail(screen: Console, text: str, code: int) -> NoReturn:
    screen.print(text, style="red", highlight=False, markup=False)
    raise typer.Exit(code)
