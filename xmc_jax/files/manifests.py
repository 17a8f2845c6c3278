"""What a folder was made from and what is in it, and how two such accounts differ."""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from xmc_jax.files.digests import sha256

_THREADS = 8  # files read at once; of a bucket, each waits for its own


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names."""
    fields = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def difference(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    may_differ: Callable[[str, Any, Any], bool] = lambda name, then, now: False,
) -> list[str]:
    """A text for each field that differs: its dotted name, the value then and the value now.

    Args:
        then: JSON values, as written; nested or flat.
        now: the values today; tuples count as lists, as JSON has them.
        may_differ: whether a field is left out, given its dotted name and both values, None for a
            missing one.
    """
    then, now = (flat(json.loads(json.dumps(values))) for values in (then, now))
    values = {name: (then.get(name), now.get(name)) for name in sorted(then.keys() | now.keys())}
    return [
        f"{name}: {one!r} there, {other!r} here"
        for name, (one, other) in values.items()
        if one != other and not may_differ(name, one, other)
    ]


def names(folder: epath.PathLike) -> list[str]:
    """The paths of all files below a folder, local or remote, within it; sorted.

    Links to files count as files; links to folders, pipes and the like are left out.
    """
    if "://" not in str(folder):
        paths = (pathlib.Path(parent, x) for parent, _, entries in os.walk(folder) for x in entries)
        return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    entries = []
    for path in epath.Path(folder).iterdir():
        below = names(path) if path.is_dir() else None
        entries += [path.name] if below is None else [f"{path.name}/{name}" for name in below]
    return sorted(entries)


def files(folder: epath.PathLike, of: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of files, by their path within a folder.

    Args:
        folder: local or remote.
        of: paths within the folder; None for every file below it.
    """
    folder = epath.Path(folder)
    of = names(folder) if of is None else list(of)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: sha256(folder / name), of)
        sizes = [(folder / name).stat().length for name in of]
        return {
            name: {"bytes": size, "sha256": digest}
            for name, size, digest in zip(of, sizes, digests)
        }


def damage(
    folder: pathlib.Path, recorded: Mapping[str, Mapping[str, Any]], hashed: bool = True
) -> str | None:
    """What is wrong with the first file that is not as recorded; None if all are.

    Args:
        folder: local.
        hashed: whether to read the files; without, only their sizes are compared.
    """
    for name, facts in recorded.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != facts.get("bytes"):
            entries = "no file" if size is None else size
            return f"{path}: expected {facts.get('bytes')} bytes, found {entries}"
        if hashed and (digest := sha256(path)) != facts.get("sha256"):
            return f"{path}: expected sha256 {facts.get('sha256')}, found {digest}"
    return None
