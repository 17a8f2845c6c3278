"""Cells of records as texts, ids, weights and images, the same whatever file they are from.

A cell is what JSON, CSV or Parquet gave: None, a text, a number, a list, or something that is in no
place here. Errors say what was expected and found; the caller knows where.
"""

import json
import math
import re
from typing import Any

_LARGEST = 1 << 53  # whole numbers up to here are whole as floats, too
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_BAD_IN_IDS = re.compile(r"[\t\r\n]")


def is_null(cell: Any) -> bool:
    """Whether there is nothing in a cell: null, or the NaN that pandas writes for it."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def text(cell: Any) -> str:
    """A text; "" for a null, digits for a whole number.

    Raises:
        ValueError: the cell is something else, or no Unicode.
    """
    if is_null(cell):
        return ""
    if type(cell) is int:
        return str(cell)
    if not isinstance(cell, str):
        raise ValueError(f"expected a text, found {_shown(cell)}")
    return _unicode(cell)


def identifier(cell: Any) -> str:
    """An id: a text, or a whole number as its digits, so that 1, 1.0 and "1" are one.

    Raises:
        ValueError: the cell is something else, blank, or has tabs or line ends.
    """
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= _LARGEST:
        return str(int(cell))
    if not isinstance(cell, str) or not cell.strip() or _BAD_IN_IDS.search(cell):
        raise ValueError(
            f"expected an id, a text without tabs and line ends or a whole number, found "
            f"{_shown(cell)}"
        )
    return _unicode(cell)


def identifiers(cell: Any, separator: str) -> list[str]:
    """Ids: a list of them, one alone, or a text as in CSV: a JSON list or separated ids.

    Raises:
        ValueError: the cell is something else, or one of them is no id.
    """
    found = _listed(cell, separator)
    kinds = set(map(type, found))
    if kinds == {int}:
        return list(map(str, found))
    if kinds == {str} and all(map(str.strip, found)):  # as most are: at once, for speed
        together = "".join(found)
        if together.isascii() and not _BAD_IN_IDS.search(together):
            return found
    return list(map(identifier, found))


def weights(cell: Any, separator: str, count: int) -> list[float]:
    """Positive numbers, as many as a document has labels, given as ids are.

    Raises:
        ValueError: the cell is something else.
    """
    found = []
    for one in _listed(cell, separator):
        try:
            number = float(one) if type(one) in (int, float, str) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"expected positive numbers, found {_shown(one)}")
        found.append(number)
    if len(found) != count:
        raise ValueError(f"expected {count} numbers, one for each label, found {len(found)}")
    return found


def images(cell: Any, separator: str) -> list[str]:
    """Paths or URLs, given as ids are.

    Raises:
        ValueError: the cell is something else, such as an image itself.
    """
    found = []
    for one in _listed(cell, separator):
        if isinstance(one, dict) and one.get("bytes") is None:  # Hugging Face's Image
            one = one.get("path")
        if isinstance(one, bytes | dict):
            raise ValueError(
                "expected a path or URL, found an image itself; leave the column out with "
                "--column images= and give the file to python -m xmc_jax.vision.embed --images"
            )
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"expected a path or URL, found {_shown(one)}")
        scheme = _SCHEME.match(one)
        if scheme and not is_url(one):
            raise ValueError(f"expected a path, or a URL of http or https, found {_shown(one)}")
        found.append(_unicode(one))
    return found


def is_url(image: str) -> bool:
    """Whether an image is a URL, not a path."""
    scheme = _SCHEME.match(image)
    return scheme is not None and scheme[1].lower() in ("http", "https")


def _listed(cell: Any, separator: str) -> list[Any]:
    if isinstance(cell, list):
        return cell
    if is_null(cell):
        return []
    if not isinstance(cell, str):
        return [cell]
    whole = cell.strip()
    if not (whole.startswith("[") and whole.endswith("]")):
        return [piece for one in cell.split(separator) if (piece := one.strip())]
    try:
        return json.loads(whole)
    except (ValueError, RecursionError):
        raise ValueError(
            f"expected a JSON list, or texts separated by {separator!r}, found {_shown(cell)}"
        ) from None


def _unicode(found: str) -> str:
    if not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected Unicode, found half of a \\u pair in {_shown(found)}"
            ) from None
    return found


def _shown(cell: Any) -> str:
    if is_null(cell):
        return "nothing"
    shown = ascii(cell) if isinstance(cell, str) and not cell.isprintable() else repr(cell)
    return shown[:60] + ("..." if len(shown) > 60 else "")
