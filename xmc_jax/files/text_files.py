"""Text files that anyone may have written: plain or gzipped, UTF-8, UTF-16 or UTF-32.

Whether a file is gzipped, and its encoding, is told from its first bytes. All is read in bounded
memory.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

MAX_LINE = 16 << 20
"""Most bytes of a line, unless a reader says otherwise."""

BLOCK = 1 << 20
"""Bytes of a block, about; see `TextFile.blocks`."""

# A file that is compressed far better than texts and numbers are was made to fill the memory. The
# first bytes are free; those after them may be so many times those of the file. A line counts as
# some more bytes, as it takes time even where it is empty.
_FREE_BYTES, _EXPANSION, _LINE_BYTES = 1 << 24, 100, 64

_GZIP = b"\x1f\x8b"
_OTHERS = (
    (b"PK\x03\x04", "a ZIP archive, such as an Excel workbook; save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV UTF-8"),
    (b"PAR1", "a Parquet file; give it a name ending in .parquet"),
    (b"BZh", "a bzip2 file; decompress it with bunzip2"),
    (b"\xfd7zXZ", "an xz file; decompress it with unxz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file; decompress it with zstd -d"),
)
_UTF16 = "UTF-16 without a byte order mark; convert it with iconv -f UTF-16{} -t UTF-8"
_MARKS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class TextFile:
    """A text file. What is read of it is UTF-8, whatever the file's own encoding is.

    Attributes:
        path: the file.
        zipped: whether it is a gzip file.
        encoding: "UTF-8", "UTF-16" or "UTF-32".
        begin: bytes of the byte order mark, if `plain`.

    Raises:
        ValueError: the file cannot be read, or is no text; says what it is where that is known.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        with self._errors():
            with path.open("rb") as file:
                start = file.read(8)
            self.zipped = path.suffix.lower() == ".gz" or start.startswith(_GZIP)
            if self.zipped:
                if not start:  # which gzip takes for empty contents
                    raise EOFError
                with gzip.open(path, "rb") as file:
                    start = file.read(8)
        for mark, kind in _OTHERS:
            if start.startswith(mark):
                raise ValueError(f"{path}: expected text, found {kind}")
        self.begin = len(codecs.BOM_UTF8) * start.startswith(codecs.BOM_UTF8)
        self.encoding = next((e for mark, e in _MARKS if start.startswith(mark)), "UTF-8")
        if self.encoding == "UTF-8" and len(start) == 8:
            for odd, name in ((1, "LE"), (0, "BE")):
                if not any(start[odd::2]):
                    problem = _UTF16.format(name)
                    raise ValueError(f"{path}: expected text in UTF-8, found {problem}")

    @property
    def plain(self) -> bool:
        """Whether what is read are the bytes of the file, but for a byte order mark."""
        return not self.zipped and self.encoding == "UTF-8"

    def lines(self, limit: int = MAX_LINE) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers from 1 and their ends, without a byte order mark.

        Args:
            limit: most bytes of a line.

        Raises:
            ValueError: the file is a damaged gzip file or one that grows more than a hundredfold,
                is not in its encoding, or has a longer line.
        """
        with self._opened() as file:
            left = self._most()
            for number in itertools.count(1):
                line = _encoded(file.readline(limit + 1))
                if not line:
                    return
                left -= len(line) + _LINE_BYTES
                if left < 0:
                    raise self._grown(f"{self.path}:{number}")
                if len(line) > limit:
                    raise ValueError(
                        f"{self.path}:{number}: expected a line of at most {limit} bytes, found a "
                        "longer one"
                    )
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line

    def blocks(self) -> Iterator[bytes]:
        """Some bytes after the others, without a byte order mark.

        Raises:
            ValueError: as of `lines`, but for long lines.
        """
        with self._opened() as file:
            left = self._most()
            for number in itertools.count():
                block = _encoded(file.read(BLOCK))
                if not block:
                    return
                left -= len(block)
                if left < 0:
                    raise self._grown(str(self.path))
                yield block.removeprefix(codecs.BOM_UTF8) if number == 0 else block

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[Any]]:
        with self._errors(), contextlib.ExitStack() as stack:
            opener = gzip.open if self.zipped else open
            file = stack.enter_context(opener(self.path, "rb"))
            if self.encoding != "UTF-8":
                file = stack.enter_context(
                    io.TextIOWrapper(file, encoding=self.encoding, newline="\n")
                )
            yield file

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self.path}: expected a whole gzip file, found a damaged or cut one; download "
                "it again"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path}: expected {self.encoding}, as its first bytes say, found something "
                "else"
            ) from error
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _most(self) -> float:
        return most_bytes(self.path) if self.zipped else math.inf

    def _grown(self, where: str) -> ValueError:
        return ValueError(
            f"{where}: expected a gzip file of at most {_EXPANSION} times its size, found a larger "
            "one; decompress it yourself if it is meant so"
        )


def most_bytes(path: pathlib.Path) -> int:
    """Bytes that a compressed file may hold: a hundred times its own, and some that are free."""
    return _FREE_BYTES + _EXPANSION * path.stat().st_size


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
