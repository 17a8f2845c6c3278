"""The jinja2 templates of the page, and how numbers, texts and rows are written in them.

Every text is escaped when a template prints it, and characters that cannot be shown are replaced.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from xmc_jax.runtime.wording import counted

PERCENT = "\N{NO-BREAK SPACE}%"

# Control characters except tab and line ends, lone surrogates, and noncharacters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class RowLabel(NamedTuple):
    """How a row of metrics.json is shown: its name, its name in charts, a class of style.css."""

    name: str
    short: str
    style: str


_ROWS = {
    "zero-shot": RowLabel("zero-shot", "zero-shot", "zero"),
    "plain": RowLabel("trained", "trained", "trained"),
    "augmented": RowLabel("trained + augmented", "augmented", "augmented"),
}


def row_label(row: str) -> RowLabel:
    """The label of a row. An unknown row keeps its own name."""
    return _ROWS.get(row, RowLabel(row, row, "plainly"))


def ordered_rows(rows: Iterable[str]) -> list[str]:
    """Known rows from zero-shot to augmented, then unknown ones in their own order."""
    rows = list(rows)
    return [row for row in _ROWS if row in rows] + [row for row in rows if row not in _ROWS]


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction in percent. A missing or infinite one is a dash."""
    return f"{100 * fraction:.{decimals}f}{PERCENT}" if _is_finite(fraction) else "–"


def points(fraction: float | None) -> str:
    """A fraction in percent without the sign."""
    return f"{100 * fraction:.2f}" if _is_finite(fraction) else "–"


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits. A missing or infinite one is a dash."""
    return f"{value:,.{digits}g}" if _is_finite(value) else "–"


def duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, limit: int = 160) -> str:
    """A text of at most `limit` characters. A cut text ends in an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def path_points(points: Sequence[tuple[float, float]]) -> str:
    """Corners of a polyline or polygon, as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def printable(value: object) -> object:
    """The form in which a template prints a value, before it is escaped."""
    if isinstance(value, Markup):  # the output of another template or macro
        return value
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return "" if value is None else _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def render(template: str, **values: object) -> Markup:
    """The output of a template in the folder `templates`."""
    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (row_label, percent, points, number, duration, shortened)
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters |= {"counted": counted, "path_points": path_points}
    return environment


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
