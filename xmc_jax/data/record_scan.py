"""Records read once: checked, split, and handed on as lines of a raw file, one by one."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from xmc_jax.data import holdout, record_cells
from xmc_jax.data.record_facts import Documents, Items, Labels
from xmc_jax.data.record_fields import Opened, Record

Keep = Callable[[str, str, str, list[str]], None]
"""Is given "label" or "document", the id, the line of a raw file, and the images, of each item."""

UNKNOWN = ("error", "drop", "add")
"""What may be done with ids of labels that no label has."""

encode = json.JSONEncoder(ensure_ascii=False).encode
"""One line of JSON."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """Records, read.

    Attributes:
        labels: facts about the labels.
        documents: facts about the documents.
        groups: i64[n], see `Documents.groups`.
        test: bool[n], the split.
        filtered: bool[pairs], which labels of test documents are taken out, since they may not be
            predicted, and so would never be right.
        unknown: ids of labels that none had, or as many as there are; and pairs with them.
        filter_unknown: pairs of filters with labels that there are not, which filter nothing.
    """

    labels: Labels
    documents: Documents
    groups: np.ndarray
    test: np.ndarray
    filtered: np.ndarray
    unknown: tuple[int, int]
    filter_unknown: int


def read(
    opened: Mapping[str, Sequence[Opened]],
    separator: str,
    unknown: str,
    fraction: float,
    seed: int,
    keep: Keep,
) -> Scan:
    """Reads all records, and splits the documents where nothing says how they are.

    Args:
        opened: "train", "test" (perhaps none), "label" (none where labels are to be added).
        separator: of ids in a text.
        unknown: of `UNKNOWN`.
        fraction: share of the documents for testing, if neither a file nor a column says it.
        seed: of that choice.
        keep: is given every item, in order.

    Raises:
        ValueError: a record is bad, or there is nothing to train on or to test with.
    """
    scanning = _Scanning(separator, unknown, keep)
    with tqdm.tqdm(desc="reading", unit="record", disable=None) as bar:
        for one in opened["label"]:
            scanning.read_labels(one, bar)
        for split in ("train", "test"):
            row = 0
            for one in opened[split]:
                row = scanning.read_documents(one, split, row, bar)
    scanning.finish()
    documents = scanning.documents
    _check_ids(documents)
    groups = documents.groups()
    if opened["test"] or any("split" in one.columns for one in opened["train"]):
        test = np.frombuffer(documents.test, bool)
    elif not len(groups):
        test = np.zeros(0, bool)
    else:
        test = holdout.choose_within(groups, fraction, seed)
    filtered = _filtered(documents, test, len(scanning.labels))
    labelled = np.bincount(documents.owners[~filtered], minlength=len(documents))
    there = [str(one.table.path) for split in ("train", "test") for one in opened[split]]
    dropped = f"; {scanning.unknown_pairs} labels were unknown" if scanning.unknown_pairs else ""
    for name, chosen in (("training", ~test), ("test", test)):
        if not labelled[chosen].any():
            kind = "documents with labels" if chosen.any() else "documents"
            raise ValueError(
                f"{', '.join(there)}: expected {name} {kind}, found none among {len(documents)} "
                f"documents of {len(np.unique(groups))} groups{dropped}"
            )
    return Scan(
        scanning.labels,
        documents,
        groups,
        test,
        filtered,
        (len(scanning.unknown_ids), scanning.unknown_pairs),
        scanning.filter_unknown,
    )


class _Scanning:
    """What a scan has found so far."""

    def __init__(self, separator: str, unknown: str, keep: Keep):
        self.labels, self.documents = Labels(), Documents()
        self.unknown_ids: set[str] = set()
        self.unknown_pairs = self.filter_unknown = 0
        self._first_unknown: ValueError | None = None
        self._waiting: list[tuple[int, str]] = []
        self._separator, self._unknown, self._keep = separator, unknown, keep

    def read_labels(self, opened: Opened, bar: tqdm.tqdm) -> None:
        labels = self.labels
        labels.begin(opened, "label")
        for record in opened.records():
            number = len(labels)
            uid = record("id", record_cells.identifier) if record.has("id") else str(number)
            if (first := labels.numbers.setdefault(uid, number)) != number:
                raise record.error(
                    "id", f"expected ids that differ, found {uid!r:.60}, as {labels.at(first)} has"
                )
            self._keep_item(labels, record, "label", uid, {})
            bar.update()

    def read_documents(self, opened: Opened, split: str, row: int, bar: tqdm.tqdm) -> int:
        """Reads a table whose first row has this number; returns the number behind its last."""
        documents, separator = self.documents, self._separator
        documents.begin(opened, split)
        number_of, prefix = self.labels.numbers.get, "test-" if split == "test" else ""
        for record in opened.records():
            uid = f"{prefix}{row}"
            if record.has("id"):
                uid = record("id", record_cells.identifier)
            ids = record("labels", record_cells.identifiers, separator)
            rows = list(map(number_of, ids))
            if None in rows:
                rows = self._resolve(record, ids)
            if self.unknown_ids and self._unknown == "add":
                self.unknown_pairs += sum(map(self.unknown_ids.__contains__, ids))
            line = {"target_ind": [found for found in rows if found is not None]}
            if record.has("weights"):
                weights = record("weights", record_cells.weights, separator, len(ids))
                line["target_rel"] = [w for w, found in zip(weights, rows) if found is not None]
            group = record("group", _group)
            filtered = record("filter", record_cells.identifiers, separator)
            test = split == "test" or (record.has("split") and record("split", _is_test))
            self._keep_item(documents, record, "document", uid, line)
            documents.add_facts(uid, group, test, line["target_ind"])
            self._filter(filtered)
            row += 1
            bar.update()
        return row

    def finish(self) -> None:
        """Settles what waited for the last record.

        Raises:
            ValueError: there are labels that are not known, and may not be.
        """
        if self._first_unknown is not None:
            raise ValueError(
                f"{self._first_unknown} ({len(self.unknown_ids)} such ids in {self.unknown_pairs} "
                "places); --unknown_labels=drop leaves them out, =add makes labels of them"
            )
        for document, uid in self._waiting:
            self._filter_pair(document, uid)

    def _filter(self, ids: Sequence[str]) -> None:
        """Takes what may not be predicted for the last document."""
        document = len(self.documents) - 1
        for uid in ids:
            if self._unknown == "add" and uid not in self.labels.numbers:
                self._waiting.append((document, uid))  # it may be a later document's label
            else:
                self._filter_pair(document, uid)

    def _filter_pair(self, document: int, uid: str) -> None:
        label = self.labels.numbers.get(uid)
        if label is None:
            self.filter_unknown += 1
        else:
            self.documents.add_filter(document, label)

    def _keep_item(
        self, items: Items, record: Record, kind: str, uid: str, rest: Mapping[str, Any]
    ) -> None:
        title = record("text", record_cells.text)
        content = record("content", record_cells.text)
        images = record("images", record_cells.images, self._separator)
        items.add(record, title, content, images)
        line = encode({"uid": uid, "title": title, "content": content} | rest)
        self._keep(kind, uid, line, images)

    def _resolve(self, record: Record, ids: Sequence[str]) -> list[int | None]:
        """Rows of labels some of which there are not; new ones if such are added."""
        numbers = self.labels.numbers
        unknown = [uid for uid in ids if uid not in numbers]
        self.unknown_ids.update(unknown)
        if self._unknown == "add":
            for uid in dict.fromkeys(unknown):
                numbers[uid] = len(numbers)
                self.labels.add_bare(uid)
                self._keep("label", uid, encode({"uid": uid, "title": uid, "content": ""}), [])
        else:
            self.unknown_pairs += len(unknown)
        if self._unknown == "error" and self._first_unknown is None:
            problem = f"expected ids of labels, found {unknown[0]!r:.60}"
            self._first_unknown = record.error("labels", problem + self._hint(unknown[0]))
        return list(map(numbers.get, ids))

    def _hint(self, uid: str) -> str:
        numbers = self.labels.numbers
        for separator in ",;| ":
            pieces = [piece.strip() for piece in uid.split(separator)]
            if len(pieces) > 1 and all(piece in numbers for piece in pieces if piece):
                return f"; are these several, --separator={separator!r}?"
        plain = uid.strip().casefold()
        alike = next((known for known in numbers if known.strip().casefold() == plain), None)
        return record_cells.hint(uid) if alike is None else f"; did you mean {alike!r:.60}?"


def _filtered(documents: Documents, test: np.ndarray, columns: int) -> np.ndarray:
    """bool[pairs], see `Scan`; costs what documents with a filter have."""
    with_filter = np.zeros(len(documents), bool)
    with_filter[documents.filter[:, 0]] = True
    pairs = np.flatnonzero((with_filter & test)[documents.owners])
    listed = documents.filter[:, 0].astype(np.int64) * columns + documents.filter[:, 1]
    keys = documents.owners[pairs].astype(np.int64) * columns + documents.labels[pairs]
    filtered = np.zeros(len(documents.labels), bool)
    filtered[pairs] = np.isin(keys, listed)
    return filtered


def _check_ids(documents: Documents) -> None:
    first = documents.first_of_id()
    again = np.flatnonzero(first != np.arange(len(first)))
    if len(again):
        raise ValueError(
            f"{documents.at(again[0])}: expected ids that differ, found that of "
            f"{documents.at(first[again[0]])}; {len(again)} documents have an id of others; "
            "--row_per_pair makes one document of rows of one id that follow each other"
        )


def _group(cell: Any) -> str | None:
    return None if record_cells.is_null(cell) or cell == "" else record_cells.identifier(cell)


def _is_test(cell: Any) -> bool:
    name = record_cells.text(cell).strip().lower()
    if name not in ("train", "test"):
        raise ValueError(f"expected train or test, found {name!r:.60}")
    return name == "test"
