"""A sweep: what people write as the runs that are meant, and what they came to as a table and a folder.

Knows scenarios and reports; no world.
"""

import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from p2pfm.errors import ConfigError, OperatorError
from sim.compare import compute_figures, compute_spreads, format_spread, make_caption
from sim.estimate import get_free_bytes, validate_memory
from sim.library import change_scenario, load_scenario
from sim.report import SimReport
from sim.results import REPORT, remove_other_formats, remove_report, save_report, validate_folder
from sim.scenarios import Scenario
from sim.tables import Row, TableFormat, write_table

RUNS_MAX = 10_000
"""Of one sweep: what each came to is held in memory until the last has ended, with many peers megabytes each."""


def parse_seeds(text: str) -> list[int]:
    """As in 1-8 or 1,5,9. Raises: ConfigError."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part)  # more digits than a seed's are none
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ConfigError(f"--seeds: expected numbers and ranges such as 1-8 or 1,5,9; got {text!r}")
        num = len(seeds) + last - first + 1
        if num > RUNS_MAX:  # before they are there: a range may be of any length
            raise ConfigError(f"--seeds: expected {RUNS_MAX:,} at most, got {num:,}: take fewer, or several sweeps")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):  # the same run twice would pass for two, and lessen the errors
        raise ConfigError(f"--seeds: expected each seed once, got {text!r}")
    return seeds


def parse_choices(settings: Iterable[str] | None) -> dict[str, list[Any]]:
    """Keys and their values, of KEY=VALUE,...: TOML values between commas, where words need no quotes.

    Raises: ConfigError.
    """
    choices = {}
    for setting in settings or ():
        key, is_set, text = setting.partition("=")
        if not is_set or not key or not text:
            raise ConfigError(f"--set: expected KEY=VALUE, got {setting!r}")
        try:
            choices[key] = tomllib.loads(f"values = [{text}]")["values"]
        except tomllib.TOMLDecodeError:
            choices[key] = text.split(",")
    return choices


def plan_sweep(
    sources: Sequence[str], seeds: Sequence[int], choices: dict[str, list[Any]]
) -> list[tuple[str, Scenario]]:
    """Every run's label, equal for those that differ in their seed only, and its scenario.

    Raises: ConfigError, also for a run that would not fit into this machine's memory.
    """
    if "seed" in choices:
        raise ConfigError("--set seed: expected a sweep's seeds in --seeds, as in --seeds 1-8")
    num_runs = len(sources) * len(seeds) * prod(map(len, choices.values()))
    if num_runs > RUNS_MAX:
        raise ConfigError(
            f"expected {RUNS_MAX:,} runs at most, got {num_runs:,}, of every scenario with every seed and all "
            "combinations of values: leave some out, or make several sweeps"
        )
    plan = []
    taken: dict[str, str] = {}
    for source in sources:
        base = load_scenario(source)
        for values in itertools.product(*choices.values()):
            changes = dict(zip(choices, values, strict=True))
            label = " ".join([_make_label(source), *(f"{key}={value}" for key, value in changes.items())])
            name = _make_folder_name(label)
            if name in taken:
                raise ConfigError(
                    f"expected runs with names of their own, and {taken[name]} and {source} are both {label!r}: leave "
                    "out what stands twice, or give scenarios as files of different names"
                )
            taken[name] = source
            plan += [(label, change_scenario(base, changes | {"seed": seed})) for seed in seeds]
    free_bytes = get_free_bytes()
    for _, scenario in plan:
        validate_memory(scenario, free_bytes)
    return plan


def _make_label(source: str) -> str:
    return "scenario" if source.lstrip().startswith("{") else Path(source).stem


def _make_folder(folder: Path, label: str, scenario: Scenario) -> Path:
    return folder / _make_folder_name(label) / f"seed-{scenario.seed}"


def _make_folder_name(label: str) -> str:
    return label.replace("/", "_")


def validate_folders(plan: Sequence[tuple[str, Scenario]], folder: Path) -> None:
    """Refuse, before a sweep, a folder in which its runs could not be saved: their names come of people's values.

    Raises: OperatorError.
    """
    for label, scenario in dict(plan).items():  # one a label: seeds differ by a few letters
        validate_folder(_make_folder(folder, label, scenario))


def save_sweep(runs: Sequence[tuple[str, SimReport]], folder: Path, format: TableFormat) -> None:
    """Write every run's results and the table, in place of an earlier sweep's: `compare` would pool its seeds.

    Raises: OperatorError: of the first that cannot be written, when all others are.
    """
    faults: list[OperatorError] = []
    with _collecting(faults, folder):
        if any(folder.glob(f"*/seed-*/{REPORT}")):
            remove_other_formats(folder, ("sweep",), format)
    for label in dict.fromkeys(label for label, _ in runs):
        with _collecting(faults, folder):
            for old in (folder / _make_folder_name(label)).glob("seed-*"):
                remove_report(old)
    for label, item in runs:
        with _collecting(faults, folder):
            save_report(item, _make_folder(folder, label, item.scenario), format)
    with _collecting(faults, folder):
        write_table(make_rows(runs), folder / "sweep", format)
    if faults:
        raise faults[0]


@contextmanager
def _collecting(faults: list[OperatorError], folder: Path) -> Iterator[None]:
    """What cannot be written is no reason to lose the rest."""
    try:
        yield
    except OperatorError as error:
        faults.append(error)
    except OSError as error:
        faults.append(OperatorError(f"{folder}: cannot be written: {error}"))


def make_rows(runs: Sequence[tuple[str, SimReport]]) -> list[Row]:
    """One a run: its label, its seed and its figures; the same columns in each."""
    figures = [compute_figures(item) for _, item in runs]
    names = dict.fromkeys(name for one in figures for name in one)
    return [
        {"scenario": label, "seed": item.scenario.seed, **{name: one.get(name) for name in names}}
        for (label, item), one in zip(runs, figures, strict=True)
    ]


def render_sweep(runs: Sequence[tuple[str, SimReport]]) -> Table:
    """The figures' means over seeds, a column a label."""
    labels = list(dict.fromkeys(label for label, _ in runs))
    spreads = [compute_spreads([compute_figures(item) for name, item in runs if name == label]) for label in labels]
    caption = make_caption(spread for one in spreads for spread in one.values())
    table = Table(title="Sweep", title_justify="left", caption=caption)
    table.add_column("figure")
    for label in labels:
        table.add_column(Text(label), justify="right")
    for figure in dict.fromkeys(name for one in spreads for name in one):
        table.add_row(Text(figure), *(format_spread(one.get(figure)) for one in spreads))
    return table
