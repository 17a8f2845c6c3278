"""One process at a time: a lock that names its holder and ends with the process."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import IO

from absl import logging

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def locked(
    path: pathlib.Path,
    what: str,
    wait: bool = False,
    remove: bool = False,
    remedy: str = "wait for it, or stop it",
) -> Iterator[None]:
    """Holds a lock file; the operating system releases it when the process ends, however it ends.

    On a file system without locks a warning says so, and nothing keeps a second process out.

    Args:
        path: the lock file, made if it is missing; its folder must exist.
        what: what the lock protects, for the error of a second process.
        wait: wait for the other process instead of raising.
        remove: whether the file is deleted afterwards.
        remedy: what a second process is told to do.

    Raises:
        ValueError: another process holds the lock; the error names it.
    """
    try:
        file = hold(path, wait)
    except BlockingIOError:
        raise ValueError(
            f"{what}: expected no other process, found {_holder(path)}; {remedy}"
        ) from None
    with file:
        _sign(file)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a failed disk; the lock ends all the same
                file.truncate(0)
                if remove:
                    path.unlink(missing_ok=True)


def hold(path: pathlib.Path, wait: bool = True) -> IO[bytes]:
    """Opens a file for this process alone, until the file is closed; made if it is missing.

    Args:
        path: in a folder that exists; no other process may remove the file but its holder.
        wait: wait for another holder instead of raising.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115, returned
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                _warn(path.parent, error.strerror)
                return file
            file.close()
            raise
        file.close()  # the holder before has removed or renamed the file meanwhile


@functools.cache
def _warn(folder: pathlib.Path, reason: str) -> None:
    logging.warning("%s: nothing keeps a second process out: no locks here (%s)", folder, reason)


def _sign(file: IO[bytes]) -> None:
    """Writes who holds the lock."""
    command = " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": since, "command": command}
    file.truncate(0)
    file.write(json.dumps(holder).encode())
    file.flush()


def _holder(path: pathlib.Path) -> str:
    """One line on the process that holds a lock."""
    try:
        entry = json.loads(path.read_bytes())
        return (
            f"process {entry['pid']} on {entry['host']} since {entry['since']} "
            f"({entry['command']:.200})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "one that has not said its name"
