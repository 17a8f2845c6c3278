"""A kill or a full disk at each write of an action, within this process: `import write_faults`.

    for fault in write_faults.each(folder, action):
        with fault:
            action()
        ...  # what is there now

Writes are what Python's audit events tell: files opened for writing, folders made, names changed
and removed, below a folder. From a kill on nothing is written or removed any more, as if the
process were gone. A full disk refuses one write and lets the rest of the action clean up.
"""

import contextlib
import errno
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

KINDS = ("kill", "full disk")
_FLAGS = os.O_WRONLY | os.O_RDWR
_NAMES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
_watching: list[Callable[[], None]] = []
_folder = ""


class Killed(BaseException):
    """The end of the process, for all that the action can see."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or not (event == "open" or event in _NAMES):
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    if event == "open" and not arguments[2] & _FLAGS:
        return
    if os.path.abspath(os.fsdecode(path)).startswith(_folder):
        _watching[-1]()


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watched(folder: pathlib.Path, told: Callable[[], None]) -> Iterator[None]:
    global _folder
    _folder = str(folder)
    _watching.append(told)
    try:
        yield
    finally:
        _watching.pop()


def count(folder: pathlib.Path, action: Callable[[], Any]) -> int:
    """How many writes an action does below a folder."""
    writes = []
    with _watched(folder, lambda: writes.append(1)):
        action()
    return len(writes)


@contextlib.contextmanager
def at(folder: pathlib.Path, number: int, kind: str) -> Iterator[None]:
    """Lets the write of this number, from 0, fail; the block must end by that.

    Args:
        folder: where writes count.
        number: which one.
        kind: of `KINDS`.
    """
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        if kind == "kill" and done > number:
            raise Killed
        if kind == "full disk" and done == number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _watched(folder, told):
        try:
            yield
        except Killed:
            return
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            return
    assert done > number, f"expected more than {number} writes, found {done}"
