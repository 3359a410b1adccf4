"""Runs side by side: each as a few figures; their means, standard errors and ratios. Knows SimReports only."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev

import msgspec
from rich.table import Table
from rich.text import Text

from sim.page.plots import format_value
from sim.recorder import HONEST
from sim.report import SimReport, compute_end_ginis, compute_harm, compute_kinds_report


class Spread(msgspec.Struct, frozen=True):
    """A figure over several runs."""

    mean: float
    error: float | None
    """Standard error of the mean; None: of one run nothing is known."""
    num: int
    """Runs that have the figure."""
    num_runs: int
    """All runs: of those that are missing the mean tells nothing."""


class Line(msgspec.Struct, frozen=True):
    """One figure of two sets of runs."""

    figure: str
    left: Spread | None
    """None: none of the runs has it."""
    right: Spread | None
    ratio: float | None
    """right / left; None: not defined."""


def compute_figures(report: SimReport) -> dict[str, float]:
    """What a run came to, by name and unit; a figure that a run does not have is left out."""
    rounds, kinds = report.rounds, compute_kinds_report(report)
    if not rounds:
        return {}
    num_peer_rounds = len(rounds) * len(report.peers)
    figures = {
        "certified rounds, share": fmean(item.is_certified for item in rounds),
        "rounds on chain, share": fmean(item.is_settled for item in rounds),
    }
    losses = [item.loss_nats for item in rounds if item.loss_nats is not None]
    if losses:
        figures["loss at the end, nats"] = losses[-1]
        if report.optimum_loss_nats is not None:
            figures["loss above the least, nats"] = losses[-1] - report.optimum_loss_nats
    backdoors = [item.backdoor for item in rounds if item.backdoor is not None]
    if backdoors:
        figures["backdoor at the end, share"] = backdoors[-1]
    num_updates = [item.num_updates for item in rounds if item.is_certified]
    if num_updates:
        figures["updates a certified round"] = fmean(num_updates)
    figures |= {
        "availability, share": fmean(item.availability for item in rounds),
        "sent a peer and round, kB": fmean(item.sent.mean_bytes for item in rounds) / 1000,
        "received a peer and round, kB": fmean(item.received.mean_bytes for item in rounds) / 1000,
    }
    for name, gini in zip(("Gini", "Gini, honest"), compute_end_ginis(report), strict=True):
        if gini is not None:
            figures[name] = gini
    for kind in kinds:
        if kind.kind == HONEST:
            figures["reward, honest, PFM"] = kind.reward_pfm
        else:
            if kind.gain_pfm is not None:
                figures[f"gain over honest, {kind.kind}, PFM"] = kind.gain_pfm
            figures[f"together, {kind.kind}, PFM"] = kind.together_pfm
    harm = compute_harm(report)
    if harm is not None:
        figures["harm: void rounds"] = harm.num_void
        if harm.pay_pfm is not None:
            figures["harm: pay of an honest peer, PFM"] = harm.pay_pfm
        if harm.loss_nats is not None:
            figures["harm: loss, nats"] = harm.loss_nats
    figures["stakes slashed"] = sum(peer.slashed_pfm > 0 for peer in report.peers)
    if any(item.gas is not None for item in rounds):
        figures["gas a round"] = fmean(item.gas or 0 for item in rounds)
    figures["steps a peer and round"] = report.num_steps / num_peer_rounds
    figures["CPU a peer and round, ms"] = 1000 * report.cpu_s / num_peer_rounds
    return figures


def compute_spreads(runs: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Mean and standard error of every figure over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: _spread([run[name] for run in runs if name in run], len(runs)) for name in names}


def compare(left: Sequence[SimReport], right: Sequence[SimReport]) -> list[Line]:
    """Every figure that either side has."""
    first, second = (compute_spreads([compute_figures(report) for report in side]) for side in (left, right))
    lines = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name), second.get(name)
        ratio = b.mean / a.mean if a and b and a.mean else None
        lines.append(Line(name, a, b, ratio))
    return lines


def render_comparison(lines: Sequence[Line], left: str, right: str) -> Table:
    """For the screen: mean ± standard error of both sides."""
    caption = make_caption(side for line in lines for side in (line.left, line.right))
    table = Table(title="Compared", title_justify="left", caption=caption)
    table.add_column("figure")
    for name in (left, right, "ratio"):
        table.add_column(Text(name), justify="right")
    for line in lines:
        ratio = "" if line.ratio is None else format_value(line.ratio)
        table.add_row(Text(line.figure), format_spread(line.left), format_spread(line.right), ratio)
    return table


def make_caption(spreads: Iterable[Spread | None]) -> str:
    """What stands below a table of these."""
    is_partial = any(spread.num < spread.num_runs for spread in spreads if spread)
    return "mean ± standard error over seeds" + ("; (1 of 3): the other runs have no such figure" * is_partial)


def format_spread(spread: Spread | None) -> str:
    """For people."""
    if spread is None:
        return "–"
    error = "" if spread.error is None else f" ± {format_value(spread.error)}"
    part = "" if spread.num == spread.num_runs else f" ({spread.num} of {spread.num_runs})"
    return f"{format_value(spread.mean)}{error}{part}"


def _spread(values: Sequence[float], num_runs: int) -> Spread:
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    return Spread(fmean(values), error, len(values), num_runs)
