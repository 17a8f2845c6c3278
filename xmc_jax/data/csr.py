"""Sparse label sets by rows."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Csr:
    """A sparse matrix by rows; without values, a set of (row, column) pairs.

    Attributes:
        indptr: i64[n + 1]; row i is the range `indptr[i]:indptr[i + 1]`.
        indices: i32[nnz], columns.
        values: f32[nnz], or None where every entry is 1.
        columns: number of columns.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray | None
    columns: int

    @property
    def rows(self) -> int:
        """n."""
        return len(self.indptr) - 1

    def counts(self) -> np.ndarray:
        """i64[n], entries per row."""
        return np.diff(self.indptr)

    def row_ids(self) -> np.ndarray:
        """i64[nnz], the row of each entry."""
        return np.repeat(np.arange(self.rows), self.counts())

    def take(self, ids: np.ndarray) -> "Csr":
        """The rows `ids` (i[m]) in that order, without values; costs what the result takes."""
        starts, counts = self.indptr[ids], self.indptr[ids + 1] - self.indptr[ids]
        indptr = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)
        return Csr(indptr, self.indices[positions], None, self.columns)

    def deduplicated(self) -> "Csr":
        """The same pairs, each once, columns ascending within a row."""
        keys = np.unique(self.row_ids() * self.columns + self.indices)
        counts = np.bincount(keys // max(self.columns, 1), minlength=self.rows)
        indices = (keys % max(self.columns, 1)).astype(np.int32)
        return Csr(np.concatenate([[0], np.cumsum(counts)]), indices, None, self.columns)
