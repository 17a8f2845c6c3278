"""SHA-256 of files and of arrays, by which what is read is known to be what was written."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

_BLOCK = 1 << 20  # bytes in memory at a time


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal; read block by block.

    Args:
        path: local, or gs://...
    """
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def of_array(name: str, array: np.ndarray) -> str:
    """SHA-256 of an array's name, dtype, shape and values, in hexadecimal.

    The values are hashed in row-major order and little-endian, so that the digest depends neither
    on how an array lies in memory or in files nor on the mesh that it was split over.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array = array.byteswap()
    digest = hashlib.sha256(f"{name}\0{array.dtype.name}\0{list(array.shape)}\0".encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """{name: `of_array`}, one array after the other."""
    return {name: of_array(name, array) for name, array in arrays}


def combined(digests: Mapping[str, str]) -> str:
    """One SHA-256 of named ones, whatever their order."""
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
