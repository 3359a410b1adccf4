"""Plots as inline SVG: lines and bars over rounds, in the page's colours. Knows numbers and their names; no report.

A figure is drawn 360 wide and scales with its column, which the page keeps near that width: so text stays readable on
a phone. Every plot has a name in words, a hint on every round under the pointer, and a table of its figures.
"""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from statistics import fmean

import msgspec

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36

COLUMNS_MAX = 120
"""Rounds drawn one by one; of more, neighbours are drawn as their mean."""

ROWS_MAX = 200
"""Rounds in the table behind a plot; of more, the table shows every so many."""

DOTS_MAX = 40
"""Points marked with a dot; more would hide the line."""

LOG_SPAN = 50.0
"""A scale of powers of ten where the largest value is this many times the smallest."""


class Series(msgspec.Struct, frozen=True):
    """One line."""

    name: str
    values: Sequence[float | None]
    """One a round; None: nothing to draw."""
    is_reference: bool = False
    """Drawn thin and grey: what the others are held against."""


class Plot(msgspec.Struct, frozen=True):
    """One figure over rounds."""

    key: str
    """Of its element in the page."""
    title: str
    unit: str
    rounds: Sequence[int]
    series: Sequence[Series]
    note: str = ""
    """A sentence under the title: what to look for."""
    is_share: bool = False
    """Values are 0 to 1, shown as percent on the whole scale."""
    is_bars: bool = False
    """The first series as bars; a round of value 0 is crossed, and so is a mean of several where one is."""
    from_zero: bool = True
    may_be_log: bool = False
    """Values far apart are drawn on a scale of powers of ten."""
    empty: str = "Nothing to show."
    """What is said where no series has a value."""


def render_plot(plot: Plot) -> str:
    """A card: heading, legend, the drawing as a <figure>, and the table behind it."""
    has_values = any(value is not None for series in plot.series for value in series.values)
    every = ceil(len(plot.rounds) / COLUMNS_MAX)
    unit = plot.unit if every <= 1 else f"{plot.unit}; means of {every} rounds"
    head = f"<h3>{escape(plot.title)} <span>{escape(unit)}</span></h3>"
    note = f'<p class="note">{escape(plot.note)}</p>' if plot.note else ""
    if not has_values:
        body = f'<p class="empty">{escape(plot.empty)}</p>'
    else:
        body = f"{note}{_render_legend(plot)}<figure>{_render_drawing(plot)}</figure>{_render_table(plot)}"
    return f'<div class="card" id="{plot.key}">{head}{body}</div>'


def format_value(value: float | None, is_share: bool = False) -> str:
    """A number as people read it: about four digits, no needless zeros."""
    if value is None:
        return "–"
    if is_share:
        return f"{value:.1%}".replace(".0%", "%")
    if value == 0:
        return "0"
    digits = max(0, 3 - floor(log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def compute_ticks(low: float, high: float, num: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart: about `num`, at least two."""
    span = (high - low) or abs(high) or 1.0
    raw = span / num
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


class _Scale(msgspec.Struct, frozen=True):
    """From values to heights [px]."""

    ticks: list[float]
    is_log: bool

    def place(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.is_log:
            value, low, high = log10(max(value, low)), log10(low), log10(high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _make_scale(plot: Plot) -> _Scale:
    if plot.is_share:
        return _Scale([0.0, 0.25, 0.5, 0.75, 1.0], False)
    values = [value for series in plot.series for value in series.values if value is not None]
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    if plot.may_be_log and len(positive) == len(values) and high > LOG_SPAN * low:
        return _Scale([10.0**power for power in range(floor(log10(low)), ceil(log10(high) - 1e-9) + 1)], True)
    ticks = compute_ticks(min(low, 0.0) if plot.from_zero else low, high)
    return _Scale(ticks, False)


def _render_drawing(plot: Plot) -> str:
    scale = _make_scale(plot)
    num = len(plot.rounds)
    every = ceil(num / COLUMNS_MAX)
    columns = [range(start, min(start + every, num)) for start in range(0, num, every)]
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    centers = [LEFT + width * (index + 0.5) for index in range(len(columns))]
    series = [
        msgspec.structs.replace(one, values=[_mean([one.values[index] for index in column]) for column in columns])
        for one in plot.series
    ]
    grid = "".join(_render_level(scale.place(tick), _format_tick(tick, plot.is_share)) for tick in scale.ticks)
    marks = _choose_marks([plot.rounds[column[0]] for column in columns])
    axis = "".join(
        _render_middle(centers[index], HEIGHT - BOTTOM + 16, str(plot.rounds[columns[index][0]])) for index in marks
    )
    axis += _render_middle(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 3, "round")
    is_crossed = [any(plot.series[0].values[index] == 0 for index in column) for column in columns]
    drawn = _render_bars(series[0], is_crossed, centers, width, scale) if plot.is_bars else ""
    lines = list(enumerate(series))[1:] if plot.is_bars else list(enumerate(series))
    # The first series is what the figure is about: it lies on top.
    drawn += "".join(_render_line(one, rank, centers, scale) for rank, one in reversed(lines))
    hints = "".join(
        f'<rect class="hint" x="{centers[index] - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(_describe(plot, series, column, index))}</title></rect>'
        for index, column in enumerate(columns)
    )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe_plot(plot))}">'
        f"{grid}{axis}{drawn}{hints}</svg>"
    )


def _render_level(y: float, text: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>'


def _render_middle(x: float, y: float, text: str) -> str:
    return f'<text class="middle" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _render_line(series: Series, rank: int, centers: Sequence[float], scale: _Scale) -> str:
    # Over a gap the line goes on: a void round leaves the base, and so its loss, as it was.
    seen = [(x, scale.place(value)) for x, value in zip(centers, series.values, strict=True) if value is not None]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in seen) if seen else ""
    look = _get_look(series, rank)
    has_dots = len(seen) <= DOTS_MAX and not series.is_reference
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in seen) if has_dots else ""
    return f'<g class="line {look}"><path d="{path}"/>{dots}</g>'


def _get_look(series: Series, rank: int) -> str:
    if series.is_reference:
        return "reference" if rank < 2 else "reference second"
    return f"c{rank % 6}"


def _render_bars(
    series: Series, is_crossed: Sequence[bool], centers: Sequence[float], width: float, scale: _Scale
) -> str:
    floor_px, half = scale.place(0.0), max(width * 0.4, 0.4)
    path, crosses = "", ""
    for x, value, has_zero in zip(centers, series.values, is_crossed, strict=True):
        if value:
            path += f"M{x - half:.1f} {floor_px:.1f}V{scale.place(value):.1f}H{x + half:.1f}V{floor_px:.1f}Z"
        if has_zero:
            arm, y = min(4.0, max(1.5, half)), floor_px - 7
            left, right, top, bottom = f"{x - arm:.1f}", f"{x + arm:.1f}", f"{y - arm:.1f}", f"{y + arm:.1f}"
            crosses += f"M{left} {top}L{right} {bottom}M{right} {top}L{left} {bottom}"
    return f'<path class="bars" d="{path}"/>' + (f'<path class="cross" d="{crosses}"/>' if crosses else "")


def _render_legend(plot: Plot) -> str:
    if len(plot.series) == 1:
        return ""
    items = ""
    for rank, series in enumerate(plot.series):
        look = _get_look(series, rank)
        sample = (
            '<rect class="bars" y="1" width="22" height="8"/>'
            if plot.is_bars and rank == 0
            else f'<g class="line {look}"><path d="M0 5H22"/></g>'
        )
        items += (
            f'<li><svg width="22" height="10" viewBox="0 0 22 10" aria-hidden="true">{sample}</svg> '
            f"{escape(series.name)}</li>"
        )
    return f'<ul class="legend">{items}</ul>'


def _render_table(plot: Plot) -> str:
    heads = "".join(f'<th scope="col" class="num">{escape(series.name)}</th>' for series in plot.series)
    every = ceil(len(plot.rounds) / ROWS_MAX)
    rows = ""
    for index in range(0, len(plot.rounds), every):
        cells = "".join(
            f'<td class="num">{format_value(series.values[index], plot.is_share)}</td>' for series in plot.series
        )
        rows += f'<tr><th scope="row">{plot.rounds[index]}</th>{cells}</tr>'
    cut = f"; one round of {every}, all are in the tables beside this page" if every > 1 else ""
    name = escape(f"{plot.title} {plot.unit}{cut}")
    return (
        f'<details><summary>Figures<span class="unseen"> of {escape(plot.title)}</span></summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption>{name}</caption>'
        f'<thead><tr><th scope="col">round</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )


def _describe(plot: Plot, series: Sequence[Series], column: Sequence[int], index: int) -> str:
    first, last = plot.rounds[column[0]], plot.rounds[column[-1]]
    when = f"round {first}" if first == last else f"mean of rounds {first} to {last}"
    figures = [f"{one.name} {format_value(one.values[index], plot.is_share)}" for one in series]
    return f"{when}: {', '.join(figures)}"


def _describe_plot(plot: Plot) -> str:
    parts = []
    for series in plot.series:
        seen = [value for value in series.values if value is not None]
        if seen:
            first, last = format_value(seen[0], plot.is_share), format_value(seen[-1], plot.is_share)
            zeros = f", {seen.count(0)} rounds at 0" if plot.is_bars and 0 in seen else ""
            parts.append(f"{series.name} {first if first == last else f'from {first} to {last}'}{zeros}")
    return f"{plot.title} {plot.unit} over {len(plot.rounds)} rounds: {'; '.join(parts)}"


def _mean(values: Sequence[float | None]) -> float | None:
    seen = [value for value in values if value is not None]
    return fmean(seen) if seen else None


def _format_tick(tick: float, is_share: bool) -> str:
    if is_share:
        return f"{tick:.0%}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(tick) >= size:
            return f"{format_value(tick / size)}{letter}"
    return format_value(tick)


def _choose_marks(rounds: Sequence[int], num_max: int = 8) -> list[int]:
    """Which columns carry their round's number: the first, and then evenly."""
    every = next(
        step * 10**power for power in range(9) for step in (1, 2, 5) if len(rounds) / (step * 10**power) <= num_max
    )
    return list(range(0, len(rounds), every))
