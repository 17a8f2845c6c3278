"""An exported folder in the place of an earlier one, unless work of people would be lost."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from xmc_jax.files import atomic, json_files, locks, manifests
from xmc_jax.files.digests import sha256
from xmc_jax.shipping import cards, contents

RECORD = "export.json"
"""Digests of the files of an exported folder that is no artifact."""
_NAMED = 5  # names of files in an error


@contextlib.contextmanager
def replaced(target: epath.Path, marker: str, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yields a folder that takes the place of an exported one in one move.

    The old folder stays until then; see `atomic.replaced_folder`. No other command exports there or
    changes labels there meanwhile.

    Args:
        target: local or remote.
        marker: file that makes the folder an exported one.
        overwrite: replace the folder whatever is lost.

    Raises:
        ValueError: changed labels, edited texts or files of other origin would be lost; another
            process works there.
    """
    with contextlib.ExitStack() as stack:
        if not atomic.is_remote(target):
            local = pathlib.Path(target)
            local.parent.mkdir(parents=True, exist_ok=True)
            lock = local.with_name(f".{local.name}.lock")
            stack.enter_context(locks.locked(lock, str(target), remove=True))
            atomic.recover_folder(local)
            if local.is_dir():
                stack.enter_context(contents.locked(local))
        _check(target, overwrite)
        with atomic.replaced_folder(target, marker) as folder:
            yield folder
            if not overwrite:
                _check(target, overwrite)  # of what people did meanwhile


def record(folder: pathlib.Path) -> None:
    """Writes `RECORD`: the digests of all files of a folder."""
    content = {"format": 1, "files": manifests.files(folder)}
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n")


def _check(target: epath.Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: expected an exported folder or nothing, found a file")
    lost = _losses(target)
    if lost and overwrite:
        logging.warning("%s: will be replaced, and with it %s", target, "; ".join(lost))
    elif lost:
        raise ValueError(
            f"{target}: expected an exported folder as it was written, found {'; '.join(lost)}; "
            "move the folder away to keep them, or lose them with --overwrite"
        )


def _losses(folder: epath.Path) -> list[str]:
    """Changes by people that would be lost with a folder, in words."""
    if (folder / contents.MANIFEST).exists():
        name = contents.MANIFEST
    elif (folder / RECORD).exists():
        name = RECORD
    else:
        names = contents.settled(manifests.names(folder))
        return [f"no exported folder but {_listed(names)}"] if names else []
    try:
        content = json_files.read(folder / name)
        if name == contents.MANIFEST:
            names, written = contents.others(folder, content), content.get("cards")
            return _changed_labels(content) + _changed_files(folder, names, written)
        written = {name: facts["sha256"] for name, facts in content["files"].items()}
        names = [one for one in contents.settled(manifests.names(folder)) if one != RECORD]
        return _changed_files(folder, names, written)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{name} that cannot be read ({error!r:.80})"]


def _changed_labels(content: Mapping[str, Any]) -> list[str]:
    kinds, changes = ("added", "updated", "removed"), content.get("changes", [])
    counts = (f"{sum(change[kind] for change in changes):,} {kind}" for kind in kinds)
    return [f"changed labels ({', '.join(counts)})"] if changes else []


def _changed_files(
    folder: epath.Path, names: list[str], written: Mapping[str, str] | None
) -> list[str]:
    """Of files, those that are not as they were written."""
    if written is None:
        texts = [name for name in names if name in cards.NAMES]
        edited = [f"{_listed(texts)}, perhaps edited (no digests were kept)"] if texts else []
        others = [name for name in names if name not in cards.NAMES]
    else:
        others = [name for name in names if name not in written]
        changed = (n for n in names if n in written and sha256(folder / n) != written[n])
        edited = [f"an edited {name}" for name in changed]
    return edited + ([f"files of other origin: {_listed(others)}"] if others else [])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
