"""Cells of records as texts, ids, weights and images, the same whatever file they are from.

A cell is what JSON, CSV or Parquet gave: None, a text, a number, a list, or something that no field
takes. Errors say what was expected, what was found and, where that is known, the remedy; the caller
knows the place.
"""

import dataclasses
import datetime
import decimal
import json
import math
import re
import unicodedata
from typing import Any

_LARGEST = 1 << 53  # whole numbers up to here are whole as floats, too
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_IRI = re.compile(r"<([A-Za-z][A-Za-z0-9+.-]*+:[^<>\s]*+)>")
_IRIS = re.compile(rf"(?:{_IRI.pattern}\s*+)++")
_BAD_IN_IDS = re.compile(r"[\t\r\n]")
_ROUNDED = re.compile(r"-?\d(?:[.,]\d+)?[eE]\+\d+")
_ID_KEYS = ("id", "uid", "uri", "name", "label")  # of an object in place of an id
# A piece of a list as Python writes it.
_PYTHON = re.compile(
    r"""\s*+(?:(?P<text>'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")|(?P<word>[\w.+-]++)"""
    r"|(?P<mark>[][{}(),:]))",
    re.DOTALL,
)
_BRACKETS = str.maketrans("()", "[]")
_WORDS = {"None": "null", "True": "true", "False": "false", "nan": "NaN", "null": "null"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands for the cell of a JSON object that lacks a key."""

    keys: tuple[str, ...]  # the object's own


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
    cell = _whole(cell)
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, Absent):
        keys = ", ".join(cell.keys)[:200] or "an empty object"
        raise ValueError(f"expected a text, as in other records, found {keys}")
    if not isinstance(cell, str):
        remedy = "; join the list into one text" if isinstance(cell, list) else _cast(cell)
        raise ValueError(f"expected a text, found {_quoted(cell)}{remedy}")
    return _unicode(cell)


def identifier(cell: Any) -> str:
    """An id as `normal` makes it of a text, or a whole number's digits.

    1, 1.0 and "1" are one id.

    Raises:
        ValueError: the cell is something else, blank, or has tabs or line ends.
    """
    cell = _whole(cell)
    if type(cell) is int:
        return str(cell)
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= _LARGEST:
        return str(int(cell))
    if isinstance(cell, dict):
        key = next((key for key in _ID_KEYS if cell.get(key) is not None), None)
        if key is not None and not isinstance(cell[key], dict):
            return identifier(cell[key])
    if isinstance(cell, str):
        value = normal(cell)
        if value and not _BAD_IN_IDS.search(value):
            return _unicode(value)
    raise ValueError(
        f"expected an id, a text without tabs and line ends or a whole number, found "
        f"{_quoted(cell)}{_cast(cell)}"
    )


def normal(uid: str) -> str:
    """An id as it is compared: without blanks around it, and in Unicode's form NFC.

    An IRI is the same with and without the angle brackets that N-Triples and Turtle have around it.
    """
    uid = uid.strip()
    if uid.startswith("<") and (iri := _IRI.fullmatch(uid)):
        uid = iri[1]
    return uid if uid.isascii() else unicodedata.normalize("NFC", uid)


def identifiers(cell: Any, separator: str) -> list[str]:
    """Ids: a list of them, one alone, or a text as in CSV: a list in brackets or separated ids.

    Raises:
        ValueError: the cell is something else, or one of them is no id.
    """
    value = listed(cell, separator)
    kinds = set(map(type, value))
    if kinds == {int}:
        return list(map(str, value))
    if kinds == {str}:  # as most are: at once, for speed
        value = list(map(str.strip, value))
        together = "".join(value)
        plain = together.isascii() and "<" not in together
        if all(value) and plain and not _BAD_IN_IDS.search(together):
            return value
    return list(map(identifier, value))


def hint(uid: str) -> str:
    """What may be wrong with an unknown id, as the end of an error; "" if nothing is seen."""
    if _ROUNDED.fullmatch(uid):
        return (
            "; a spreadsheet has rounded this number: have its column formatted as text, and "
            "export again"
        )
    return ""


def weights(cell: Any, separator: str, count: int) -> list[float]:
    """Positive numbers, as many as a document has labels, given as ids are.

    Raises:
        ValueError: the cell is something else.
    """
    value = []
    for one in listed(cell, separator):
        try:
            number = float(one) if type(one) in (int, float, str, decimal.Decimal) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"expected positive numbers, found {_quoted(one)}")
        value.append(number)
    if len(value) != count:
        raise ValueError(f"expected {count} numbers, one for each label, found {len(value)}")
    return value


def images(cell: Any, separator: str) -> list[str]:
    """Paths or URLs, given as ids are.

    Raises:
        ValueError: the cell is something else, such as an image itself.
    """
    value = []
    for one in listed(cell, separator):
        if isinstance(one, dict) and one.get("bytes") is None:  # Hugging Face's Image
            one = one.get("path")
        if isinstance(one, bytes | dict):
            raise ValueError(
                "expected a path or URL, found an image itself; leave the column out with "
                "--column images= and give the file to python -m xmc_jax.images.embed --images"
            )
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"expected a path or URL, found {_quoted(one)}")
        scheme = _SCHEME.match(one)
        if scheme and not is_url(one):
            raise ValueError(f"expected a path, or a URL of http or https, found {_quoted(one)}")
        value.append(_unicode(one))
    return value


def is_url(image: str) -> bool:
    """Whether an image is a URL, not a path."""
    scheme = _SCHEME.match(image)
    return scheme is not None and scheme[1].lower() in ("http", "https")


def flag(cell: Any) -> bool:
    """Whether a document has the label of a column: 1, 0, true, false, or nothing for 0.

    Raises:
        ValueError: the cell is something else.
    """
    if is_null(cell):
        return False
    written = str(cell).strip().lower() if isinstance(cell, str | int | float) else "?"
    if written in ("1", "1.0", "true"):
        return True
    if written in ("0", "0.0", "false", ""):
        return False
    raise ValueError(f"expected 0 or 1 in a column of a label, found {_quoted(cell)}")


def listed(cell: Any, separator: str) -> list[Any]:
    """The elements of a cell: of a list, of a text in brackets, or of separated pieces of a text.

    IRIs in angle brackets are apart without a separator.

    Args:
        separator: of the pieces; "" if a text without brackets is one element.

    Raises:
        ValueError: a text in brackets is no list.
    """
    if isinstance(cell, list):
        return cell
    if is_null(cell):
        return []
    if not isinstance(cell, str):
        return [cell]
    whole = cell.strip()
    if whole.startswith("<") and _IRIS.fullmatch(whole):
        return _IRI.findall(whole)
    if not (whole.startswith("[") and whole.endswith("]")):
        pieces = cell.split(separator) if separator else [cell]
        return [piece for one in pieces if (piece := one.strip())]
    try:
        return json.loads(whole)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(_as_json(whole))
    except (ValueError, OverflowError, RecursionError):
        others = f", or texts separated by {separator!r}" if separator else ""
        raise ValueError(
            f'expected a list in brackets, such as ["a", "b"]{others}, found {_quoted(cell)}'
        ) from None


def _as_json(written: str) -> str:
    """A list as Python or NumPy writes it, as JSON writes it; what it holds is not checked.

    Raises:
        ValueError: a piece is neither a text, a number nor punctuation.
    """
    pieces: list[str] = []
    at, after_value = 0, False  # NumPy writes no comma between two values
    while at < len(written):
        piece = _PYTHON.match(written, at)
        if piece is None:
            raise ValueError("no list of Python")
        at = piece.end()
        mark = (piece["mark"] or "").translate(_BRACKETS)
        if after_value and mark not in (*"]},:",):
            pieces.append(",")
        elif mark in ("]", "}") and pieces[-1:] == [","]:  # as in ('a',)
            pieces.pop()
        if piece["text"]:
            pieces.append(json.dumps(_ESCAPE.sub(_unescaped, piece["text"][1:-1])))
        else:
            pieces.append(mark or _WORDS.get(piece["word"], piece["word"]))
        after_value = mark in ("", "]", "}")
    return "".join(pieces)


def _unescaped(escape: re.Match) -> str:
    letter, digits = escape[1][0], escape[1][1:]
    return chr(int(digits, 16)) if digits else _ESCAPED.get(letter, letter)


def _whole(cell: Any) -> Any:
    """A whole number for a decimal that is one; any other cell as it is."""
    if isinstance(cell, decimal.Decimal) and cell.is_finite() and cell == cell.to_integral_value():
        return int(cell)
    return cell


def _cast(cell: Any) -> str:
    """How to make a text of a cell of another type, as the end of an error."""
    if isinstance(cell, bool | decimal.Decimal | datetime.date | datetime.time):
        return "; cast the column to text, as pandas does with astype(str)"
    return ""


def _unicode(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"expected Unicode, found half of a \\u pair in {_quoted(value)}"
            ) from None
    return value


def _quoted(cell: Any) -> str:
    if is_null(cell) or cell == "":
        return "nothing"
    quoted = ascii(cell) if isinstance(cell, str) and not cell.isprintable() else repr(cell)
    return quoted[:60] + ("..." if len(quoted) > 60 else "")
