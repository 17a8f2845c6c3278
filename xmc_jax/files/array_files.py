"""Arrays in files that anyone may have written."""

import contextlib
import io
import pathlib
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def appended(
    path: pathlib.Path, dtype: type, columns: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends rows to a new NumPy file; it is whole when the block ends.

    The file is the one that `np.save` makes of all rows together.

    Args:
        path: local.
        dtype: of the rows.
        columns: of each row.
    """
    count = 0

    def header() -> bytes:
        found = io.BytesIO()  # NumPy leaves room in it for any number of rows
        facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, columns)}
        np.lib.format.write_array_header_1_0(found, facts)
        return found.getvalue()

    with path.open("wb") as file:

        def append(rows: np.ndarray) -> None:
            nonlocal count
            file.write(np.ascontiguousarray(rows, dtype).reshape(-1, columns))
            count += len(rows)

        file.write(header())
        yield append
        file.seek(0)
        file.write(header())
