"""What memory holds of records while they are read.

A document takes some hundred bytes and four for each of its labels, in the end up to twenty; a
label also its id. Texts, ids and groups are compared by digests of 128 bits. Columns are arrays
that grow; `np.asarray` of one costs nothing.
"""

import array
import bisect
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from xmc_jax.data.tables import cell_values
from xmc_jax.data.tables.named_columns import Opened, Record
from xmc_jax.files import paths

SPLITS = ("train", "validation", "test")
"""What documents are for, in the order in which their files are read."""


class RecordItems:
    """Facts about documents, or about labels, in the order of their records.

    Attributes:
        kinds: "train", "test" or "label" -> "path" or "url", of the files' images.
        words: u32[n], words of each text.
        images: u32[n], images of each item.
        missing: u32[n], image files of each item that do not exist.
    """

    def __init__(self):
        self._tables: list[Opened] = []
        self._firsts: list[int] = []
        self._role, self._folder, self._allow_paths = "", pathlib.Path(), False
        self._places = array.array("q")
        self._texts, self._plain_texts = bytearray(), bytearray()
        self.words, self.images, self.missing = (array.array("I") for _ in range(3))
        self.kinds: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.words)

    def begin(self, opened: Opened, role: str) -> None:
        """Says that the items that follow are of this table, of "train", "test" or "label"."""
        self._tables.append(opened)
        self._firsts.append(len(self))
        self._role, self._folder = role, opened.table.path.parent
        self._allow_paths = opened.allow_paths

    def at(self, number: int) -> str:
        """Where an item was read."""
        table = self._tables[bisect.bisect_right(self._firsts, number) - 1].table
        return table.at(self._places[number])

    def add(self, record: Record, title: str, content: str, images: Sequence[str]) -> None:
        """Keeps an item's facts."""
        missing = 0
        for image in images:
            kind = "url" if cell_values.is_url(image) else "path"
            if self.kinds.setdefault(self._role, kind) != kind:
                raise record.error(
                    "images",
                    "expected paths alone or URLs alone in a file, found both; python -m "
                    "xmc_jax.images.fetch makes files of URLs",
                )
            if kind == "path":
                try:
                    path = paths.within(self._folder, image, self._allow_paths)
                except ValueError as error:
                    raise record.error("images", str(error)) from None
                missing += not os.path.isfile(path)
        self._append(record.place, title, content, len(images), missing)

    def add_bare(self, text: str) -> None:
        """An item that no table has."""
        self._append(-1, text, "", 0, 0)

    def _append(self, place: int, title: str, content: str, images: int, missing: int) -> None:
        words = f"{title} {content}".casefold().split()
        self._places.append(place)
        self._texts += _digest(f"{len(title)} {title}{content}")
        self._plain_texts += _digest(" ".join(words))
        self.words.append(len(words))
        self.images.append(images)
        self.missing.append(missing)

    @property
    def blank(self) -> np.ndarray:
        """bool[n], whether a text has no words."""
        return np.asarray(self.words) == 0

    def first_of_text(self) -> np.ndarray:
        """i64[n], the first item with each item's text; a blank text is alone."""
        return np.where(self.blank, np.arange(len(self)), _first_alike(self._texts))

    def first_of_plain_text(self) -> np.ndarray:
        """i64[n], likewise, but for capitals and white space, which do not count."""
        return np.where(self.blank, np.arange(len(self)), _first_alike(self._plain_texts))


class RecordLabels(RecordItems):
    """The labels.

    Attributes:
        numbers: id -> row.
    """

    def __init__(self):
        super().__init__()
        self.numbers: dict[str, int] = {}


class RecordDocuments(RecordItems):
    """The documents, those of a test file behind those for training; read all before asking.

    Attributes:
        split: u8[n], the number in `SPLITS` of the split that each document says, or its file.
        repeated: u32[n], labels of each document that it names once more; they are counted once.
        counts: u32[n], labels per document.
        labels: i32[pairs], the labels of one document after the other.
        grouped: whether any document names a group.
    """

    def __init__(self):
        super().__init__()
        self._ids, self._groups, self._in_group = bytearray(), bytearray(), bytearray()
        self.split, self.grouped = bytearray(), False
        self.repeated, self.counts = array.array("I"), array.array("I")
        self.labels, self._filter = array.array("i"), array.array("i")

    def add_facts(
        self, uid: str, group: str | None, split: str, labels: Sequence[int], repeated: int
    ) -> None:
        """Keeps what a document has besides its text and images, after `add`."""
        self._ids += _digest(uid)
        self._groups += _digest(group or "")
        self._in_group.append(group is not None)
        self.grouped |= group is not None
        self.split.append(SPLITS.index(split))
        self.repeated.append(repeated)
        self.counts.append(len(labels))
        self.labels.extend(labels)

    def add_filter(self, document: int, label: int) -> None:
        """Keeps that a label may not be predicted for a document."""
        self._filter.extend((document, label))

    def of_split(self, split: str) -> np.ndarray:
        """bool[n], whether each document is said to be of this split, one of `SPLITS`."""
        return np.asarray(self.split) == SPLITS.index(split)

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """i32[pairs], the document of each label in `labels`."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.asarray(self.counts))

    @functools.cached_property
    def filter(self) -> np.ndarray:
        """i32[p, 2], pairs (document, label) that may not be predicted, each once, ascending."""
        return np.unique(np.asarray(self._filter).reshape(-1, 2), axis=0)

    def first_of_id(self) -> np.ndarray:
        """i64[n], the first document with each document's id."""
        return _first_alike(self._ids)

    def first_of_group(self) -> np.ndarray:
        """i64[n], the first document of each document's group; without one it is alone."""
        given = np.asarray(self._in_group).astype(bool)
        return np.where(given, _first_alike(self._groups), np.arange(len(self)))

    def groups(self) -> np.ndarray:
        """i64[n], groups by the order they appear in: those given, and texts that are alike in one.

        Texts are alike if they differ in capitals and white space alone.
        """
        group, text = self.first_of_group(), self.first_of_plain_text()
        parent = np.arange(len(self))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return int(number)

        for again in np.flatnonzero(text != np.arange(len(self))).tolist():
            one, other = sorted((root(int(group[again])), root(int(group[text[again]]))))
            parent[other] = one
        joined = np.flatnonzero(parent != np.arange(len(self)))
        parent[joined] = [root(int(number)) for number in joined]
        return np.unique(parent[group], return_inverse=True)[1]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _first_alike(digests: bytearray) -> np.ndarray:
    """i64[n], the first digest of 16 bytes that is the same as each."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first comes first
    ordered = halves[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
    return first
