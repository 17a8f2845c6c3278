"""What a folder was made from and what is in it, and how two such accounts differ."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from xmc_jax.files.digests import sha256


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names."""
    fields = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A text for each field that differs: its dotted name, the value then and the value now.

    Args:
        then: JSON values, as written.
        now: JSON values, as they would be written today.
    """
    then, now = flat(then), flat(now)
    return [
        f"{name}: {then.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def files(folder: pathlib.Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, by their path within a folder.

    Args:
        folder: local.
        names: paths within the folder; None for every file below it.
    """
    if names is None:
        found = (path for path in folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(folder).as_posix() for path in found)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def damage(folder: pathlib.Path, recorded: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with the first file that is not as recorded; None if all are.

    Args:
        folder: local.
        recorded: what `files` gave.
    """
    for name, facts in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: expected a file of {facts['bytes']} bytes, found none"
        if path.stat().st_size != facts["bytes"]:
            return f"{path}: expected {facts['bytes']} bytes, found {path.stat().st_size}"
        if sha256(path) != facts["sha256"]:
            return f"{path}: expected the SHA-256 {facts['sha256'][:12]}..., found another"
    return None
