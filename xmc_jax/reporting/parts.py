"""What the sections of a page share: figures, tables, bars, keys, and how numbers are written."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from xmc_jax.reporting import charts
from xmc_jax.reporting.markup import Child, element

NAMES = {"zero-shot": "zero-shot", "plain": "trained", "augmented": "trained + augmented"}
"""Rows of metrics.json -> what people call them."""

SHORT = {"zero-shot": "zero-shot", "plain": "trained", "augmented": "augmented"}
"""The same where there is little room."""

KINDS = {"zero-shot": "zero", "plain": "trained", "augmented": "augmented"}
"""The same -> classes of the style, which give colours and marks."""


def percent(fraction: float, decimals: int = 1) -> str:
    """A fraction in percent, a dash for one that is not there."""
    return f"{100 * fraction:.{decimals}f}{charts.PERCENT}" if math.isfinite(fraction) else "–"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, a dash for one that is not there."""
    return f"{value:,.{digits}g}" if math.isfinite(value) else "–"


def section(name: str, title: str, lead: Child, *children: Child) -> Element:
    """A part of the page with a heading that can be linked to."""
    lead = element("p", {"class": "quiet"}, lead) if isinstance(lead, str) else lead
    heading = element("h2", {"id": f"{name}-title"}, title)
    return element(
        "section", {"id": name, "aria-labelledby": f"{name}-title"}, heading, lead, *children
    )


def figure(title: str, note: str, *children: Child) -> Element:
    """A plot with its title and a line on what it shows."""
    caption = element(
        "figcaption",
        None,
        element("h3", None, title),
        element("span", None, note) if note else None,
    )
    return element("figure", None, caption, element("div", {"class": "plot"}, *children))


def grid(children: Iterable[Child], wide: bool = False) -> Element:
    """Figures side by side as far as there is room."""
    return element("div", {"class": "grid wide" if wide else "grid"}, *children)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Child]], caption: str = "", texts: int = 1
) -> Element:
    """A table that scrolls sideways where it is too wide.

    Args:
        heads: of the columns.
        rows: their cells; the first one is the row's head.
        caption: above it.
        texts: first columns that are text; the others are numbers, and to the right.
    """

    def kind(column: int) -> str | None:
        return None if column < texts else "n"

    body = [
        element(
            "tr",
            None,
            *(
                element("td" if i else "th", {"class": kind(i), "scope": None if i else "row"}, c)
                for i, c in enumerate(cells)
            ),
        )
        for cells in rows
    ]
    head = [element("th", {"class": kind(i), "scope": "col"}, text) for i, text in enumerate(heads)]
    made = element(
        "table",
        None,
        element("caption", None, caption) if caption else None,
        element("thead", None, element("tr", None, *head)),
        element("tbody", None, *body),
    )
    said = {"role": "region", "aria-label": caption or ", ".join(heads[:2])}
    return element("div", {"class": "scroll", "tabindex": "0", **said}, made)


def folded(summary: str, *children: Child) -> Element:
    """What is shown when asked for."""
    return element("details", None, element("summary", None, summary), *children)


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of `bars`.

    Attributes:
        name: at its left.
        value: its length.
        kind: a class of the style, which gives its colour.
        texts: the value in words, at its right.
    """

    name: str
    value: float
    kind: str
    texts: tuple[str, ...]


def bars(rows: Sequence[Bar], caption: str) -> Element:
    """A table whose values are bars as well, the longest as long as there is room.

    Args:
        rows: of as many texts each.
        caption: said of the table to those who do not see it.
    """
    most = max((row.value for row in rows), default=0.0)
    body = []
    for row in rows:
        width = f"{100 * row.value / most if most else 0:.2f}%"
        fill = element("span", {"class": f"fill {row.kind}", "style": f"width:{width}"})
        cells = [element("td", {"class": "n"}, text) for text in row.texts]
        body.append(
            element(
                "tr",
                None,
                element("th", {"scope": "row"}, row.name),
                element("td", {"class": "b", "aria-hidden": "true"}, fill),
                *cells,
            )
        )
    said = element("caption", {"class": "hidden"}, caption)
    return element("table", {"class": "bars"}, said, element("tbody", None, *body))


def keys(rows: Iterable[tuple[str, str]]) -> Element:
    """What marks and colours mean: (name, class of the style)."""
    items = []
    for name, kind in rows:
        picture = element(
            "svg",
            {"class": "key", "viewBox": "0 0 14 14", "aria-hidden": "true"},
            charts.symbol(7, 7, kind),
        )
        items.append(element("span", None, picture, name))
    return element("p", {"class": "keys"}, *items)
