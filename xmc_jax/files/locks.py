"""One process at a time: a lock that names its holder and ends with the process."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def locked(
    path: pathlib.Path, what: str, wait: bool = False, remove: bool = False
) -> Iterator[None]:
    """Holds a lock file; the operating system releases it when the process ends, however it ends.

    Args:
        path: the lock file, made if it is missing; its folder must exist.
        what: what the lock protects, for the error of a second process.
        wait: wait for the other process instead of raising.
        remove: whether the file is deleted afterwards.

    Raises:
        ValueError: another process holds the lock; the error names it.
    """
    while True:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(
                    f"{what}: expected no other process, found {_holder(file.read())}; wait for "
                    "it, or stop it"
                ) from None
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the holder before has removed the file meanwhile
            _sign(file)
            try:
                yield
            finally:
                file.truncate(0)
                if remove:
                    path.unlink(missing_ok=True)
            return


def _sign(file) -> None:
    """Writes who holds the lock."""
    command = " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": since, "command": command}
    file.seek(0)
    file.truncate(0)
    file.write(json.dumps(holder))
    file.flush()


def _holder(text: str) -> str:
    """One line on the process that holds a lock."""
    try:
        found = json.loads(text)
        return (
            f"process {found['pid']} on {found['host']} since {found['since']} "
            f"({found['command']:.200})"
        )
    except (ValueError, KeyError, TypeError):
        return "one that has not said its name"
