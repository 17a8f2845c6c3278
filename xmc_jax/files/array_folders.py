"""Folders of arrays with a manifest.json: bytes and digest of each file, dtype and shape of arrays.

Everything large is memory-mapped.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

from xmc_jax.files import array_files, json_files, manifests
from xmc_jax.files.digests import sha256

MANIFEST = "manifest.json"


class FileFacts(BaseModel, strict=True):
    """What a manifest says of a file; dtype and shape are those of arrays."""

    bytes: int
    sha256: str
    dtype: str | None = None
    shape: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class FolderManifest:
    """A manifest that was read and checked."""

    folder: pathlib.Path  # where it lies
    content: Mapping[str, Any]  # its values
    digest: str  # SHA-256 of the file
    remedy: str  # end of every error

    def compare(self, field: str, expected: Any, actual: Any) -> None:
        """Raises ValueError if a field of the manifest differs from what is expected."""
        self.compare_file(f"{MANIFEST}: {field}", expected, actual)

    def compare_file(self, what: str, expected: Any, actual: Any) -> None:
        """Raises ValueError if a property of a file differs; `what` begins with the file's name."""
        compare(f"{self.folder}/{what}", expected, actual, self.remedy)

    def open(self, names: Iterable[str], verify: bool) -> dict[str, np.ndarray]:
        """Checks files against the manifest.

        Args:
            names: of the files; those of arrays end in .npy.
            verify: also hash every file; sizes, dtypes and shapes are always checked.

        Returns:
            Name without .npy -> memory-mapped array.

        Raises:
            ValueError: a file differs; names both values.
        """
        arrays = {}
        for name in names:
            facts, path = self.content["files"].get(name), self.folder / name
            if facts is None:
                self.compare("files", name, "none")
            size = path.stat().st_size if path.is_file() else 0
            self.compare_file(f"{name}: bytes", facts["bytes"], size)
            if verify:
                self.compare_file(f"{name}: sha256", facts["sha256"], sha256(path))
            if not name.endswith(".npy"):
                continue
            try:
                array = array_files.mapped(path)
            except ValueError as error:
                raise ValueError(
                    f"{path}: expected a NumPy array file, found a damaged one; {self.remedy}"
                ) from error
            self.compare_file(f"{name}: dtype", facts.get("dtype"), str(array.dtype))
            self.compare_file(f"{name}: shape", facts.get("shape"), list(array.shape))
            arrays[name.removesuffix(".npy")] = array
        return arrays


def compare(what: str, expected: Any, actual: Any, remedy: str) -> None:
    """Raises ValueError if two values differ."""
    if expected != actual:
        raise ValueError(f"{what}: expected {expected}, found {actual}; {remedy}")


def read_manifest(
    folder: pathlib.Path, version: int, schema: type[BaseModel], kind: str, remedy: str
) -> FolderManifest:
    """Reads and checks a manifest.

    Args:
        folder: local.
        kind: of folder, for the error where there is no manifest.

    Raises:
        ValueError: there is none, or a field is not as expected.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        fields = json_files.parse(path, content)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected {kind} with a {MANIFEST}, found none that can be read; {remedy}"
        ) from error
    compare(f"{path}: format", version, fields.get("format"), remedy)
    json_files.validate(path, schema, fields, remedy)
    return FolderManifest(folder, fields, hashlib.sha256(content).hexdigest(), remedy)


def facts(folder: pathlib.Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """What a manifest says of files, see `FileFacts`; of all below the folder by default."""
    recorded = manifests.files(folder, names)
    for name, entry in recorded.items():
        if name.endswith(".npy"):
            array = array_files.mapped(folder / name)
            entry |= {"dtype": str(array.dtype), "shape": list(array.shape)}
    return recorded
