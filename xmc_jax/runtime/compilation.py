"""Compiled programs kept on disk: a second start finds them instead of compiling again."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
from typing import Any

import filelock
import jax
from absl import logging
from etils import epath

from xmc_jax.runtime import distributed

OFF = "off"
_MAX_BYTES = 5 * 2**30  # the programs used longest ago go first
_MIN_FREE_BYTES = 2**28  # a full disk is said once, here, not by JAX for each program
_MIN_SECONDS = 0.1  # to compile; below it, reading a program is no quicker


def keep(folder: str | None) -> None:
    """Has JAX keep compiled programs; goes on without if the folder cannot be written.

    Programs are code: who can write to the folder can have this process do anything.

    Args:
        folder: local, or any that `epath` knows; "off" for none; None for the user's own.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    path = epath.Path(folder or _default()) / _machine()
    writes = distributed.number() == 0  # the others only read
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if writes and not _is_remote(path):
            _tidy(pathlib.Path(path))
    except (OSError, filelock.Timeout) as error:
        logging.warning(
            "%s: compiled programs are not kept: %s; see --compilation_cache", path, error
        )
        return
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": _MIN_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        # With a bound JAX locks the folder to read too: not where many do, nor at a remote one.
        "jax_compilation_cache_max_size": _MAX_BYTES if writes and not _is_remote(path) else -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)


def _default() -> pathlib.Path:
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(caches, "xmc_jax", "compiled")


def _is_remote(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def _machine() -> str:
    """A folder's name for what makes programs of no use elsewhere: versions and CPU features."""
    features = platform.processor()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    versions = (f"{name}-{importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    return "-".join((*versions, platform.machine(), digest))


def _tidy(folder: pathlib.Path) -> None:
    """Removes what a killed process left half-written: JAX would stumble over it at each start."""
    if shutil.disk_usage(folder).free < _MIN_FREE_BYTES:
        raise OSError("the disk is full")
    with filelock.FileLock(folder / ".lockfile", timeout=10):  # JAX's own
        programs = {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}
        whole = {path.name.removesuffix("-atime") for path in folder.glob("*-atime")}
        for name in programs ^ whole:  # the second file is written when the first is complete
            (folder / f"{name}-cache").unlink(missing_ok=True)
            (folder / f"{name}-atime").unlink(missing_ok=True)
