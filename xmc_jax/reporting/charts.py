"""Plots as inline SVG: lines, dots by row, columns and ridges; colours come from the page's style.

All have one width in units of about a pixel on a phone, so that their text keeps its size; a mark
says what it is when pointed at, and the page puts a table beside each plot.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from xmc_jax.reporting.markup import Child, element

WIDTH = 340
PERCENT = "\N{NO-BREAK SPACE}%"
_TOP, _BOTTOM = 10, 37  # room for half a line of text, and for ticks and the name of an axis
_CHARACTER, _BOLD = 6.1, 6.9  # width, about, of wide fonts
_LINE = 13  # height of a line of text
_REACH = 7  # radius that a point is pointed at within
_SMALL = 24  # lines of up to so many points show each


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Values of one kind in a plot.

    Attributes:
        name: written beside it.
        kind: a class of the page's style, which gives colour and mark.
        x: f64[n]; numbers of rows from 0 in `dots`.
        y: f64[n]; what is not finite is left out.
        tips: n texts, said when a mark is pointed at.
        interval: f64[2, n], of y; None without.
        level: whether its last value is to compare others with: a line leads from it to its name.
    """

    name: str
    kind: str
    x: np.ndarray
    y: np.ndarray
    tips: Sequence[str]
    interval: np.ndarray | None = None
    level: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        low: where it begins.
        high: where it ends.
        ticks: values and what is written at them.
        name: of what is measured, with its unit; written at the end of a horizontal one.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    name: str = ""


def axis(
    values: Sequence[float],
    name: str = "",
    *,
    zero: bool = False,
    percent: bool = False,
    whole: bool = False,
    most: int = 5,
) -> Axis:
    """An axis with round ticks that holds all values that are finite.

    Args:
        values: what is to be shown.
        name: see `Axis`.
        zero: whether it has to begin at 0.
        percent: values are fractions, written in percent.
        whole: ticks are whole numbers.
        most: ticks, about.
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(high), 1e-9):
        high = low + (abs(low) * 0.1 or 1.0)
    step = _step((high - low) / most)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    written = (percentage if percent else decimal)(ticks, step)
    return Axis(ticks[0], ticks[-1], tuple(zip(ticks, written)), name)


def within(low: float, high: float, name: str = "", most: int = 5) -> Axis:
    """An axis from `low` to `high`, with the round ticks that lie between."""
    step = _step((high - low) / most)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ticks = [number * step for number in numbers]
    return Axis(low, high, tuple(zip(ticks, decimal(ticks, step))), name)


def decimal(values: Sequence[float], step: float) -> list[str]:
    """Numbers with the decimals that a step between them needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "−") for value in values]


def percentage(values: Sequence[float], step: float) -> list[str]:
    """Fractions in percent, likewise."""
    return [f"{text}{PERCENT}" for text in decimal([100 * value for value in values], 100 * step)]


def _step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


class _Plot:
    """An SVG with room around an area in which values have places."""

    def __init__(
        self,
        said: str,
        x: Axis,
        y: Axis,
        height: float,
        left: float,
        right: float,
        top: float = _TOP,
    ):
        self.x_axis, self.y_axis, self.height = x, y, height
        self.left, self.right = left, WIDTH - right
        self.top, self.bottom = top, height - _BOTTOM
        self.svg = element(
            "svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": said}
        )

    def x(self, value: float) -> float:
        return self.left + _part(value, self.x_axis) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - _part(value, self.y_axis) * (self.bottom - self.top)

    def add(self, tag: str, attributes: dict[str, object], *children: Child) -> None:
        self.svg.append(element(tag, attributes, *children))

    def text(self, x: float, y: float, text: str, kind: str = "tick", anchor: str = "start"):
        self.add("text", {"x": x, "y": y, "class": kind, "text-anchor": anchor}, text)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})

    def horizontal(self, grid: bool = False) -> None:
        """Ticks and name of the x axis, and lines up from the ticks."""
        for value, text in self.x_axis.ticks:
            if grid:
                self.line(self.x(value), self.top, self.x(value), self.bottom, "grid-line")
            self.text(self.x(value), self.bottom + _LINE + 3, text, anchor="middle")
        if self.x_axis.name:
            middle = (self.left + self.right) / 2
            self.text(middle, self.height - 4, self.x_axis.name, "axis", "middle")

    def vertical(self) -> None:
        """Ticks of the y axis, and lines to the right of them."""
        for value, text in self.y_axis.ticks:
            self.line(self.left, self.y(value), self.right, self.y(value), "grid-line")
            self.text(self.left - 6, self.y(value) + 4, text, anchor="end")

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", {"points": steps, "class": f"line {kind}"})

    def mark(self, x: float, y: float, kind: str, tip: str, shown: bool = True) -> None:
        """A mark of a kind of series; not shown, it only says what it is."""
        hit = element("circle", {"cx": x, "cy": y, "r": _REACH, "class": "hit"})
        self.add("g", {}, element("title", None, tip), symbol(x, y, kind) if shown else None, hit)

    def labels(self, labels: Sequence[tuple[float, str, str]], x: float) -> None:
        """Names beside the ends of lines, moved apart: (y, name, kind)."""
        ordered = sorted(labels)
        places = apart([y for y, _, _ in ordered], self.top, self.bottom)
        for y, (_, name, kind) in zip(places, ordered):
            self.text(x, y + 4, name, f"name {kind}")


def symbol(x: float, y: float, kind: str) -> Element:
    """The mark of a kind of series: a ring, a dot or a diamond."""
    if kind == "augmented":
        path = f"M{x:.1f},{y - 5:.1f}l5,5l-5,5l-5,-5z"
        return element("path", {"d": path, "class": f"mark {kind}"})
    return element("circle", {"cx": x, "cy": y, "r": 4, "class": f"mark {kind}"})


def apart(places: Sequence[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Ascending places, moved so that any two are `gap` apart, within bounds if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, low))
    limit = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def lines(
    said: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 190, named: bool = True
) -> Element:
    """Values over a quantity, each series a line with its name at the end.

    Args:
        said: what the plot shows, in a sentence, for those who do not see it.
        series: what to draw, in ascending x.
        x: the quantity's axis.
        y: the values' axis.
        height: of the plot.
        named: whether the names are written, where there are several.
    """
    names = [one.name for one in series] if named else []
    room = 12 + _BOLD * max(map(len, names), default=0)
    left = 12 + _CHARACTER * max((len(text) for _, text in y.ticks), default=0)
    plot = _Plot(said, x, y, height, left, room)
    plot.vertical()
    plot.horizontal()
    ends = []
    for one in series:
        there = np.isfinite(one.y)
        points = [(plot.x(a), plot.y(b)) for a, b in zip(one.x[there], one.y[there])]
        if not points:
            continue
        if one.interval is not None:
            for place, (low, high) in zip(one.x[there], one.interval.T[there]):
                plot.line(
                    plot.x(place), plot.y(low), plot.x(place), plot.y(high), f"bar {one.kind}"
                )
        if one.level:
            (start, at) = points[-1]
            plot.line(start, at, plot.right, at, f"level {one.kind}")
        if len(points) > 1:
            plot.path(points, one.kind)
        tips = [tip for tip, shown in zip(one.tips, there) if shown]
        for (a, b), tip in zip(points, tips):
            plot.mark(a, b, one.kind, tip, shown=len(points) <= _SMALL)
        ends.append((points[-1][1], one.name, one.kind))
    if names:
        plot.labels(ends, plot.right + 10)
    return plot.svg


def dots(
    said: str,
    rows: Sequence[str],
    rows_name: str,
    series: Sequence[Series],
    x: Axis,
    row_height: int = 22,
) -> Element:
    """Values by row, one below the other; a line spans each row's.

    Args:
        said: see `lines`.
        rows: their names.
        rows_name: of what these are, above them.
        series: `y` are the rows' numbers, `x` the values; what is not finite is left out.
        x: the values' axis.
        row_height: of each.
    """
    left = 12 + _CHARACTER * max(map(len, [*rows, rows_name]))
    y = Axis(len(rows) - 0.5, -0.5, ())
    top = _TOP + _LINE
    plot = _Plot(said, x, y, top + _BOTTOM + row_height * len(rows), left, 16, top)
    plot.horizontal(grid=True)
    plot.text(left - 8, _TOP + 2, rows_name, "axis", "end")
    for number, name in enumerate(rows):
        plot.text(left - 8, plot.y(number) + 4, name, anchor="end")
        values = [one.x[i] for one in series for i in np.flatnonzero(one.y == number)]
        values = [value for value in values if math.isfinite(value)]
        if values:
            at = plot.y(number)
            plot.line(plot.x(min(values)), at, plot.x(max(values)), at, "span")
    for one in series:
        for value, number, tip in zip(one.x, one.y, one.tips):
            if math.isfinite(value):
                plot.mark(plot.x(value), plot.y(number), one.kind, tip)
    return plot.svg


def columns(
    said: str,
    names: Sequence[str],
    values: Sequence[float],
    kinds: Sequence[str],
    tips: Sequence[str],
    x_name: str,
    written: Callable[[float], str],
    height: int = 190,
) -> Element:
    """One column for each name, its value above it.

    Args:
        said: see `lines`.
        names: below the columns.
        values: their heights, 0 or more.
        kinds: of each, a class of the page's style.
        tips: of each.
        x_name: of what the names are.
        written: a value as text.
        height: of the plot.
    """
    top = max(max(values, default=0.0), 1e-9)
    x = Axis(-0.5, len(names) - 0.5, tuple(enumerate(names)), x_name)
    plot = _Plot(said, x, Axis(0, top * 1.12, ()), height, 6, 6)
    wide = (plot.right - plot.left) / max(len(names), 1)
    for number, (value, kind, tip) in enumerate(zip(values, kinds, tips)):
        at = plot.y(value)
        box = {"x": plot.x(number) - 0.36 * wide, "width": 0.72 * wide}
        box |= {"y": at, "height": plot.bottom - at, "class": f"column {kind}"}
        plot.add("rect", box, element("title", None, tip))
        if value:
            plot.text(plot.x(number), at - 4, written(value), "value", "middle")
    plot.line(plot.left, plot.bottom, plot.right, plot.bottom, "base")
    plot.horizontal()
    return plot.svg


@dataclasses.dataclass(frozen=True, eq=False)
class Ridge:
    """One row of `ridges`.

    Attributes:
        name: written at its left.
        above: f64[n], counts drawn upwards.
        below: f64[n], counts drawn downwards.
        note: written at its right.
        tip: said when it is pointed at.
    """

    name: str
    above: np.ndarray
    below: np.ndarray
    note: str
    tip: str


def ridges(
    said: str,
    rows: Sequence[Ridge],
    edges: np.ndarray,
    x: Axis,
    kinds: tuple[str, str],
    row_height: int = 58,
) -> Element:
    """Histograms one below the other, all on one scale; the two of a row share their base.

    Args:
        said: see `lines`.
        rows: of n bins each.
        edges: f64[n + 1].
        x: the axis of what is counted.
        kinds: classes of the page's style, of what is above and below.
        row_height: of each.
    """
    left = 12 + _CHARACTER * max((len(row.name) for row in rows), default=0)
    room = 12 + _CHARACTER * max((len(row.note) for row in rows), default=0)
    height = _TOP + _BOTTOM + row_height * len(rows)
    plot = _Plot(said, x, Axis(0, 1, ()), height, left, room)
    plot.horizontal(grid=True)
    up = max((row.above.max() for row in rows), default=0)
    down = max((row.below.max() for row in rows), default=0)
    scale = (row_height - 8) / max(up + down, 1)
    for number, row in enumerate(rows):
        base = plot.top + number * row_height + 4 + up * scale
        group = element("g", {}, element("title", None, row.tip))
        for counts, kind, sign in ((row.above, kinds[0], -1), (row.below, kinds[1], 1)):
            outline = [(plot.x(edges[0]), base)]
            for low, high, count in zip(edges, edges[1:], counts):
                at = base + sign * scale * count
                outline += [(plot.x(low), at), (plot.x(high), at)]
            outline.append((plot.x(edges[-1]), base))
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
            group.append(element("polygon", {"points": points, "class": f"area {kind}"}))
        plot.svg.append(group)
        plot.line(plot.left, base, plot.right, base, "base")
        plot.text(plot.left - 8, base + 4, row.name, anchor="end")
        plot.text(plot.right + 8, base + 4, row.note, "value")
    return plot.svg


def _part(value: float, axis: Axis) -> float:
    return (value - axis.low) / (axis.high - axis.low)
