"""A report's tables as files: CSV, or Parquet where pyarrow is installed. Knows a SimReport and no run."""

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from p2pfm.errors import OperatorError
from sim.report import SimReport

Value = str | int | float | bool | None
Row = Mapping[str, Value]
INTEGERS: dict[str, type[Value]] = {"gas": int}
"""Columns that a run may leave empty and that hold no floats in others."""

TableFormat = Literal["csv", "parquet"]


def make_round_rows(report: SimReport) -> list[Row]:
    """One row a round; units are the names' last words."""
    beside = dict(enumerate(report.beside.losses_nats)) if report.beside else {}
    return [
        {
            "round": item.round,
            "is_certified": item.is_certified,
            "is_settled": item.is_settled,
            "num_updates": item.num_updates,
            "num_holders": item.num_holders,
            "availability": item.availability,
            "loss_nats": item.loss_nats,
            "loss_beside_honest_nats": beside.get(number),
            "backdoor": item.backdoor,
            "sent_mean_bytes": item.sent.mean_bytes,
            "sent_p95_bytes": item.sent.p95_bytes,
            "sent_max_bytes": item.sent.max_bytes,
            "received_mean_bytes": item.received.mean_bytes,
            "received_p95_bytes": item.received.p95_bytes,
            "received_max_bytes": item.received.max_bytes,
            **{f"reward_{kind}_pfm": amount for kind, amount in item.rewards_pfm.items()},
            "gini": item.gini,
            "gini_honest": item.gini_honest,
            "num_slashed": item.num_slashed,
            "num_steps": item.num_steps,
            "cpu_s": item.cpu_s,
            "gas": item.gas,
            "void_reasons": " | ".join(item.void_reasons),
        }
        for number, item in enumerate(report.rounds)
    ]


def make_peer_rows(report: SimReport) -> list[Row]:
    """One row a peer."""
    return [
        {
            "peer": peer.peer,
            "kind": peer.kind,
            "reward_pfm": peer.reward_pfm,
            "slashed_pfm": peer.slashed_pfm,
            "bytes_sent": peer.bytes_sent,
            "bytes_received": peer.bytes_received,
            "is_blamed": peer.is_blamed,
        }
        for peer in report.peers
    ]


def validate_format(format: TableFormat) -> None:
    """Refuse Parquet where nothing here can write it.

    Raises:
        OperatorError: pyarrow is missing.
    """
    if format == "parquet" and find_spec("pyarrow") is None:
        raise OperatorError("--format parquet needs pyarrow, which is an extra: pip install 'p2pfm[sim]', or take csv")


def find_types(rows: Sequence[Row]) -> dict[str, type[Value]]:
    """Of each column: what its values are; where a run has none, what they are in others, so that files go together."""
    types: dict[str, type[Value]] = {}
    for name in rows[0]:
        values = (row[name] for row in rows)
        types[name] = next((type(value) for value in values if value is not None), INTEGERS.get(name, float))
    return types


def write_table(rows: Sequence[Row], path: Path, format: TableFormat = "csv") -> Path:
    """Rows of equal keys to `path` with the format's ending; returns the file's path.

    Raises:
        OperatorError: see `validate_format`.
    """
    validate_format(format)
    path = path.with_suffix(f".{format}")
    if format == "parquet":
        import pyarrow  # an extra: most do without
        import pyarrow.parquet

        names = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
        schema = pyarrow.schema([(name, names[type]) for name, type in find_types(rows).items()])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), path)
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path
