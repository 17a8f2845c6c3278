"""Plots as inline SVG: lines, dots by row, columns and ridges. style.css gives their colours.

The functions compute places; the templates of the same names draw. All plots have one width in
units of about a pixel on a phone, so that their text keeps its size. A mark has a tooltip, and the
page puts a table beside each plot.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from xmc_jax.reporting.rendering import PERCENT, percent, render, row_label

WIDTH = 340
_TOP, _BOTTOM = 10, 37  # space for half a line of text, and for ticks and the name of an axis
_CHARACTER, _BOLD = 6.1, 6.9  # approximate widths in wide fonts
_LINE = 13  # height of a line of text
_HEIGHT = 190  # of a plot
_ROW, _RIDGE = 22, 58  # heights of a row
_MOST_SYMBOLS = 24  # a line of more points has no symbols


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Values of one kind in a plot.

    Attributes:
        style: a class of style.css, which gives colour and mark.
        x: f64[n].
        y: f64[n]; values that are not finite are left out.
        interval: f64[2, n], of y; None without.
        level: whether to compare others with its last value. A line leads from it to the name.
    """

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray
    tips: Sequence[str]
    interval: np.ndarray | None = None
    level: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        ticks: values, and the text at each.
        name: the quantity with its unit, written below a horizontal axis.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    name: str = ""

    def fraction(self, value: float) -> float:
        """Where a value lies, from 0 at the start to 1 at the end."""
        return (value - self.low) / (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Plot:
    """The area of a plot, in which values have places.

    Attributes:
        description: what the plot shows, in a sentence, for screen readers.
        height: of the plot with its margins.
        left: left edge of the area.
    """

    description: str
    x_axis: Axis
    y_axis: Axis
    height: float
    left: float
    margin: float
    top: float = _TOP
    width: int = WIDTH

    @property
    def right(self) -> float:
        return self.width - self.margin

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM

    def x(self, value: float) -> float:
        return self.left + self.x_axis.fraction(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.fraction(value) * (self.bottom - self.top)


def axis(
    values: Sequence[float],
    name: str = "",
    *,
    zero: bool = False,
    percent: bool = False,
    whole: bool = False,
    most: int = 5,
) -> Axis:
    """An axis with round ticks that holds all finite values.

    Args:
        zero: whether it has to begin at 0.
        percent: values are fractions, written in percent.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(high), 1e-9):
        high = low + (abs(low) * 0.1 or 1.0)
    step = _round_step((high - low) / most)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    if percent:
        texts = [text + PERCENT for text in _decimals([100 * tick for tick in ticks], 100 * step)]
    else:
        texts = _decimals(ticks, step)
    return Axis(ticks[0], ticks[-1], tuple(zip(ticks, texts)), name)


def within(low: float, high: float, name: str = "", most: int = 5) -> Axis:
    """An axis from `low` to `high`, with the round ticks between them."""
    step = _round_step((high - low) / most)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = [number * step for number in numbers]
    return Axis(low, high, tuple(zip(ticks, _decimals(ticks, step))), name)


def _decimals(values: Sequence[float], step: float) -> list[str]:
    """Numbers with the decimals that a step between them needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def _round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def apart(places: Sequence[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Ascending places, moved until any two are `gap` apart; within the bounds if they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def lines(
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    height: int = _HEIGHT,
    named: bool = True,
) -> Markup:
    """Values over a quantity, each series a line with its name at the end.

    Args:
        series: what to draw, in ascending x.
        named: whether to write the names.
    """
    margin = 12 + _BOLD * max((len(one.name) for one in series if named), default=0)
    plot = Plot(description, x, y, height, _text_width(text for _, text in y.ticks), margin)
    drawn, ends = [], []
    for one in series:
        finite = np.flatnonzero(np.isfinite(one.y))
        if not len(finite):
            continue
        places = [(plot.x(one.x[i]), plot.y(one.y[i])) for i in finite]
        intervals = []
        if one.interval is not None:
            low, high = one.interval
            intervals = [(plot.x(one.x[i]), plot.y(low[i]), plot.y(high[i])) for i in finite]
        tips = [one.tips[i] for i in finite]
        drawn.append(
            {
                "style": one.style,
                "level": one.level,
                "places": places,
                "intervals": intervals,
                "tips": tips,
            }
        )
        ends.append((places[-1][1], one.name, one.style))
    ends = sorted(ends) if named else []
    heights = apart([at for at, _, _ in ends], plot.top, plot.bottom)
    names = [(at, name, style) for at, (_, name, style) in zip(heights, ends)]
    return render("lines.svg", plot=plot, series=drawn, names=names, most_symbols=_MOST_SYMBOLS)


def dots(title: str, bins: Sequence[str], rows: Mapping[str, np.ndarray]) -> Markup:
    """Fractions by bin of labels, one bin below the other; a line spans the values of each bin.

    Args:
        rows: row of metrics.json -> f64[b]; values that are not finite are left out.
    """
    labels = {row: row_label(row) for row in rows}
    description = f"{title} by training documents of a label, from head to tail: " + "; ".join(
        f"{labels[row].short} {', '.join(percent(value, 0) for value in values)}"
        for row, values in rows.items()
    )
    x = axis(np.concatenate(list(rows.values())), zero=True, percent=True, most=4)
    y = Axis(len(bins) - 0.5, -0.5, ())
    heading, top = "documents", _TOP + _LINE
    height = top + _BOTTOM + _ROW * len(bins)
    plot = Plot(description, x, y, height, _text_width([*bins, heading]), 16, top)
    marks, spans = [], []
    for row, values in rows.items():
        for number in np.flatnonzero(np.isfinite(values)).tolist():
            value = values[number]
            tip = f"{labels[row].short}, {bins[number]} documents: {percent(value)}"
            marks.append((plot.x(value), plot.y(number), labels[row].style, tip))
    for number, name in enumerate(bins):
        places = [x for x, y, _, _ in marks if y == plot.y(number)]
        spans.append((name, (min(places), max(places)) if places else None))
    return render("dots.svg", plot=plot, heading=heading, bins=spans, dots=marks)


def columns(
    description: str,
    names: Sequence[str],
    values: Sequence[float],
    x_name: str,
    styles: Sequence[str],
    tips: Sequence[str],
) -> Markup:
    """One column for each name, its value above it.

    Args:
        values: fractions, the heights of the columns.
    """
    x = Axis(-0.5, len(names) - 0.5, tuple(enumerate(names)), x_name)
    plot = Plot(description, x, Axis(0, max(*values, 1e-9) * 1.12, ()), _HEIGHT, 6, 6)
    spacing = (plot.right - plot.left) / len(names)
    columns = list(zip(values, styles, tips))
    return render("columns.svg", plot=plot, columns=columns, spacing=spacing)


@dataclasses.dataclass(frozen=True, eq=False)
class Ridge:
    """One row of `ridges`.

    Attributes:
        above: f64[n], counts drawn upwards.
        below: f64[n], counts drawn downwards.
    """

    name: str
    above: np.ndarray
    below: np.ndarray
    note: str
    tip: str


def ridges(
    description: str,
    rows: Sequence[Ridge],
    edges: np.ndarray,
    x: Axis,
    styles: tuple[str, str],
) -> Markup:
    """Histograms one below the other, all on one scale; the two of a row share their base.

    Args:
        edges: f64[n + 1].
        x: the axis of the quantity.
        styles: classes of style.css, above and below.
    """
    height = _TOP + _BOTTOM + _RIDGE * len(rows)
    left, margin = (_text_width(texts) for texts in zip(*((row.name, row.note) for row in rows)))
    plot = Plot(description, x, Axis(0, 1, ()), height, left, margin)
    up, down = (
        max(counts.max() for counts in side) for side in zip(*((r.above, r.below) for r in rows))
    )
    scale = (_RIDGE - 8) / max(up + down, 1)
    # Two corners at each edge: the height before it and the height after it.
    corners = [plot.x(edge) for edge in np.repeat(edges, 2)]
    ridges = []
    for number, row in enumerate(rows):
        base = plot.top + number * _RIDGE + 4 + up * scale
        heights = (
            base + sign * scale * np.pad(np.repeat(counts, 2), 1)
            for counts, sign in ((row.above, -1), (row.below, 1))
        )
        outlines = [(list(zip(corners, of_side)), style) for of_side, style in zip(heights, styles)]
        ridges.append((row, base, outlines))
    return render("ridges.svg", plot=plot, ridges=ridges)


def _text_width(texts: Sequence[str]) -> float:
    """Approximate width of the longest text, with the space beside it."""
    return 12 + _CHARACTER * max(map(len, texts), default=0)
