"""Pictures of rewards, PNG or SVG. Takes a Book; knows no chain."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from nodes.rewards.inequality import compute_gini, compute_lorenz
from nodes.rewards.reading import Book, Row, make_rows
from nodes.rewards.views import PeerLine, compute_histories, view_peers
from p2pfm.config import WEI_PER_PFM
from p2pfm.errors import OperatorError
from p2pfm.types import NANO, MemberIndex, PeerId

matplotlib.use("Agg")

SUFFIXES = (".png", ".svg")
DOTS_PER_INCH = 120
ROUNDS_IN_LEGEND_MAX = 12
"""More rounds get a colour bar: a legend of them would be higher than the picture."""
PEERS_NAMED_MAX = 16
"""More lines cannot be told apart: the largest are named, the others stay grey."""
COLOURS = 10
"""That can be told apart; the next peers' lines are dashed."""
TICKS_NAMED_MAX = 40
INCHES_MAX = 16.0
"""A picture's width; more peers get narrower bars."""
Names = Mapping[PeerId, str]


def plot_book(book: Book, kind: str, path: Path, names: Names | None = None) -> None:
    """Draw one of KINDS into `path`; the suffix says how.

    Raises:
        OperatorError: another suffix or kind, or no settled round with data.
    """
    validate_path(path)
    if kind not in KINDS:
        raise OperatorError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    if book.get_newest() is None:
        why = "no round is on chain yet" if not book.readings else "nobody serves the data of any settled round"
        raise OperatorError(f"{why}: nothing to draw")
    KINDS[kind](book, path, names or {})


def validate_path(path: Path) -> None:
    """Refuse a file that could not be drawn, before anything is read. Raises: OperatorError."""
    if path.suffix.lower() not in SUFFIXES:
        raise OperatorError(f"--out {path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def plot_rewards(rows: Sequence[Row], path: Path, names: Names | None = None) -> None:
    """Two charts: rewards by peer, stacked by round; contributions by peer and round.

    Args:
        names: what to call peers; without one, the end of the peer id.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("expected at least one settled round")
    rounds = sorted({row.round for row in rows})
    called = {row.member: _name(row.peer, names or {}) for row in rows}
    members = sorted(called, key=lambda member: (called[member], member))
    by_place = {(row.member, row.round): row for row in rows}
    colours = pyplot.get_cmap("viridis")
    width = min(INCHES_MAX, max(7.0, 1.1 * len(members)))
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(width, 8.0), constrained_layout=True)
    positions = range(len(members))
    drawn = [0.0] * len(members)
    bar = 0.8 / len(rounds)
    for rank, round in enumerate(rounds):
        colour = colours(rank / max(1, len(rounds) - 1) * 0.85)
        here = [by_place.get((member, round)) for member in members]
        rewards = [row.reward_wei / WEI_PER_PFM if row else 0.0 for row in here]
        top.bar(positions, rewards, bottom=drawn, color=colour, label=f"round {round}")
        drawn = [below + reward for below, reward in zip(drawn, rewards, strict=True)]
        measured = [(row.contribution or 0) / NANO * 1000 if row else 0.0 for row in here]
        bottom.bar([x - 0.4 + bar * (rank + 0.5) for x in positions], measured, bar, color=colour)
    top.set_title("Rewards by peer and round, as the chain allotted them")
    top.set_ylabel("reward [PFM]")
    bottom.set_title("Measured contributions by peer and round")
    bottom.set_ylabel("contribution [millinats/token]")
    bottom.axhline(0, color="black", linewidth=0.8)
    for axes in (top, bottom):
        _name_peers(axes, [called[member] for member in members])
    if len(rounds) <= ROUNDS_IN_LEGEND_MAX:
        figure.legend(loc="outside lower center", ncols=min(6, len(rounds)), fontsize="small")
    else:
        scale = pyplot.Normalize(rounds[0], rounds[0] + (rounds[-1] - rounds[0]) / 0.85)
        mappable = matplotlib.cm.ScalarMappable(scale, colours)
        figure.colorbar(mappable, ax=(top, bottom), label="round").ax.set_ylim(rounds[0], rounds[-1])
    _save(figure, path)


def _plot_overview(book: Book, path: Path, names: Names) -> None:
    plot_rewards([row for reading in book.readings for row in make_rows(book, reading)], path, names)


def _plot_distribution(book: Book, path: Path, names: Names) -> None:
    """Who has how much of it: claimed, final, contestable; most first."""
    lines = view_peers(book)
    gini = compute_gini([line.allotted_wei for line in lines])
    figure, axes = pyplot.subplots(figsize=(min(INCHES_MAX, max(7.0, 0.9 * len(lines))), 5.0), constrained_layout=True)
    parts: tuple[tuple[str, str, Callable[[PeerLine], int]], ...] = (
        ("claimed", "#31688e", lambda line: line.claimed_wei),
        ("final, not claimed", "#35b779", lambda line: line.claimable_wei),
        ("contestable", "#fde725", lambda line: line.contestable_wei),
    )
    drawn = [0.0] * len(lines)
    for label, colour, get in parts:
        heights = [get(line) / WEI_PER_PFM for line in lines]
        axes.bar(range(len(lines)), heights, bottom=drawn, color=colour, label=label, edgecolor="black", linewidth=0.4)
        drawn = [below + height for below, height in zip(drawn, heights, strict=True)]
    for place, line in enumerate(lines):
        if len(lines) <= PEERS_NAMED_MAX:
            axes.annotate(
                f"{line.share:.1%}", (place, drawn[place]), ha="center", va="bottom", fontsize="small",
                xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.12 * max(drawn) or 1)  # room for the shares above the bars
    axes.set_title(f"All rewards by peer (share of the total; Gini {gini:.3f})")
    axes.set_ylabel("reward [PFM]")
    _name_peers(axes, [_name(line.peer, names) for line in lines])
    axes.legend()
    _save(figure, path)


def _plot_lorenz(book: Book, path: Path, names: Names) -> None:
    """The Lorenz curve of what was allotted, against equal shares."""
    del names
    amounts = [line.allotted_wei for line in view_peers(book)]
    points = compute_lorenz(amounts)
    x, y = [100 * share for share, _ in points], [100 * share for _, share in points]
    figure, axes = pyplot.subplots(figsize=(6.5, 6.5), constrained_layout=True)
    axes.plot([0, 100], [0, 100], color="grey", linestyle="--", label="equal shares")
    axes.plot(x, y, color="#31688e", marker="o" if len(points) <= 50 else None, label="rewards", zorder=3)
    axes.fill_between(x, x, y, color="#31688e", alpha=0.15)
    axes.set_title(f"Lorenz curve of rewards: Gini {compute_gini(amounts):.3f}, {_count(len(amounts))}")
    axes.set_xlabel("share of peers, least rewarded first [%]")
    axes.set_ylabel("share of all rewards [%]")
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 102)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    _save(figure, path)


def _plot_history(book: Book, path: Path, names: Names) -> None:
    """Allotted and drawn up to each round, by peer."""
    rounds, histories = compute_histories(book)
    ranked = [line for line in view_peers(book) if line.allotted_wei or len(book.roster.members) <= PEERS_NAMED_MAX]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9.0, 8.0), sharex=True, sharey=True, constrained_layout=True)
    colours = pyplot.get_cmap("tab10")
    for rank, line in reversed(list(enumerate(ranked))):
        is_named = rank < PEERS_NAMED_MAX
        for axes, series in zip((top, bottom), histories[MemberIndex(line.member)], strict=True):
            axes.plot(
                rounds,
                [amount / WEI_PER_PFM for amount in series],
                color=colours(rank % COLOURS) if is_named else "lightgrey",
                linestyle="-" if rank < COLOURS or not is_named else "--",
                marker="o" if len(rounds) <= 30 else None,
                markersize=4,
                drawstyle="steps-post" if len(rounds) > 1 else None,
                label=_name(line.peer, names).replace("\n", " ") if is_named and axes is top else None,
                zorder=3 if is_named else 1,
            )
    top.set_title("Allotted up to each round, by peer")
    bottom.set_title("Claimed against the roots up to each round, by peer")
    for axes in (top, bottom):
        axes.set_ylabel("sum [PFM]")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.set_xlabel("round")
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    _save(figure, path)


KINDS: dict[str, Callable[[Book, Path, Names], None]] = {
    "overview": _plot_overview,
    "distribution": _plot_distribution,
    "lorenz": _plot_lorenz,
    "history": _plot_history,
}


def _name(peer: PeerId, names: Names) -> str:
    return names.get(peer, f"…{peer[-6:]}")


def _count(num_peers: int) -> str:
    return "1 peer" if num_peers == 1 else f"{num_peers} peers"


def _name_peers(axes: Any, labels: Sequence[str]) -> None:
    is_crowded = len(labels) > 6
    if len(labels) <= TICKS_NAMED_MAX:
        axes.set_xticks(
            range(len(labels)), labels, rotation=30 if is_crowded else 0, ha="right" if is_crowded else "center"
        )
        axes.set_xlabel("peer")
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(labels)} peers")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    """SVG with text as text, and without a date: the same book gives the same file."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "p2pfm"}):
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    pyplot.close(figure)
