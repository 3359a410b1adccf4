"""Rewards on a screen, as JSON and as CSV. Takes views; knows no chain.

In JSON and CSV wei are decimal strings (JSON readers round large numbers) and contributions nano-nats a token.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nodes.rewards.reading import Row
from nodes.rewards.views import EpochLine, PeerLine, RoundLine, Totals
from p2pfm.config import WEI_PER_PFM
from p2pfm.types import NANO, Wei

Line = PeerLine | RoundLine | EpochLine

FIXED_WIDTH, ROUND_WIDTH = 80, 10
"""Characters that the table by peer takes without rounds, and for each of the newest rounds that fits beside them."""

PEER_CHARACTERS = 8
STATUS_WORDS = {"final": "final", "contestable": "open", "held": "held"}
SMALL_PFM = 1e-4
"""Below this an amount is written in wei: 0.0000 PFM would look like nothing."""


def format_pfm(amount: int) -> str:
    """An amount for people."""
    return f"{amount} wei" if 0 < abs(amount) < SMALL_PFM * WEI_PER_PFM else f"{amount / WEI_PER_PFM:,.4f}"


def format_amount(amount: int) -> str:
    """An amount with its unit."""
    text = format_pfm(amount)
    return text if text.endswith("wei") else f"{text} PFM"


def format_nats(contribution: int | None) -> str:
    """A contribution in milli-nats a token; - for none."""
    return "-" if contribution is None else f"{contribution / NANO * 1000:+.3f}"


def format_time(seconds: int) -> str:
    """A moment on chain, for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_gini(gini: float | None) -> str:
    """- for none."""
    return "-" if gini is None else f"{gini:.3f}"


def format_peer(peer: str) -> str:
    """The end of a peer id, which `explain` takes."""
    return peer if len(peer) <= PEER_CHARACTERS + 2 else f"…{peer[-PEER_CHARACTERS:]}"


def make_table(title: str) -> Table:
    """Without lines between columns: the widest of ours fits 80 characters."""
    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0), pad_edge=False
    )


def make_peers_table(lines: Sequence[PeerLine], totals: Totals, width: int) -> Table:
    """By peer: contributions of the newest rounds, as many as fit `width` characters, and the money."""
    table = make_table("Rewards by peer, as the chain has them")
    num_columns = max(0, (width - FIXED_WIDTH) // ROUND_WIDTH)
    rounds = sorted({round for line in lines for round, _ in line.by_round}, reverse=True)[:num_columns][::-1]
    table.add_column("#", "", justify="right")
    table.add_column("peer", f"{totals.num_members} peers", no_wrap=True)
    table.add_column("rounds", str(totals.num_rounds), justify="right")
    for round in rounds:
        table.add_column(f"round {round}\n(mnat)", justify="right")
    table.add_column("sum\n(mnat)", justify="right")
    _add_money(table, ("allotted", totals.allotted_wei))
    table.add_column("share", justify="right")
    _add_money(
        table,
        ("claimed", totals.claimed_wei),
        ("claimable", totals.claimable_wei),
        ("open", totals.contestable_wei),
    )
    for line in lines:
        known = dict(line.by_round)
        table.add_row(
            str(line.member),
            escape(format_peer(line.peer)),
            str(line.num_rounds),
            *(format_nats(known.get(round)) for round in rounds),
            format_nats(line.contribution if line.num_rounds else None),
            format_pfm(line.allotted_wei),
            f"{line.share:.1%}",
            format_pfm(line.claimed_wei),
            format_pfm(line.claimable_wei),
            format_pfm(line.contestable_wei),
        )
    return table


def make_rounds_table(lines: Sequence[RoundLine], totals: Totals) -> Table:
    """By round: what was paid, and whether it stands for good."""
    table = make_table("Settled rounds")
    has_open = any(line.until_s for line in lines)
    table.add_column("round", str(totals.num_rounds), justify="right")
    table.add_column("status")
    if has_open:
        table.add_column("open until\n(UTC)", no_wrap=True)
    table.add_column("updates\n(> 0)", justify="right")
    table.add_column("worth\n(mnat)", justify="right")
    _add_money(table, ("allotted", totals.allotted_wei))
    table.add_column("Gini", format_gini(totals.gini), justify="right")
    table.add_column("absent", justify="right")
    for line in lines:
        has_data = line.num_updates is not None
        table.add_row(
            str(line.round),
            STATUS_WORDS[line.status],
            *([_format_until(line.until_s)] if has_open else []),
            f"{line.num_updates} ({line.num_positive})" if has_data else "no data",
            format_nats(line.contribution),
            format_pfm(line.allotted_wei),
            format_gini(line.gini),
            str(line.num_absent),
        )
    return table


def make_epochs_table(lines: Sequence[EpochLine], totals: Totals) -> Table:
    """By settlement epoch."""
    table = make_table("Settlement epochs")
    table.add_column("epoch", f"{len(lines)} epochs", justify="right")
    table.add_column("rounds", f"{totals.num_rounds} settled")
    table.add_column("status", f"{totals.num_final} rounds final")
    table.add_column("updates", justify="right")
    table.add_column("worth\n(mnat)", justify="right")
    _add_money(table, ("allotted", totals.allotted_wei))
    table.add_column("Gini", format_gini(totals.gini), justify="right")
    for line in lines:
        span = str(line.first) if line.first == line.last else f"{line.first} to {line.last}"
        table.add_row(
            str(line.epoch),
            f"{span} ({line.num_rounds})",
            STATUS_WORDS[line.status],
            "no data" if line.num_updates is None else str(line.num_updates),
            format_nats(line.contribution),
            format_pfm(line.allotted_wei),
            format_gini(line.gini),
        )
    return table


def describe_totals(totals: Totals) -> str:
    """One line for people, below every table."""
    parts = [
        f"allotted {format_amount(totals.allotted_wei)}",
        f"claimed {format_amount(totals.claimed_wei)}",
        f"claimable {format_amount(totals.claimable_wei)}",
        f"open (contestable) {format_amount(totals.contestable_wei)}",
        f"pool {format_amount(totals.pool_wei)}",
    ]
    if totals.gini is not None:
        parts.append(f"Gini {totals.gini:.3f}")
    return " · ".join(parts)


def to_json(kind: str, lines: Sequence[Line], totals: Totals, problems: Sequence[str]) -> dict[str, Any]:
    """`show --json`: {"by", "rows", "totals", "problems"}."""
    return {
        "by": kind,
        "rows": [to_plain(line) for line in lines],
        "totals": to_plain(totals),
        "problems": list(problems),
    }


def to_csv(kind: type[Line], lines: Sequence[Line]) -> str:
    """A header and one line each; the columns are the JSON's keys, without what is a list there."""
    columns = [name for name in kind.__struct_fields__ if name != "by_round"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_plain(line) for line in lines)
    return text.getvalue()


def to_plain(value: msgspec.Struct) -> dict[str, Any]:
    """JSON-able; every key that ends in _wei as a decimal string, bytes in hex."""
    plain: dict[str, Any] = _to_plain(msgspec.to_builtins(value, builtin_types=(bytes,)))
    return plain


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON-able objects; wei as decimal strings."""
    return [to_plain(row) for row in rows]


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: str(item) if key.endswith("_wei") and item is not None else _to_plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _add_money(table: Table, *columns: tuple[str, Wei]) -> None:
    for name, total in columns:
        table.add_column(f"{name}\n(PFM)", format_pfm(total), justify="right")


def _format_until(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%m-%d %H:%M:%S") if seconds else "-"
