"""Runs a reader under guards: what it says, how long it takes, and what it does besides reading."""

import contextlib
import faulthandler
import os
import pathlib
import resource
import signal
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 10
_KIBIBYTES = 1 << 19  # that the largest size of the process may grow by

# Where code comes from that was installed; anything else that is executed was read.
_INSTALLED = (
    *{
        str(form)
        for kind in ("stdlib", "purelib")
        for form in (
            pathlib.Path(sysconfig.get_path(kind)),
            pathlib.Path(sysconfig.get_path(kind)).resolve(),
        )
    },
    str(pathlib.Path(__file__).resolve().parents[1] / "xmc_jax"),
    "<frozen",
)
_ALWAYS = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn",
    "pickle.find_class", "marshal.load", "marshal.loads", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "subprocess.Popen", "ctypes.dlopen", "urllib.Request", "webbrowser.open",
)  # fmt: skip
_CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watching: list["_Watch"] = []


class Hang(BaseException):
    """It takes too long."""


class _Watch:
    """What happens while a reader runs.

    Attributes:
        folder: the only one that may be written in.
        found: what must not happen.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = str(folder.resolve())
        self.found: list[str] = []

    def see(self, event: str, arguments: tuple) -> None:
        if event == "marshal.loads" and _imported():
            return
        if event in _ALWAYS:
            self.found.append(f"{event} {arguments!r:.100}")
        elif event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if not file.startswith(_INSTALLED) and not _generated(arguments[0]):
                self.found.append(f"exec of {file!r:.100}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes) and flags & _WRITING:
                self._written(event, os.fsdecode(path))
        elif event in _CHANGES and isinstance(arguments[0], str | bytes):
            folder = arguments[-1] if isinstance(arguments[-1], int) else -1
            start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
            self._written(event, os.path.join(start, os.fsdecode(arguments[0])))

    def _written(self, event: str, path: str) -> None:
        real = os.path.realpath(path)
        if real != os.devnull and not f"{real}/".startswith(f"{self.folder}/"):
            self.found.append(f"{event} of {path!r:.100}")


def _imported() -> bool:
    """Whether it is Python that reads a module which was compiled before."""
    return sys._getframe(3).f_code.co_filename.startswith("<frozen importlib")


def _generated(code: Any) -> bool:
    """Whether installed code made it: of a dataclass, say, in a module that is imported late."""
    frame = sys._getframe(3)
    return frame.f_code.co_filename.startswith(_INSTALLED[:-2]) and code.co_filename == "<string>"


def _hook(event: str, arguments: tuple) -> None:
    if _watching:
        _watching[-1].see(event, arguments)


sys.addaudithook(_hook)  # for the life of the process; without a watch it does nothing


@contextlib.contextmanager
def watched(folder: pathlib.Path) -> Iterator[list[str]]:
    """Gives a list of what is executed, connected to, or written outside of a folder meanwhile."""
    before, compiled = tempfile.tempdir, sys.dont_write_bytecode
    tempfile.tempdir, sys.dont_write_bytecode = str(folder), True
    watch = _Watch(folder)
    _watching.append(watch)
    try:
        yield watch.found
    finally:
        _watching.remove(watch)
        tempfile.tempdir, sys.dont_write_bytecode = before, compiled


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """AssertionError if the process's largest size grows by more than half a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _KIBIBYTES, f"grew by {grown >> 10} MiB"


def outcome(read: Callable[[pathlib.Path], Any], where: pathlib.Path) -> str | None:
    """The message of a refusal, None where it was read; anything else that is raised goes on."""

    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # of this process's own time
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True)  # stuck in compiled code
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(where)
        return None
    except (ValueError, OSError) as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 4000, f"said {said[:300]!r}"
        return said
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
