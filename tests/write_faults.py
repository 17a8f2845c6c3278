"""A kill or a full disk at each write of an action, within this process: `import write_faults`.

    for number in range(write_faults.count(folder, action)):
        with write_faults.at(folder, number, kind):
            action()
        ...  # what is there now

Writes are files opened for writing, folders made, names changed, exchanged and removed, which
Python's audit events tell, and waiting for the disk; below a folder and in this thread. From a kill
on nothing is written or removed any more, as if the process were gone. A full disk refuses that
write and all that need room after it, and lets the action clean up. No disk is waited for.
"""

import contextlib
import errno
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from xmc_jax.files import atomic

KINDS = ("kill", "full disk")
_FLAGS = os.O_WRONLY | os.O_RDWR
# Event -> where its arguments have a path and, if at all, the folder that the path is relative to.
_EVENTS = {
    "open": (0, None),
    "os.link": (1, 3),
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rename": (0, 2),
    "os.rmdir": (0, 1),
    "os.truncate": (0, None),
}
_REMOVALS, _MOVES = ("os.remove", "os.rmdir"), ("os.rename", "exchange")
_watching: list[tuple[int, str, tuple[str, ...], Callable[[str], None]]] = []


class Killed(BaseException):
    """The end of the process, for all that the action can see."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in _EVENTS or threading.get_ident() != _watching[-1][0]:
        return
    if event == "open" and not arguments[2] & _FLAGS:
        return
    path, within = _EVENTS[event]
    folder = arguments[within] if within is not None else -1
    _tell(event, arguments[path], "" if folder == -1 else f"/proc/self/fd/{folder}")


def _tell(event: str, path: Any, within: str = "") -> None:
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    _, folder, apart, told = _watching[-1]
    path = os.path.join(os.path.realpath(within) if within else "", os.fsdecode(path))
    path = os.path.abspath(path)
    if path.startswith(folder) and not set(apart).intersection(path.split(os.sep)):
        told(event)


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watched(
    folder: pathlib.Path, apart: tuple[str, ...], told: Callable[[str], None]
) -> Iterator[None]:
    exchanged = atomic._exchanged

    def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
        _tell("exchange", one)
        return exchanged(one, other)

    _watching.append((threading.get_ident(), str(folder), apart, told))
    try:
        with (
            mock.patch.object(atomic, "_exchanged", exchange),
            mock.patch.object(os, "fsync", lambda number: _tell("fsync", number)),
        ):
            yield
    finally:
        _watching.pop()


def count(folder: pathlib.Path, action: Callable[[], Any], apart: tuple[str, ...] = ()) -> int:
    """How many writes an action does below a folder, but for those in folders of some names."""
    writes = []
    with _watched(folder, apart, writes.append):
        action()
    return len(writes)


@contextlib.contextmanager
def at(
    folder: pathlib.Path, number: int, kind: str, apart: tuple[str, ...] = ()
) -> Iterator[list[str]]:
    """Lets the write of this number, from 0, fail; the block must end by that.

    Args:
        folder: where writes count.
        number: which one.
        kind: of `KINDS`.
        apart: names of folders whose files do not count.

    Yields:
        The events of the writes up to now.
    """
    events: list[str] = []

    def told(event: str) -> None:
        events.append(event)
        if kind == "kill" and len(events) > number:
            raise Killed
        allowed = _REMOVALS if len(events) == number + 1 else _REMOVALS + _MOVES
        if kind == "full disk" and len(events) > number and event not in allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _watched(folder, apart, told):
        try:
            yield events
        except Killed:
            return
        except OSError as error:
            assert error.errno == errno.ENOSPC or "No space left" in str(error), error
            return
    assert len(events) > number, f"expected more than {number} writes, found {len(events)}"
