"""An opened image folder: frozen vectors of items, gathered by item; see `images` for the files."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRows:
    """The images of train, test or label."""

    rows: np.ndarray  # f16[images, E], memory-mapped
    indptr: np.ndarray  # i64[n + 1], memory-mapped; item i has the rows `indptr[i]:indptr[i + 1]`

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def count(self, ids: np.ndarray, limit: int) -> np.ndarray:
        """i32[n], how many images each of the items i[n] has, at most `limit`."""
        ids = np.asarray(ids)
        return np.minimum(self.indptr[ids + 1] - self.indptr[ids], limit).astype(np.int32)

    def gather(self, ids: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first images of some items; reads and makes no more than it returns.

        Args:
            ids: i[n], items in any order, repeated or not.

        Returns:
            f16[n, K, E], zero where an item has fewer; and i32[n], how many it has, at most K.
        """
        ids = np.asarray(ids)
        first, count = self.indptr[ids], self.count(ids, limit)
        images = np.zeros((len(ids), limit, self.rows.shape[1]), np.float16)
        there = np.arange(limit) < count[:, None]
        images[there] = self.rows[(first[:, None] + np.arange(limit))[there]]
        return images, count


@dataclasses.dataclass(frozen=True, eq=False)
class ImageStore:
    """An image folder; see the module."""

    folder: pathlib.Path  # where it lies
    manifest: Mapping[str, Any]  # what the writer recorded
    digest: str  # SHA-256 of manifest.json; equal on two hosts when their images are
    train: ImageRows  # images of the N training documents
    test: ImageRows  # images of the M test documents
    label: ImageRows  # images of the L labels

    @property
    def width(self) -> int:
        """E."""
        return self.manifest["encoder"]["E"]

    @property
    def encoder(self) -> str:
        """The name of what made the vectors."""
        return self.manifest["encoder"]["name"]

    @property
    def shares(self) -> dict[str, float]:
        """Percent of each split's items that have an image."""
        return {split: 100 * share for split, share in self.manifest["with_image"].items()}
