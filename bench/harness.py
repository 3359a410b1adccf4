"""What every script here does alike: options, tables that can be pasted into docs/LOG.md, targets, CPU seconds.

    python bench/NAME.py [--json FILE] [--check] [--quick]

The last lines are `name value target ok|short`, one a target. --check exits with 1 when one falls short. --quick runs
every path in its smallest size (what the tests do): its figures mean nothing, so its targets are shown, not judged.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

# Before torch is imported: two busy processes that spin slow each other tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class Options(NamedTuple):
    """The command line."""

    json: Path | None
    check: bool
    quick: bool


class Target(NamedTuple):
    """A figure and what it must reach: at least or at most `bound`."""

    name: str
    value: float
    bound: float
    better: Literal["more", "less"]

    @property
    def is_met(self) -> bool:
        """False also for a value that is no number."""
        return self.value >= self.bound if self.better == "more" else self.value <= self.bound


def parse_options(doc: str) -> Options:
    """The options of a script whose docstring is `doc`."""
    return read_options(make_parser(doc).parse_args())


def make_parser(doc: str) -> argparse.ArgumentParser:
    """The options that every script has; one with more of its own adds them, and calls `read_options`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target falls short")
    parser.add_argument("--quick", action="store_true", help="smallest size; targets are not judged")
    return parser


def read_options(arguments: argparse.Namespace) -> Options:
    """What everybody's options say."""
    return Options(arguments.json, arguments.check, arguments.quick)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, aligned for reading; floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    print(f"\n{title}\n")
    print(_line([column.ljust(width) for column, width in zip(columns, widths, strict=True)]))
    print(_line(["-" * width for width in widths]))
    for row in cells:
        first, *rest = zip(row, widths, strict=True)
        print(_line([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]))
    sys.stdout.flush()


def finish(options: Options, figures: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Write the figures, print the targets, and exit with 1 when --check was given and one falls short."""
    if options.json:
        judged = [{**target._asdict(), "ok": target.is_met} for target in targets]
        options.json.write_text(json.dumps({**figures, "targets": judged}, indent=2, default=_to_plain) + "\n")
    print()
    for target in targets:
        print(f"{target.name} {_cell(target.value)} {_cell(target.bound)} {'ok' if target.is_met else 'short'}")
    if options.check and not options.quick and not all(target.is_met for target in targets):
        sys.exit(1)


@contextmanager
def cpu_seconds(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of a block, all threads of this process, to into[name]."""
    start = time.process_time()
    try:
        yield
    finally:
        into[name] = into.get(name, 0.0) + time.process_time() - start


def _to_plain(value: object) -> object:
    """numpy's numbers as floats, configurations as dictionaries."""
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else float(value)  # type: ignore[arg-type]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
