"""What proves a checkpoint whole: digests of its files, written into it before it is committed.

<step>/digests.json names every file with its size and SHA-256, the format and what wrote it. Two
files are written by the commit itself, after it; nothing is read from them, and their digests
follow in <step>/committed.json. What an evaluation of the checkpoint found follows in
<step>/evaluation.json. These three files carry a digest of themselves.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from xmc_jax.files import atomic, json_files, manifests
from xmc_jax.files.digests import sha256

FORMAT = 2
"""Version of what a checkpoint holds; 1 had no digests."""
MANIFEST, SEAL, EVALUATION = "digests.json", "committed.json", "evaluation.json"
MARK = {"xmc_jax": FORMAT}
"""What Orbax's own description of a checkpoint has to carry as custom metadata."""

_DESCRIPTION = "_CHECKPOINT_METADATA"
_OF_COMMIT = (_DESCRIPTION, "commit_success.txt")
_OF_EVALUATION = ("format", "history", "metrics")
_PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "tensorstore")
_THREADS = 8  # files read at once; of a bucket, each waits for its own


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a look at a checkpoint gave.

    Attributes:
        kind: "whole"; "unproven", of format 1, whose files may be damaged; "damaged"; "newer", of a
            format that this version does not know.
        reason: why it is not whole, in one line; "" if it is.
    """

    kind: str
    reason: str = ""


class _Damaged(Exception):
    """Says what is wrong with a file."""


def write(folder: epath.Path, step: int) -> None:
    """Writes the digests of all files of a checkpoint that is about to be committed.

    Args:
        folder: of the checkpoint, not under its final name yet.
        step: of the checkpoint.
    """
    later = (MANIFEST, SEAL, *_OF_COMMIT)
    files = manifests.files(folder, [x for x in manifests.names(folder) if x not in later])
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    content = {"format": FORMAT, "step": step, "packages": packages, "files": files}
    atomic.write(folder / MANIFEST, _text(content))


def seal(folder: epath.Path) -> None:
    """Writes the digests of what the commit of a checkpoint wrote; in one move.

    Args:
        folder: of a checkpoint that was just committed.
    """
    files = manifests.files(folder, _OF_COMMIT)
    atomic.write(folder / SEAL, _text({"format": FORMAT, "files": files}))


def write_evaluation(
    folder: epath.Path, metrics: Mapping[str, float], history: Mapping[str, Any]
) -> None:
    """Adds what an evaluation found to a committed checkpoint; in one move.

    Args:
        folder: of the checkpoint.
        metrics: of the evaluation.
        history: as of `metrics_log.Reporter.history`, after the evaluation; it replaces the history
            that the checkpoint was written with.
    """
    content = {"format": FORMAT, "metrics": dict(metrics), "history": dict(history)}
    atomic.write(folder / EVALUATION, _text(content))


def read_evaluation(folder: epath.Path) -> dict[str, Any] | None:
    """The "metrics" and the "history" of `write_evaluation`; None without an evaluation.

    Args:
        folder: of a checkpoint that `examine` finds whole or unproven. Up to November 2026
            checkpoints were saved after their evaluation and hold its metrics themselves; of these
            the history is None here.
    """
    if (folder / EVALUATION).exists():
        return _read(folder / EVALUATION, _OF_EVALUATION)
    metrics = folder / "metrics" / "metrics"
    scores = _json(metrics) if metrics.exists() else {}
    return {"metrics": scores, "history": None} if scores else None


def examine(
    folder: epath.Path, step: int, part: int = 0, parts: int = 1, hashed: bool = True
) -> Finding:
    """Compares a committed checkpoint with its digests.

    Args:
        folder: of the checkpoint.
        step: of the checkpoint.
        part: of several processes that look at it together, which this is.
        parts: how many there are; each reads its share of the files.
        hashed: whether to read the files; without, only their sizes are compared.

    Raises:
        OSError: a file cannot be read for a reason that says nothing about what is in it.
    """
    try:
        if not (folder / MANIFEST).exists():
            return _without_manifest(folder)
        manifest = _read(folder / MANIFEST, ("files", "format", "packages", "step"))
        if (version := manifest.get("format")) != FORMAT:
            return Finding(
                "newer",
                f"{MANIFEST}: expected format {FORMAT}, got {version!r}: a checkpoint of another "
                "version of xmc_jax; go on with that one",
            )
        if manifest["step"] != step:
            raise _Damaged(f"{MANIFEST}: expected step {step}, got {manifest['step']!r}")
        if (folder / EVALUATION).exists():
            _read(folder / EVALUATION, _OF_EVALUATION)
        files = manifest["files"]
        names = sorted(files)[part::parts]
        if (folder / SEAL).exists():
            files = files | _read(folder / SEAL, ("files", "format"))["files"]
            names += _OF_COMMIT
        else:  # the run goes on, or ended between a commit and its next call
            _check_commit(folder)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            problems = pool.map(lambda name: _problem(folder, name, files[name], hashed), names)
            if problem := next(filter(None, problems), ""):
                raise _Damaged(problem)
    except _Damaged as damaged:
        return Finding("damaged", str(damaged))
    return Finding("whole")


def _without_manifest(folder: epath.Path) -> Finding:
    """Of format 1, or damaged, or not ours: what Orbax wrote tells."""
    description = _json(folder / _DESCRIPTION)
    handlers = description.get("item_handlers")
    if description.get("custom_metadata"):
        raise _Damaged(f"{MANIFEST}: expected the digests of its files, found no such file")
    if not isinstance(handlers, dict) or not handlers.keys() >= {"state", "history"}:
        raise _Damaged(
            "expected a checkpoint of xmc_jax with state and history, found one of "
            f"{sorted(handlers) if isinstance(handlers, dict) else handlers!r:.80}"
        )
    _json(folder / "state" / "_METADATA")
    for item, name in (("history", "metadata"), ("metrics", "metrics")):
        _json(folder / item / name)
    return Finding("unproven", "a checkpoint of format 1, which has no digests of its files")


def _check_commit(folder: epath.Path) -> None:
    """Raises `_Damaged` unless what the commit wrote is there."""
    if _json(folder / _DESCRIPTION).get("custom_metadata") != MARK:
        raise _Damaged(f"{_DESCRIPTION}: expected custom metadata {MARK}, got other")
    name = _OF_COMMIT[1]
    if not (folder / name).exists() or not (folder / name).stat().length:
        raise _Damaged(f"{name}: expected a note of the commit, found none")


def _problem(folder: epath.Path, name: str, recorded: Any, hashed: bool) -> str:
    """What is wrong with one file; "" if nothing is."""
    path = folder / name
    try:
        size = path.stat().length if json_files.is_file(path) else None
        if size is None or size != recorded["bytes"]:
            size_text = "no such file" if size is None else f"{size} bytes"
            return f"{name}: expected {recorded['bytes']} bytes, found {size_text}"
        if hashed and (digest := sha256(path)) != recorded["sha256"]:
            return f"{name}: expected sha256 {recorded['sha256'][:16]}..., found {digest[:16]}..."
    except FileNotFoundError:
        return f"{name}: expected {recorded['bytes']} bytes, found no such file"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name}: expected {recorded['bytes']} bytes, found {error.strerror}"
    return ""


def _read(path: epath.Path, keys: Iterable[str]) -> dict[str, Any]:
    """A file that `_text` made, bit for bit, or `_Damaged`."""
    data = _bytes(path)
    content = _parsed(path, data)
    digest = content.pop("sha256", None)
    if digest != _digest(content) or _text(content).encode() != data:
        raise _Damaged(f"{path.name}: expected its own sha256, found another content")
    # A digest that fits is of what some version wrote; its format says the rest.
    if content.get("format") == FORMAT and set(content) != set(keys):
        raise _Damaged(f"{path.name}: expected {sorted(keys)}, found {sorted(content)}")
    return content


def _json(path: epath.Path) -> dict[str, Any]:
    """A file's JSON object, or `_Damaged`."""
    return _parsed(path, _bytes(path))


def _bytes(path: epath.Path) -> bytes:
    try:
        if not json_files.is_file(path):
            raise FileNotFoundError
        return path.read_bytes()
    except FileNotFoundError:
        raise _Damaged(f"{_within_step(path)}: expected a file, found none") from None
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise _Damaged(f"{_within_step(path)}: expected a file, found {error.strerror}") from None


def _parsed(path: epath.Path, data: bytes) -> dict[str, Any]:
    try:
        return json_files.parse(_within_step(path), data)
    except ValueError as error:
        raise _Damaged(str(error)) from None


def _within_step(path: epath.Path) -> str:
    item = path.parent.name
    return path.name if item.isdecimal() else f"{item}/{path.name}"


def _text(content: Mapping[str, Any]) -> str:
    """JSON of a content with its digest, the only text that stands for it."""
    whole = {**content, "sha256": _digest(content)}
    return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
