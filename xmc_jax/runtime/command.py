"""What commands share: flags, errors in one line, exit codes, streams, log lines, memory."""

import argparse
import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Parsed = TypeVar("Parsed")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors of one line, where argparse prints the usage too."""

    def error(self, message):
        if wrong := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message):
            flag, kind, value = wrong.groups()
            expected = {"int": "a whole number, such as 1000", "float": "a number, such as 0.5"}
            message = f"{flag}: expected {expected[kind]}, got {value:.60}"
        raise ValueError(f"{message}; see --help")


def run(name: str, parse: Callable[[], Parsed], act: Callable[[Parsed], None]) -> int:
    """Runs a command.

    Args:
        name: what its errors begin with.
        parse: flags to what `act` takes; a ValueError is a mistaken flag.
        act: does the work and prints what there is to say; a ValueError is bad data.

    Returns:
        The exit status: 0, 1 for bad data, 2 for bad flags, 130 if interrupted, 141 if nobody
        reads standard output any longer.
    """
    open_standard_streams()
    try:
        parsed = parse()
    except ValueError as error:
        return _said(name, error, 2)
    try:
        act(parsed)
    except OSError as error:
        code, said = lost_output(error) or (1, explained(error))
    except ValueError as error:
        code, said = 1, error
    except KeyboardInterrupt:
        code, said = 130, "interrupted; run the same command again"
    else:
        code, said = lost_output() or (0, "")
    return _said(name, said, code) if code else 0


def open_standard_streams() -> tuple[str, ...]:
    """Opens the null device in place of each standard stream that is closed, as by `<&-`.

    Else the next file that is opened would get the stream's number, and what is printed would be
    written there. To be called first.

    Returns:
        The names of those that were closed: "stdin", "stdout", "stderr".
    """
    closed = tuple(name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None)
    for name in closed:  # ascending: each gets the lowest number that is free, its own
        stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115, as long as us
        os.set_inheritable(stream.fileno(), True)
        setattr(sys, name, stream)
    return closed


def explained(error: Exception) -> str:
    """The text of an error; for an OSError the file and the reason, without numbers."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or repr(error)
    said = error.strerror.lower()
    if error.filename is not None:
        said = f"{error.filename}: {said}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += "; make room and run the same command again"
    return said


def lost_output(error: OSError | None = None) -> tuple[int, str] | None:
    """Exit status and error of a command whose standard output takes no more; else None.

    What was printed is written out. If that fails, all that follows goes to the null device, so
    that nothing more is said of it.
    """
    try:
        sys.stdout.flush()
        failure = error if isinstance(error, BrokenPipeError) else None
    except OSError as refused:
        failure = refused
    if failure is None:
        return None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    code = 128 + signal.SIGPIPE if isinstance(failure, BrokenPipeError) else 1
    return code, f"standard output: {failure.strerror}"


def without_native_log() -> None:
    """Keeps what XLA logs out of standard error; what fails is raised in Python as well.

    To be called before JAX is imported. TF_CPP_MIN_LOG_LEVEL=0 in the environment shows it all.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


# A line that Abseil logs from C++, unless it is an error, and the line before its first.
_NATIVE_LINE = re.compile(rb"[IW]\d{4} \d\d:\d\d:\d\d|WARNING: All log messages before absl::Init")
_redirected = threading.Lock()


@contextlib.contextmanager
def native_log_left_out() -> Iterator[None]:
    """Within it, lines that a C++ library logs to standard error are left out, but for errors.

    For libraries that no variable silences. Whatever else is written to the file descriptor comes
    at the end of the block; what Python prints to `sys.stderr` comes at once.
    """
    with _redirected, tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        kept, python = os.dup(2), sys.stderr
        os.dup2(written.fileno(), 2)
        sys.stderr = open(kept, "w", buffering=1, closefd=False)  # noqa: SIM115, closed below
        try:
            yield
        finally:
            sys.stderr.close()
            sys.stderr = python
            sys.stderr.flush()
            os.dup2(kept, 2)
            written.seek(0)
            for line in written:
                if not _NATIVE_LINE.match(line):
                    os.write(kept, line)
            os.close(kept)


def keep_freed_memory() -> None:
    """Lets glibc reuse the buffers of a step instead of returning them to the kernel after each.

    A step on CPU otherwise faults about 1.3 GB of pages in anew, an eighth of its time, and a block
    of scores a third of it. To be called first. The values are those of <malloc.h>: one arena, no
    allocation by mmap, no trimming.
    """
    c = ctypes.CDLL(None)
    if hasattr(c, "mallopt"):  # not in other C libraries
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        c.mallopt(m_arena_max, 1)
        c.mallopt(m_mmap_max, 0)
        c.mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Gives back to the kernel what `keep_freed_memory` kept, as of a model that was replaced.

    Kept memory falls into pieces: where a small block lies in a large one's place, the next large
    one is put behind it.
    """
    c = ctypes.CDLL(None)
    if hasattr(c, "malloc_trim"):
        c.malloc_trim(0)


def _said(name: str, error: Exception | str, status: int) -> int:
    print(f"{name}: {str(error).removeprefix(f'{name}: ')}", file=sys.stderr)
    return status
