"""Paths that a table names: confined to the folder of the table unless the user allows others."""

import os
import pathlib


def within(folder: str | os.PathLike, name: str, allow: bool = False) -> pathlib.Path:
    """The path of a file that a table names.

    Without `allow`, the path must lie below `folder` after all `..` and links are followed; it may
    be absolute. Open the returned path, not `folder / name`: it has no links left.

    Args:
        folder: local; where relative names begin, usually the folder of the table.
        allow: whether the path may lie elsewhere.

    Raises:
        ValueError: the path lies elsewhere, or the name cannot be a path.
    """
    path = os.path.join(folder, name)
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("a null byte")
    except ValueError:  # UnicodeEncodeError of half a surrogate pair, too
        raise ValueError(f"not a path: {name!r:.200}") from None
    if allow:
        return pathlib.Path(path)
    root, real = os.path.realpath(folder), os.path.realpath(path)
    if real != root and not real.startswith(os.path.join(root, "")):
        raise ValueError(
            f"{name!r:.200}: expected a path within the folder of its table, found one that leads "
            "out of it; move the file there, or set allow_paths"
        )
    return pathlib.Path(real)
