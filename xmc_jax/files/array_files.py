"""Arrays in NumPy files: those that anyone may have written, and large ones written in parts."""

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np


def mapped(path: pathlib.Path) -> np.ndarray:
    """The array in a NumPy file, memory-mapped and read-only; never an object.

    Raises:
        ValueError: there is none; why, in one line.
    """
    try:
        return np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except Exception as error:  # a damaged header raises a dozen types; all mean the same here
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def save(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes what `np.save` writes; a full disk is an error that says so, which there it is not.

    Args:
        path: local.

    Raises:
        OSError: the disk refuses the write.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)
    with path.open("wb") as file:
        file.write(header(array.dtype, array.shape))
        file.write(array.data if array.size else b"")


@contextlib.contextmanager
def appended(
    path: pathlib.Path, dtype: type, columns: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends rows to a new NumPy file; it is whole when the block ends.

    The file is the one that `np.save` makes of all rows together.

    Args:
        path: local.
    """
    count = 0
    with path.open("wb") as file:

        def append(rows: np.ndarray) -> None:
            nonlocal count
            file.write(np.ascontiguousarray(rows, dtype).reshape(-1, columns))
            count += len(rows)

        file.write(header(np.dtype(dtype), (0, columns)))
        yield append
        file.seek(0)
        file.write(header(np.dtype(dtype), (count, columns)))


def create(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A memory-mapped array that fills an empty file; `flush` writes what was put into it.

    The disk keeps the room from here on: without, a full one ends the process as it is written to.

    Raises:
        OSError: the disk is too small.
    """
    file.write(header(np.dtype(dtype), shape))
    file.flush()
    begin, size = file.tell(), math.prod(shape) * np.dtype(dtype).itemsize
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), begin, size)
    return np.memmap(file, dtype, "r+", begin, shape)


def header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The bytes before an array's values; as many for any number of rows."""
    file = io.BytesIO()
    facts = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue()
