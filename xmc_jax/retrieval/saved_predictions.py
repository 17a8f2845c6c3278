"""Predictions of evaluations in a workdir: where they are, and those of some documents read again.

`evaluate.write_predictions` writes them.
"""

import dataclasses
import math
import re
import zipfile
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from xmc_jax.runtime.wording import counted

_BLOCK_BYTES = 1 << 24  # of predictions read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class RankedLabels:
    """Predictions of m documents.

    Attributes:
        ids: i32[m, k] label ids, best first; -1 where there is no prediction.
        scores: f32[m, k], -inf where there is no prediction; None where they were not asked for.
    """

    ids: np.ndarray
    scores: np.ndarray | None


def path(workdir: epath.PathLike, step: int) -> epath.Path:
    """Path of the predictions of an evaluation. Those of zero-shot have step 0."""
    return epath.Path(workdir) / "predictions" / f"{step}.npz"


def read(
    path: epath.PathLike, documents: np.ndarray, count: int, scores: bool = True
) -> dict[str, RankedLabels]:
    """Rows of predictions of some documents; of the others no more than a block is held.

    Args:
        path: what `evaluate.write_predictions` wrote, local or remote.
        documents: i64[m], ascending, among those that the file has.
        count: M, how many test documents there are.
        scores: whether they are read, too.

    Raises:
        ValueError: it is no such file, or of other data.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            rows = [match[1] for name in names if (match := re.match(r"(.+)_ids\.npy", name))]
            if "documents.npy" in names:
                documents, count = _places(archive, documents)
            return {
                row: RankedLabels(
                    _rows(archive, f"{row}_ids.npy", np.int32, documents, count),
                    _rows(archive, f"{row}_scores.npy", np.float32, documents, count)
                    if scores
                    else None,
                )
                for row in rows
            }
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the predictions of an evaluation, found another or a damaged file: "
            f"{error}; evaluate again"
        ) from error


def _places(archive: zipfile.ZipFile, documents: np.ndarray) -> tuple[np.ndarray, int]:
    """i64[m], where documents are in a file of some, and how many these are."""
    with archive.open("documents.npy") as file:
        held = np.lib.format.read_array(file, allow_pickle=False)
    places = np.searchsorted(held, documents)
    if not np.array_equal(held[np.minimum(places, len(held) - 1)], documents):
        said = counted(len(held), "document")
        raise ValueError(f"it holds {said}, and not all {len(documents)} asked for")
    return places, len(held)


def _rows(
    archive: zipfile.ZipFile, name: str, dtype: Any, documents: np.ndarray, count: int
) -> np.ndarray:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has version {version}")
        shape, by_column, stored = np.lib.format.read_array_header_1_0(file)
        if stored != dtype or by_column or len(shape) != 2:
            raise ValueError(f"{name} holds {stored}{list(shape)}")
        if shape[0] != count:
            raise ValueError(f"{name} has {counted(shape[0], 'document')}, not {count}")
        size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
        if archive.getinfo(name).file_size != size:
            raise ValueError(f"{name} says it has shape {list(shape)}, and has another size")
        taken = np.empty((len(documents), shape[1]), dtype)
        width = taken.itemsize * shape[1]
        block = max(_BLOCK_BYTES // max(width, 1), 1)
        for start in range(0, count, block):
            size = min(block, count - start)
            rows = np.frombuffer(_exactly(file, size * width), dtype).reshape(size, -1)
            first, last = np.searchsorted(documents, (start, start + size))
            taken[first:last] = rows[documents[first:last] - start]
    return taken


def _exactly(file: BinaryIO, count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise EOFError("it ends early")
    return content
