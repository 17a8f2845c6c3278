"""AVIF and HEIC pictures, decoded in processes of limited memory and time.

Their decoders allocate what the coded picture says, which may be a thousand times the size that the
file states, and neither Pillow nor its plugins bound the time. Each process decodes one picture
after the other and ends with the process that started it. A picture that takes too much ends it;
the next picture gets another one.
"""

import contextlib
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import threading
from typing import BinaryIO

from PIL import Image

from xmc_jax.images import decoding

MEMORY = 1 << 30
"""Bytes that a process may take beyond what it has when it starts."""
SECONDS = 20
"""Processor time of one picture."""

_PROCESSES = 2  # at a time
_REQUEST = struct.Struct("<QQQQB")  # bytes, the three limits, alpha
_ANSWER = struct.Struct("<BIIQ")  # kind, width, height, bytes
_PICTURE, _TOO_LARGE, _REFUSED = range(3)
_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_slots = threading.BoundedSemaphore(_PROCESSES)
_idle: list[subprocess.Popen] = []


def decode(data: bytes, limits: decoding.DecodeLimits, alpha: str) -> Image.Image:
    """What `images.decode` returns and raises, of an AVIF or HEIC file."""
    size = (limits.max_bytes, limits.max_pixels, limits.max_side)
    request = _REQUEST.pack(len(data), *size, decoding.ALPHA.index(alpha))
    with _slots:
        process = _idle.pop() if _idle else _start()
        if process.poll() is not None:  # ended from outside since its last picture
            process = _start()
        try:
            process.stdin.write(request + data)
            process.stdin.flush()
            kind, width, height, length = _ANSWER.unpack(_read(process.stdout, _ANSWER.size))
            body = _read(process.stdout, length)
        except (BrokenPipeError, EOFError):
            process.kill()
            late = process.wait() == -signal.SIGXCPU
            raise ValueError(
                f"image: expected a picture that decodes in {SECONDS} s and {MEMORY >> 20} MiB, "
                f"got one that takes more {'time' if late else 'memory'}"
            ) from None
        except BaseException:  # an interrupt between question and answer
            process.kill()
            process.wait()
            raise
        _idle.append(process)
    if kind != _PICTURE:
        raise (decoding.TooLarge if kind == _TOO_LARGE else ValueError)(body.decode())
    return Image.frombytes("RGB", (width, height), body)


def _start() -> subprocess.Popen:
    """A process that runs `serve`."""
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from {__name__} import serve; serve({MEMORY}, {SECONDS})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | dict.fromkeys(_LIBRARIES, "1"),
    )


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve(memory: int, seconds: int) -> None:
    """The process: answers requests until there are no more.

    Args:
        memory: see `MEMORY`.
        seconds: see `SECONDS`.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with its parent
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    decoding.register_plugins(threads=1)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory)
    while request := requests.read(_REQUEST.size):
        size, *limits, alpha = _REQUEST.unpack(request)
        data = _read(requests, size)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        kind, sides, body = _PICTURE, (0, 0), b""
        try:
            picture = decoding.decode_here(
                data, decoding.DecodeLimits(*limits), decoding.ALPHA[alpha]
            )
            sides, body = picture.size, picture.tobytes()
        except decoding.TooLarge as error:
            kind, body = _TOO_LARGE, str(error).encode()
        except ValueError as error:
            kind, body = _REFUSED, str(error).encode()
        except MemoryError:
            return  # as one whose decoder has ended the process
        answers.write(_ANSWER.pack(kind, *sides, len(body)) + body)
        answers.flush()


def _limit(what: int, most: int) -> None:
    """Sets a soft limit; one that is lower already stays."""
    soft, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if what == resource.RLIMIT_CPU or soft == resource.RLIM_INFINITY or most < soft:
        with contextlib.suppress(ValueError):  # below what macOS has already
            resource.setrlimit(what, (most, hard))
