"""JSON objects in files that anyone may have written; what is none is said in one line."""

import json
import pathlib
from typing import Any

from etils import epath


def read(path: epath.PathLike, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: local or remote.
        optional: {} where there is no such file.

    Raises:
        ValueError: no such file, or something else in it.
    """
    path = epath.Path(path)
    if not is_file(path):
        if optional:
            return {}
        raise ValueError(f"{path}: expected a JSON file, found none")
    return parse(path, path.read_bytes())


def is_file(path: epath.Path) -> bool:
    """Whether there is a file; `epath` also takes pipes for such, and would wait for them."""
    return path.is_file() if "://" in str(path) else pathlib.Path(path).is_file()


def parse(where: Any, text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Args:
        where: what the error begins with.
        text: as bytes, in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: it is another value, none, or nested too deeply.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, found: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(content).__name__}")
    return content
