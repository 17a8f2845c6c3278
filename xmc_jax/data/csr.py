"""Sparse label sets by rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Csr:
    """A sparse matrix by rows; without values, a set of (row, column) pairs."""

    indptr: np.ndarray  # i64[n + 1]; row i is the range `indptr[i]:indptr[i + 1]`
    indices: np.ndarray  # i32[nnz], columns
    values: np.ndarray | None  # f32[nnz], or None where every entry is 1
    columns: int  # number of columns

    @classmethod
    def of_pairs(cls, pairs: np.ndarray, rows: int, columns: int) -> "Csr":
        """The set of some (row, column) pairs, i[p, 2] in any order, each once.

        Raises:
            ValueError: a pair lies outside.
        """
        if len(pairs) and not (
            (pairs >= 0).all() and (pairs.max(axis=0) < np.array([rows, columns])).all()
        ):
            raise ValueError(
                f"pairs: expected rows in [0, {rows}) and columns in [0, {columns}), got "
                f"{pairs.min(axis=0).tolist()} to {pairs.max(axis=0).tolist()}"
            )
        order = np.argsort(pairs[:, 0], kind="stable")
        ends = np.cumsum(np.bincount(pairs[:, 0], minlength=rows))
        indptr = np.concatenate([[0], ends])
        return cls(indptr, pairs[order, 1].astype(np.int32), None, columns).deduplicated()

    @classmethod
    def of_rows(cls, rows: Sequence[np.ndarray], columns: int) -> "Csr":
        """The set whose row i has the columns `rows[i]`, i[m] and distinct."""
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        indices = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
        return cls(indptr, indices, None, columns)

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

    def select(self, columns: np.ndarray) -> "Csr":
        """Some of the columns, i[m] ascending, numbered in that order; without values."""
        place = np.searchsorted(columns, self.indices)
        kept = np.zeros(len(self.indices), bool)
        inside = place < len(columns)
        kept[inside] = columns[place[inside]] == self.indices[inside]
        ends = np.concatenate([[0], np.cumsum(kept)])
        return Csr(ends[self.indptr], place[kept].astype(np.int32), None, len(columns))

    def pairs(self) -> np.ndarray:
        """i64[nnz, 2], (row, column) of each entry, by rows."""
        return np.stack([self.row_ids(), self.indices], axis=1)

    def deduplicated(self) -> "Csr":
        """The same pairs, each once, columns ascending within a row."""
        columns = max(self.columns, 1)
        keys = self.row_ids() * columns + self.indices
        keys.sort()  # np.unique hashes whole numbers first, which takes ten times as long
        new = np.ones(len(keys), bool)
        new[1:] = keys[1:] != keys[:-1]
        rows, indices = np.divmod(keys[new], columns)
        counts = np.bincount(rows, minlength=self.rows)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return Csr(indptr, indices.astype(np.int32), None, self.columns)


def concatenated(parts: Sequence[Csr]) -> Csr:
    """The rows of matrices without values, one matrix after the other; as wide as the widest."""
    counts = np.concatenate([[0], *(part.counts() for part in parts)])
    indices = np.concatenate([np.empty(0, np.int32), *(part.indices for part in parts)])
    return Csr(np.cumsum(counts), indices, None, max((part.columns for part in parts), default=0))
