"""What a folder was made from and what is in it, and how two such accounts differ."""

import concurrent.futures
import json
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
    """The paths of all files below a folder, local or remote, within it; sorted."""
    found = []
    for path in epath.Path(folder).iterdir():
        if path.is_dir():
            found += [f"{path.name}/{name}" for name in names(path)]
        else:
            found.append(path.name)
    return sorted(found)


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
