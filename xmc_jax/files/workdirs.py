"""Workdirs: where one can be, the steps of its checkpoints, the config that it belongs to."""

import contextlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from xmc_jax.config import RunConfig
from xmc_jax.config.run_config import completed
from xmc_jax.files import atomic, json_files, locks, manifests

# Fields that may differ between the run that wrote a workdir and the one that goes on with it.
RESUMABLE = (
    "data.data_dir",
    "data.images.allow_paths",  # the vectors are compared by their digest
    "data.images.source",
    "data.raw_dir",
    "data.records",  # what they are made to is compared by its digest
    "data.records_options",
    "eval",
    "export",
    "mesh",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.eval_every",
    "train.keep",
    "train.non_finite",
    "train.non_finite_limit",
    "train.prefetch",
    "train.stuck_after",
    "tune",
)
_CONFIG, _LOCK = "config.json", ".lock"


def steps(workdir: epath.PathLike) -> list[int]:
    """The steps that a workdir has a committed checkpoint of, ascending, whole or damaged."""
    return [int(path.name) for path in _numbered(absolute(workdir)) if _is_committed(path)]


def strays(workdir: epath.PathLike) -> list[epath.Path]:
    """The local folders of a workdir that are named as a checkpoint and hold no file."""
    folder = absolute(workdir)
    remote = atomic.is_remote(folder)
    return [path for path in _numbered(folder) if not remote and not _is_committed(path)]


def _numbered(workdir: epath.Path) -> list[epath.Path]:
    folder = workdir / "checkpoints"
    paths = folder.iterdir() if folder.exists() else ()
    numbered = [path for path in paths if re.fullmatch("0|[1-9][0-9]*", path.name)]
    return sorted((path for path in numbered if path.is_dir()), key=lambda path: int(path.name))


def _is_committed(path: epath.Path) -> bool:
    """Whether a step's folder got its name as a whole; on gs://, whether its last file is there."""
    if atomic.is_remote(path):
        return (path / "commit_success.txt").exists()
    return _holds_a_file(path)


def _holds_a_file(folder: epath.Path) -> bool:
    return any(_holds_a_file(path) if path.is_dir() else True for path in folder.iterdir())


def check_config(workdir: epath.PathLike, config: Mapping[str, Any], new: bool = True) -> None:
    """Compares a workdir's config with this run's; writes nothing.

    A workdir without a checkpoint takes any config: nothing has been made with the one before.

    Args:
        new: whether the workdir may be a new one.

    Raises:
        ValueError: a field differs that may not (see `RESUMABLE`; `train.epochs` may grow), there
            is no config where there should be, or a run cannot be there.
    """
    workdir = absolute(workdir)
    if new and not steps(workdir):
        return
    then, now = completed(read_config(workdir)), completed(config)
    if differ := manifests.difference(then, now, _may_differ):
        raise ValueError(
            f"{workdir / _CONFIG}: this workdir was made by another config ({'; '.join(differ)}); "
            f"choose another --workdir or give the same config"
        )


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Makes a config the workdir's, unless it is already; see `atomic.write`.

    The first process writes it, others do nothing. Several processes need a barrier before, so
    that all have compared, and one behind; those that then find no config do not see the first
    one's workdir.

    Raises:
        OSError: the disk refuses the write; the config of before is still there.
    """
    if jax.process_index() == 0:
        path = epath.Path(workdir) / _CONFIG
        content = (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
        if not path.exists() or path.read_bytes() != content:
            atomic.write(path, content)


@contextlib.contextmanager
def locked(workdir: epath.PathLike) -> Iterator[None]:
    """Keeps other commands from training in a local workdir; on gs:// nothing does.

    The first process holds the lock, others do nothing. The folder is made if it is missing.

    Raises:
        ValueError: another command trains there; the error names it.
    """
    folder = absolute(workdir)
    if jax.process_index() != 0 or atomic.is_remote(folder):
        yield
        return
    local = pathlib.Path(folder)
    is_new = not local.exists()
    local.mkdir(parents=True, exist_ok=True)
    remedy = "wait for it, stop it, or choose another --workdir"
    try:
        with locks.locked(local / _LOCK, f"{workdir}", remove=True, remedy=remedy):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # of a folder that is no longer empty
                local.rmdir()


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The path of a workdir from any working directory, as Orbax wants it.

    Args:
        workdir: a folder that all processes see, or gs://...

    Raises:
        ValueError: Orbax cannot write there, the client would take the name for a pattern, or it is
            not installed.
    """
    workdir = epath.Path(workdir)
    scheme, remote, name = str(workdir).partition("://")
    if not remote:
        return workdir.resolve()  # of gs://... it would make a relative path
    if scheme != "gs":
        raise ValueError(f"{workdir}: expected a folder or gs://bucket/..., got {scheme}://")
    if set(name) & set("*?[]"):
        raise ValueError(f"{workdir}: expected a name without any of * ? [ ] on gs://")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{workdir}: expected the package gcsfs, found none; pip install 'xmc_jax[gcs]'"
        )
    return workdir


def _may_differ(name: str, then: Any, now: Any) -> bool:
    if name == "train.epochs":
        return type(then) is type(now) is int and now > then
    return any(name == field or name.startswith(field + ".") for field in RESUMABLE)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config a workdir was made with.

    Raises:
        ValueError: there is none, it is not JSON, or a run cannot be there.
    """
    path = absolute(workdir) / _CONFIG
    if not path.exists():
        raise ValueError(f"{path}: expected the config of a run, found no such file")
    return json_files.read(path)


def read_run_config(workdir: epath.PathLike) -> RunConfig:
    """The config of the run in a workdir, which an earlier version may have written.

    Raises:
        ValueError: see `read_config`; or a field is not one of a config.
    """
    try:
        return RunConfig.from_dict(read_config(workdir))
    except ValueError as error:
        path = absolute(workdir) / _CONFIG
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
