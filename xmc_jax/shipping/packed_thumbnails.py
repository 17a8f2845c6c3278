"""Small pictures of labels and documents, to be shown beside them; nothing is ranked by them.

A folder of an artifact. Of each kind, "labels" or "documents", of which some have a picture: the
ids of these in ascending order, `<kind>.ids` (see `data.texts`); their files in any order,
`<kind>.images.bin`; and from where to where each of them is there, `<kind>.spans.npy` i64[n, 2].
"""

import bisect
import pathlib
from collections.abc import Iterable

import numpy as np

from xmc_jax.data import texts
from xmc_jax.files import array_files
from xmc_jax.runtime.wording import counted

KINDS = ("labels", "documents")
TYPE = "image/webp"
"""Of every picture."""


class Thumbnails:
    """The pictures of one kind, memory-mapped.

    Raises:
        ValueError: damaged files.
    """

    def __init__(self, folder: pathlib.Path, kind: str):
        self._ids = texts.open(folder, f"{kind}.ids")
        try:
            self._images = np.memmap(folder / f"{kind}.images.bin", np.uint8, "r")
            self._spans = spans = array_files.mapped(folder / f"{kind}.spans.npy")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: expected pictures of {kind}, found: {error}") from error
        shape = len(self._ids), 2
        fits = spans.dtype == np.int64 and spans.shape == shape and shape[0] > 0
        if not fits or not (
            0 <= spans.min() <= spans.max() <= len(self._images)
            and (spans[:, 0] <= spans[:, 1]).all()
        ):
            raise ValueError(
                f"{folder}: expected places of {counted(shape[0], 'picture')} of {kind} in "
                f"{len(self._images)} bytes, found others; copy or export the folder again"
            )

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: str) -> bool:
        return self._row(name) is not None

    def get(self, name: str) -> bytes | None:
        """The file of an id; None if it has no picture."""
        row = self._row(name)
        return None if row is None else self._images[slice(*self._spans[row])].tobytes()

    def _row(self, name: str) -> int | None:
        row = bisect.bisect_left(self._ids, name)
        return row if row < len(self._ids) and self._ids[row] == name else None


def save(folder: pathlib.Path, kind: str, images: Iterable[tuple[str, bytes]]) -> int:
    """Writes the files of a kind, one picture after the other; none if there are no pictures.

    Args:
        folder: exists.
        images: ids, all different, and files, in any order.

    Returns:
        How many.
    """
    ids, ends, path = [], [0], folder / f"{kind}.images.bin"
    with path.open("wb") as file:
        for name, image in images:
            ids.append(name)
            ends.append(ends[-1] + file.write(image))
    if not ids:
        path.unlink()
        return 0
    order = sorted(range(len(ids)), key=ids.__getitem__)
    texts.save(folder, f"{kind}.ids", [ids[row] for row in order])
    spans = np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)
    array_files.save(folder / f"{kind}.spans.npy", spans[order])
    return len(ids)
