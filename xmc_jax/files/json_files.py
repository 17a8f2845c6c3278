"""JSON in files that anyone may have written; what is none is said in one line."""

import json
import pathlib
from typing import Any

import pydantic
from etils import epath

from xmc_jax.files import atomic


def read(path: epath.PathLike, optional: bool = False, kind: type = dict) -> Any:
    """The JSON object in a file.

    Args:
        path: local or remote.
        optional: an empty one where there is no such file.
        kind: dict, or list for a list in place of an object.

    Raises:
        ValueError: no such file, or something else in it.
    """
    path = epath.Path(path)
    if not is_file(path):
        if optional:
            return kind()
        raise ValueError(f"{path}: expected a JSON file, found none")
    return parse(path, path.read_bytes(), kind)


def write(path: epath.PathLike, content: Any) -> None:
    """Writes JSON for people to read, in one step; see `atomic.replaced`."""
    atomic.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_file(path: epath.Path) -> bool:
    """Whether there is a file; `epath` also takes pipes for such, and would wait for them."""
    return path.is_file() if "://" in str(path) else pathlib.Path(path).is_file()


def problem(error: Exception) -> str:
    """What is in a text that `json` refuses, by its error."""
    if isinstance(error, json.JSONDecodeError):
        return f"something else: {error.msg.lower()}, at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "bytes that are no Unicode"
    if isinstance(error, RecursionError):
        return "one nested too deeply"
    if "integer string conversion" in str(error):
        return "a number of more than 4,300 digits; write it as a text, in quotes"
    return str(error)[:80]


def parse(where: Any, text: str | bytes, kind: type = dict) -> Any:
    """The JSON object that a text is.

    Args:
        text: as bytes, in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: it is another value, none, or nested too deeply.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, found {problem(error)}") from error
    if not isinstance(content, kind):
        expected = "list" if kind is list else "object"
        raise ValueError(f"{where}: expected a JSON {expected}, found a {type(content).__name__}")
    return content


def validate(
    where: Any, schema: type[pydantic.BaseModel], content: Any, remedy: str
) -> pydantic.BaseModel:
    """JSON values as an object of a class.

    Raises:
        ValueError: a field is missing or of another type; names the first one.
    """
    try:
        return schema.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        expected, actual = "a value", "none"
        if first["type"] != "missing":
            expected = first["msg"].removeprefix("Input should be ").partition(" or instance")[0]
            actual = f"{first['input']!r:.100}"
        raise ValueError(
            f"{where}: {field}: expected {expected}, found {actual}; {remedy}"
        ) from None
