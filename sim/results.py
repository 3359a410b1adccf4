"""A run's results as a folder: scenario.toml, report.json, rounds and peers as tables, report.html. Knows no run."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import get_args

import msgspec

from p2pfm.errors import OperatorError
from sim.library import dump_toml
from sim.page import render_page
from sim.report import SimReport
from sim.tables import TableFormat, make_peer_rows, make_round_rows, write_table

REPORT = "report.json"
PAGE = "report.html"
SCENARIO = "scenario.toml"
NUMBER_MAX = 1e30
"""No figure of a run comes near it, and sums and squares of such ones are still numbers."""

TABLES = ("rounds", "peers")


def validate_folder(folder: Path) -> None:
    """Refuse, before a run, a folder that could not be made or written; what is made to find out is removed again.

    Raises:
        OperatorError: names what stands in the way.
    """
    try:
        _try_folder(folder)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        raise OperatorError(f"{folder}: expected a folder to write to, got {error}: choose another") from error


def _try_folder(folder: Path) -> None:
    path = folder.absolute()
    missing = list(itertools.takewhile(lambda parent: not os.path.lexists(parent), (path, *path.parents)))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path, prefix="p2pfm-probe-"):  # a longer name than those of the results
            pass
    finally:
        for made in missing:
            with suppress(OSError):  # it was not made, or something is in it
                made.rmdir()


def save_report(report: SimReport, folder: Path, format: TableFormat = "csv") -> Path:
    """Write all files of a run's results, in place of earlier ones; returns the page's path.

    Raises:
        OperatorError: the folder cannot be written, or see `write_table`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / REPORT).is_file():
            remove_other_formats(folder, TABLES, format)
        (folder / SCENARIO).write_text(dump_toml(report.scenario), encoding="utf-8")
        (folder / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        (folder / f"rounds.{format}").unlink(missing_ok=True)
        if report.rounds:  # a table without rows would have no columns
            write_table(make_round_rows(report), folder / "rounds", format)
        write_table(make_peer_rows(report), folder / "peers", format)
        (folder / PAGE).write_text(render_page(report), encoding="utf-8")
    except OSError as error:
        raise OperatorError(f"{folder}: cannot be written: {error}") from error
    return folder / PAGE


def remove_other_formats(folder: Path, tables: Sequence[str], format: TableFormat) -> None:
    """Tables that were written in another format would pass for those of this run."""
    for table, other in itertools.product(tables, get_args(TableFormat)):
        if other != format:
            (folder / f"{table}.{other}").unlink(missing_ok=True)


def remove_report(folder: Path) -> None:
    """Remove what `save_report` wrote, and the folder if nothing else is in it; a folder without results is left.

    Raises:
        OSError: it cannot be removed.
    """
    if not (folder / REPORT).is_file():
        return
    tables = [f"{table}.{format}" for table, format in itertools.product(TABLES, get_args(TableFormat))]
    for name in (REPORT, PAGE, SCENARIO, *tables):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def load_report(folder: Path) -> SimReport:
    """The report that was saved in a folder.

    Raises:
        OperatorError: none there, not one of this version, or a damaged one.
    """
    path = folder / REPORT
    try:
        report = msgspec.json.decode(path.read_bytes(), type=SimReport)
    except OSError as error:
        raise OperatorError(f"no results in {folder}: expected a folder that `sim run --out` wrote: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise OperatorError(f"{path}: not a report of this version of p2pfm: {error}") from error
    fault = _find_fault(report)
    if fault:
        raise OperatorError(f"{path}: the report is damaged: {fault}: run its scenario again")
    return report


def _find_fault(report: SimReport) -> str:
    """What no run comes to, though it decodes; empty: nothing."""
    num_peers, num_rounds = len(report.peers), len(report.rounds)
    if num_peers != report.scenario.num_peers or not num_peers:
        return f"expected its scenario's {report.scenario.num_peers} peers, at least one, got {num_peers}"
    rounds = [int(item.round) for item in report.rounds]
    if rounds != list(range(num_rounds)):
        return f"expected rounds 0, 1, 2 and so on, got {rounds[:8]}"
    kinds = {peer.kind for peer in report.peers}
    for item in report.rounds:
        if item.rewards_pfm.keys() != kinds:
            got = ", ".join(sorted(item.rewards_pfm)) or "none"
            return f"round {item.round}: expected rewards of {', '.join(sorted(kinds))}, got {got}"
    if report.beside is not None:
        nums = len(report.beside.losses_nats), len(report.beside.rewards_pfm)
        if nums != (num_rounds, num_peers):
            return f"beside: expected {num_rounds} losses and {num_peers} rewards, got {nums[0]} and {nums[1]}"
    beyond = next((number for number in _walk_numbers(msgspec.to_builtins(report)) if abs(number) > NUMBER_MAX), None)
    return "" if beyond is None else f"expected numbers up to {NUMBER_MAX:g}, got {beyond:g}"


def _walk_numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _walk_numbers(item)


def load_reports(folder: Path) -> list[SimReport]:
    """All reports of a folder: its own, or those of the folders in it (a sweep's).

    Raises:
        OperatorError: see `load_report`.
    """
    if (folder / REPORT).is_file():
        return [load_report(folder)]
    inner = sorted(path.parent for path in folder.glob(f"*/{REPORT}"))
    return [load_report(path) for path in inner] if inner else [load_report(folder)]
