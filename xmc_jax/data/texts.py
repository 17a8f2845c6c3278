"""Many short texts in two array files, memory-mapped: identifiers and titles of what is searched.

`<name>.utf8.npy` u8[bytes] holds them one after the other, `<name>.offsets.npy` i64[n + 1] says
where each begins. Opening costs nothing, whatever n, and reading one reads that one.
"""

import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from xmc_jax.files import array_files


class Texts(Sequence[str]):
    """n texts, decoded when asked for.

    Args:
        utf8: u8[bytes].
        offsets: i64[n + 1], ascending from 0 to `len(utf8)`.

    Raises:
        ValueError: offsets that do not fit.
    """

    def __init__(self, utf8: np.ndarray, offsets: np.ndarray, where: str = "texts"):
        if (utf8.dtype, offsets.dtype) != (np.uint8, np.int64) or (utf8.ndim, offsets.ndim) != (
            1,
            1,
        ):
            raise ValueError(
                f"{where}: expected u8[bytes] and i64[n + 1], got {utf8.dtype}{list(utf8.shape)} "
                f"and {offsets.dtype}{list(offsets.shape)}"
            )
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(utf8):
            raise ValueError(f"{where}: expected offsets from 0 to {len(utf8)}, got others")
        if (np.diff(offsets) < 0).any():
            raise ValueError(f"{where}: expected ascending offsets, got others")
        self._utf8, self._offsets = utf8, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return bytes(self._utf8[self._offsets[row] : self._offsets[row + 1]]).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


def encode(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """u8[bytes] and i64[n + 1] of n texts."""
    encoded = [text.encode("utf-8") for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def save(folder: pathlib.Path, name: str, texts: Iterable[str]) -> None:
    """Writes the two files of `name`."""
    for part, array in zip(("utf8", "offsets"), encode(texts)):
        array_files.save(folder / f"{name}.{part}.npy", array)


def open(folder: pathlib.Path, name: str) -> Texts:
    """Opens what `save` wrote, memory-mapped.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the other.
    """
    arrays = []
    for part in ("utf8", "offsets"):
        path = folder / f"{name}.{part}.npy"
        try:
            arrays.append(array_files.mapped(path))
        except ValueError as error:
            raise ValueError(f"{path}: expected an array of texts, found: {error}") from error
    return Texts(*arrays, where=str(folder / name))
