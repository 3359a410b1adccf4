"""`p2pfm sim`: run simulated networks, sweep, compare and report on them, or replay a node's event log.

The door for people; knows no rule. Exit codes, as everywhere in p2pfm: 0 done; 2 a scenario or file that cannot work; 3
an invariant was violated, code of ours broke down, or a replay differs; 130 interrupted, by Ctrl-C or SIGTERM: what was
done until then is reported.
"""

import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from p2pfm.errors import ConfigError, OperatorError
from p2pfm.types import PeerId, Round
from sim.breakdowns import Breakdown, telling_breakdowns
from sim.checks import Violation
from sim.compare import compare as compare_reports
from sim.compare import render_comparison
from sim.engine import Engine, run_sweep
from sim.estimate import compute_estimate, describe, get_free_bytes, validate_memory
from sim.hunt import Failure, find_failure
from sim.hunt import hunt as run_hunt
from sim.idle import find_idle
from sim.library import change_scenario, list_names, load_scenario
from sim.progress import RunProgress
from sim.ray_engine import spread
from sim.recorder import Recorder
from sim.replay import ReplayReport, replay_path
from sim.report import SimReport, make_honest, make_report, open_world, render, set_beside
from sim.results import REPORT, load_report, load_reports, save_report, validate_folder
from sim.scenarios import Scenario, validate_scenario
from sim.sweeps import make_rows, parse_choices, parse_seeds, plan_sweep, render_sweep, save_sweep, validate_folders
from sim.tables import TableFormat, validate_format
from sim.world import World

EXIT_UNUSABLE = 2
EXIT_VIOLATED = 3
EXIT_INTERRUPTED = 130

DEFAULT = "small"
"""What is run where nothing is named."""

SEEDS = "1-3"
"""Those of many runs."""

app = typer.Typer(
    help="Simulate a network of peers in virtual time, or replay a node's event log.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

EventLogs = dict[PeerId, list[bytearray]]
"""By peer: one a life."""

Source = Annotated[
    str, typer.Argument(metavar="[SCENARIO]", help="A shipped scenario (`p2pfm sim list`), a TOML file, or JSON.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
Format = Annotated[
    TableFormat, typer.Option("--format", help="Of the tables: csv, or parquet (with the extra p2pfm[sim]).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Another value of a key, as in network.loss=0.1; repeat for more."),
]


@app.command(epilog="Example: p2pfm sim run attackers_40 --peers 50 --rounds 5 --seed 7 --out results")
def run(
    source: Source = "",
    scenario: Annotated[str, typer.Option(help="The scenario as JSON, as a violation prints it.")] = "",
    peers: Annotated[int | None, typer.Option(min=1, help="How many peers, adversaries included.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="All randomness comes from this.")] = None,
    crash: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the peers that are killed in each round.")
    ] = None,
    loss: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the messages that never arrive.")] = None,
    adversary: Annotated[
        list[str] | None, typer.Option(help="One adversary of this kind; repeat for more. See sim.scenarios.")
    ] = None,
    settings: Set = None,
    engine: Annotated[
        Engine, typer.Option(help="Where peers train: in this process, or on all machines of a Ray cluster.")
    ] = "local",
    out: Annotated[Path | None, typer.Option(help="Folder for the results: tables, report.json, report.html.")] = None,
    format: Format = "csv",
    logs: Annotated[
        Path | None, typer.Option(help="Folder for the event log of every peer, for `p2pfm sim replay`.")
    ] = None,
    beside_honest: Annotated[
        bool, typer.Option("--beside-honest", help="Run it again with all attackers honest: the harm that they do.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a network of simulated peers: the node's own core, in virtual time. Ctrl-C gives the report so far.

    Options change the scenario's own values. Invariants are checked after every step; a violation prints the command
    that replays it.
    """
    screen = Console(stderr=json)
    changes = {
        "num_peers": peers,
        "num_rounds": rounds,
        "seed": seed,
        "churn.crash": crash,
        "network.loss": loss,
        "adversaries": adversary,
    }
    with _refusals(screen):
        validate_format(format)
        if source and scenario:
            raise ConfigError(f"expected one scenario, got {source} and --scenario: leave one out")
        chosen = change_scenario(
            load_scenario(scenario or source or DEFAULT),
            {key: value for key, value in changes.items() if value is not None} | _parse_settings(settings),
        )
        for folder in (out, logs):
            if folder is not None:
                validate_folder(folder)
        if logs is not None:
            chosen = msgspec.structs.replace(chosen, keep_logs=tuple(range(chosen.num_peers)))
        honest = make_honest(chosen) if beside_honest else None
        kept: EventLogs = {}
        with _writing_logs(kept, logs):
            report, without = _simulate(chosen, screen, engine, kept), None
            try:
                if honest is not None and report.is_complete:
                    without = _simulate(honest, screen, engine, {})
                    report = set_beside(report, without) if without.is_complete else report
            finally:  # whatever became of the other run, this one is told
                if json:
                    _write_json(report)
                else:
                    screen.print(render(report))
                if out is not None:
                    page = save_report(report, out, format)
                    _say(screen, f"results in {out}, to be looked at: {page}")
    if not report.is_complete:
        _fail(screen, "interrupted: the report is of the rounds so far", EXIT_INTERRUPTED)
    if without is not None and not without.is_complete:
        _fail(screen, "interrupted: the report is complete, without the run of honest attackers", EXIT_INTERRUPTED)


@app.command("list", epilog="Example: p2pfm sim list --json")
def list_scenarios(json: Json = False) -> None:
    """The shipped scenarios: name, peers, rounds, learner, and the question each one answers."""
    shipped = {name: load_scenario(name) for name in list_names()}
    if json:
        _write_json(shipped)
        return
    table = Table()
    for name in ("name", "peers", "rounds", "learner", "what it asks"):
        table.add_column(name, justify="right" if name in ("peers", "rounds") else "left")
    for name, item in shipped.items():
        table.add_row(name, f"{item.num_peers:,}", str(item.num_rounds), item.learner.kind, Text(item.title))
    Console().print(table)


@app.command(epilog="Example: p2pfm sim sweep small attackers_40 --seeds 1-8 --set network.loss=0,0.1 --out sweep")
def sweep(
    sources: Annotated[
        list[str], typer.Argument(metavar="SCENARIO...", help="As for `run`; each one with every seed.")
    ],
    seeds: Annotated[str, typer.Option(help="Such as 1-8 or 1,5,9.")] = SEEDS,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE,...", help="Values of a key, each one run; repeat for all combinations."
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="One process, or a Ray cluster's machines.")] = "local",
    out: Annotated[Path | None, typer.Option(help="Folder: sweep.csv, and a folder of results for every run.")] = None,
    format: Format = "csv",
    json: Json = False,
) -> None:
    """Run scenarios with many seeds and settings; means and standard errors of what they come to."""
    screen = Console(stderr=json)
    with _refusals(screen):
        validate_format(format)
        plan = plan_sweep(sources, parse_seeds(seeds), parse_choices(settings))
        if out is not None:
            validate_folders(plan, out)
        done: dict[int, SimReport] = {}
        try:
            _sweep([item for _, item in plan], engine, screen, done)
        finally:  # whatever ends a sweep, the runs before it are kept
            runs = [(plan[index][0], report) for index, report in sorted(done.items())]
            if runs and json:
                _write_json(make_rows(runs))
            elif runs:
                screen.print(render_sweep(runs))
            if runs and out is not None:
                save_sweep(runs, out, format)
                _say(screen, f"results in {out}")
            if len(done) < len(plan):
                _say(screen, f"interrupted after {len(done)} of {len(plan)} runs", "red")
    if len(done) < len(plan):
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(epilog="Example: p2pfm sim compare sweep/small sweep/attackers_40")
def compare(
    left: Annotated[str, typer.Argument(help="A folder of results (of one run, or of several seeds), or a scenario.")],
    right: Annotated[str, typer.Argument(help="What to hold against it.")],
    seeds: Annotated[str, typer.Option(help="With which a scenario is run, where one is named (1-3).")] = "",
    engine: Annotated[Engine, typer.Option(help="Where it is run.")] = "local",
    json: Json = False,
) -> None:
    """Two sets of runs side by side: means, standard errors over seeds, and ratios."""
    screen = Console(stderr=json)
    with _refusals(screen):
        folders = [_find_folder(name) for name in (left, right)]
        if seeds and None not in folders:
            raise ConfigError(
                f"--seeds: expected a scenario to run, and {left} and {right} are results that were saved"
            )
        sides: list[list[SimReport] | list[Scenario]] = []
        for name, folder in zip((left, right), folders, strict=True):
            sides.append(load_reports(folder) if folder else _plan_side(name, seeds or SEEDS))
            what = f"{len(sides[-1])} run(s) saved in the folder {folder}" if folder else "a scenario, to be run"
            _say(screen, f"{name}: {what}", "dim")
        lines = compare_reports(*(_run_side(side, engine, screen) for side in sides))
    if json:
        _write_json(lines)
    else:
        screen.print(render_comparison(lines, left, right))


@app.command(epilog="Example: p2pfm sim report results --open")
def report(
    folder: Annotated[Path, typer.Argument(metavar="RESULT", help="A folder that `run --out` or `sweep --out` wrote.")],
    is_open: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    format: Format = "csv",
    json: Json = False,
) -> None:
    """Make the page and the tables again from saved results."""
    screen = Console(stderr=json)
    with _refusals(screen):
        found = [path.parent for path in sorted(folder.glob("**/report.json"))] or [folder]
        reports = [load_report(path) for path in found]
        pages = [save_report(item, path, format) for item, path in zip(reports, found, strict=True)]
    if json:
        _write_json(reports)
    for page in pages:
        _say(screen, str(page))
    if is_open:
        typer.launch(pages[0].resolve().as_uri())


@app.command(epilog="Example: p2pfm sim hunt --minutes 60 --out found")
def hunt(
    minutes: Annotated[float, typer.Option(min=0, help="How long to look [min].")] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="The scenarios are drawn from this.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder where each finding is saved.")] = Path("found"),
    again: Annotated[
        str, typer.Option(metavar="SCENARIO", help="Only run this one, with all that a hunt asserts: a finding's file.")
    ] = "",
    json: Json = False,
) -> None:
    """Run random scenarios until time is up; what fails is made small, saved, and told with a command for it."""
    screen = Console(stderr=json)
    if again:
        _run_again(again, screen, json)
        return
    _say(screen, f"seed {seed}")
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), TimeRemainingColumn())
    with (
        _refusals(screen),
        Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress,
    ):
        validate_folder(out)
        task, started_s = progress.add_task("hunt", total=minutes * 60, what="no run yet"), time.monotonic()

        def on_run(number: int, scenario: Scenario, failure: Failure | None) -> None:
            if failure is not None:
                _say(screen, f"run {number} of {scenario.num_peers} peers: {failure.text}")
            progress.update(task, completed=time.monotonic() - started_s, what=f"{number} runs")

        found = run_hunt(minutes, seed, on_run, folder=out)
    if json:
        _write_json(found)
    for finding in found:
        _say(screen, f"{finding.failure.kind}: {finding.command}")
        _say(screen, f"    or: p2pfm sim hunt --again {shlex.quote(finding.path)}")
    _say(screen, f"{len(found)} findings" if found else "nothing found")
    if found:
        raise typer.Exit(EXIT_VIOLATED)


@app.command(epilog="Example: p2pfm sim replay ~/.p2pfm/alice/events/000000.events")
def replay(
    log: Annotated[Path, typer.Argument(help="An event log, or all of a node's home folder, or of a folder of homes.")],
    json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Replay a node's event log into a fresh core, and compare every action with what the node did."""
    screen = Console(stderr=json)
    try:
        reports = replay_path(log)
    except (OperatorError, OSError) as error:
        _fail(screen, str(error), EXIT_UNUSABLE)
    if json:
        _write_json(reports)
    for item in reports:
        _say(screen, _describe(item))
    if any(item.difference for item in reports):
        raise typer.Exit(EXIT_VIOLATED)


# --- one run


def _run_again(source: str, screen: Console, json: bool) -> None:
    """What a hunt found: the same run, twice, with all that a hunt asserts."""
    with _refusals(screen):
        scenario = load_scenario(source)
        validate_scenario(scenario)
        _say(screen, f"seed {scenario.seed}")
        failure = find_failure(scenario, is_repeated=True)
    if json:
        _write_json(failure)
    if failure is not None:
        _fail(screen, failure.text, EXIT_VIOLATED)
    _say(screen, "nothing is wrong with it (any more)")


def _simulate(scenario: Scenario, screen: Console, engine: Engine, kept: EventLogs) -> SimReport:
    """Run it with a bar; interrupted: the report so far. The event logs are put into `kept`, however the run ends."""
    _say(screen, f"seed {scenario.seed}")
    estimate = validate_memory(scenario, get_free_bytes())
    _say(screen, describe(estimate), "dim")
    _note_idle([scenario], screen)
    with (
        telling_breakdowns(scenario),
        spread(scenario) if engine == "ray" else nullcontext() as workshop,
        open_world(scenario, workshop) as world,
    ):
        return _watch(world, estimate.cpu_s, screen, kept)


def _watch(world: World, estimate_s: float, screen: Console, kept: EventLogs) -> SimReport:
    started_s, is_complete = time.process_time(), True
    recorder = Recorder(world)
    with RunProgress(world, estimate_s, screen) as progress:

        def on_round(round: Round) -> None:
            recorder.on_round(round)
            progress.on_round(round)

        try:
            world.run(on_round)
        except KeyboardInterrupt:
            is_complete = False
        finally:
            kept.update({host.me: host.logs for host in world.hosts})
    return make_report(world, recorder, time.process_time() - started_s, is_complete)


@contextmanager
def _writing_logs(kept: EventLogs, folder: Path | None) -> Iterator[None]:
    """Write the logs when all else is done; of two errors the one from inside is told."""
    try:
        yield
    except BaseException:
        with suppress(OperatorError):
            _write_logs(kept, folder)
        raise
    _write_logs(kept, folder)


def _write_logs(kept: EventLogs, folder: Path | None) -> None:
    if folder is None:
        return
    try:
        for peer, logs in kept.items():
            home = folder / peer / "events"
            home.mkdir(parents=True, exist_ok=True)
            for old in home.glob(f"{'[0-9]' * 6}.events"):  # of an earlier run: they would pass for this one's lives
                old.unlink()
            for number, log in enumerate(logs):
                (home / f"{number:06d}.events").write_bytes(log)
    except OSError as error:
        raise OperatorError(f"{folder}: the event logs cannot be written: {error}") from error


def _parse_settings(settings: Sequence[str] | None) -> dict[str, Any]:
    chosen = {}
    for key, values in parse_choices(settings).items():
        if len(values) != 1:
            raise ConfigError(f"--set {key}: expected one value, got {len(values)}; `p2pfm sim sweep` runs several")
        chosen[key] = values[0]
    return chosen


# --- many runs


def _sweep(scenarios: Sequence[Scenario], engine: Engine, screen: Console, done: dict[int, SimReport]) -> None:
    """Put every report at its number into `done` as its run ends; interrupted: of those that have ended."""
    total_s = sum(compute_estimate(scenario).cpu_s for scenario in scenarios)
    _say(screen, f"seeds {', '.join(map(str, sorted({item.seed for item in scenarios})))}")
    _say(screen, f"{len(scenarios)} runs, about {total_s:.0f} s of CPU time", "dim")
    _note_idle(scenarios, screen)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("runs", total=len(scenarios))

        def on_done(index: int, report: SimReport) -> None:
            done[index] = report
            progress.advance(task)

        with suppress(KeyboardInterrupt):  # the caller sees what is missing, and says so
            run_sweep(scenarios, engine, on_done)


def _find_folder(name: str) -> Path | None:
    """The folder of results that is meant; None: a scenario is."""
    if name.lstrip().startswith("{"):  # JSON, which may be longer than a path can be
        return None
    path = Path(name)
    if path.name == REPORT:  # it holds a scenario, too, but whoever names it means its figures
        path = path.parent
    return path if path.is_dir() else None


def _plan_side(name: str, seeds: str) -> list[Scenario]:
    return [scenario for _, scenario in plan_sweep([name], parse_seeds(seeds), {})]


def _run_side(side: list[SimReport] | list[Scenario], engine: Engine, screen: Console) -> list[SimReport]:
    missing = [item for item in side if isinstance(item, Scenario)]
    done: dict[int, SimReport] = {}
    if missing:
        _sweep(missing, engine, screen, done)
    if len(done) < len(missing):
        raise KeyboardInterrupt
    return [item for item in side if isinstance(item, SimReport)] + list(done.values())


# --- what people see


def _note_idle(scenarios: Iterable[Scenario], screen: Console) -> None:
    for line in dict.fromkeys(line for scenario in scenarios for line in find_idle(scenario)):
        _say(screen, f"note: {line}", "yellow")


@contextmanager
def _refusals(screen: Console) -> Iterator[None]:
    """What goes wrong inside becomes a sentence and an exit code."""
    try:
        with _ending_in_order():
            yield
    except OperatorError as error:
        _fail(screen, str(error), EXIT_UNUSABLE)
    except MemoryError:
        _fail(screen, "out of memory: run fewer peers, or fewer runs at a time", EXIT_UNUSABLE)
    except Violation as error:
        if isinstance(error, Breakdown):  # where it came from is what its finder needs
            lines = traceback.format_exception(error.__cause__ or error)
            _say(screen, "".join(lines), "dim")
        _fail(screen, str(error), EXIT_VIOLATED)
    except KeyboardInterrupt:
        _fail(screen, "interrupted", EXIT_INTERRUPTED)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM, by which batch queues end a job, does what Ctrl-C does; once, so that nothing cuts the saving short."""

    def interrupt(_: int, __: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_json(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


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


def _say(screen: Console, text: str, style: str = "") -> None:
    """As it is: brackets and colons in people's names and paths are no markup, and no line is broken."""
    screen.print(Text(text, style), soft_wrap=True)


def _fail(screen: Console, text: str, code: int) -> NoReturn:
    _say(screen, text, "red")
    raise typer.Exit(code)
