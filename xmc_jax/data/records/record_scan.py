"""Records read once: checked, split, and handed on one by one."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from xmc_jax.data import holdout
from xmc_jax.data.records.item_facts import SPLITS, RecordDocuments, RecordItems, RecordLabels
from xmc_jax.data.tables import cell_values
from xmc_jax.data.tables.named_columns import Opened, Record
from xmc_jax.runtime.wording import counted

Keep = Callable[[str, dict[str, Any], list[str]], None]
"""Is given "label" or "document", an object of a raw file, and the images, of each item."""

UNKNOWN = ("error", "drop", "add")
"""What may be done with ids of labels that no label has."""

_SEPARATORS = (",", ";", "|")  # usual between ids; within an id they are most likely that
_SPLIT_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}


def read(
    opened: Mapping[str, Sequence[Opened]],
    separator: str,
    unknown: str,
    fraction: float,
    seed: int,
    keep: Keep,
) -> "Scan":
    """Reads all records, and draws the test documents where nothing says which they are.

    Args:
        opened: "train", "validation" and "test" (perhaps none), "label" (none where labels are to
            be added).
        fraction: share of the other documents for testing, if neither a file nor a column says it.

    Raises:
        ValueError: a record is bad, or there is none.
    """
    scan = Scan(separator, unknown, keep)
    with tqdm.tqdm(desc="reading", unit="record", disable=None) as bar:
        for one in opened["label"]:
            scan.read_labels(one, bar)
        for split in SPLITS:
            row = 0
            for one in opened[split]:
                # What a column may say: its file's split, and in train.* those without a file.
                allowed = {split} | {s for s in SPLITS if split == "train" and not opened[s]}
                row = scan.read_documents(one, split, allowed, row, bar)
    scan.finish()
    documents = scan.documents
    paths = ", ".join(str(one.table.path) for split in SPLITS for one in opened[split])
    if not len(documents):
        raise ValueError(f"{paths}: expected documents, found none")
    _check_ids(documents)
    scan.groups, scan.split = documents.groups(), np.asarray(documents.split).copy()
    train = np.flatnonzero(documents.of_split("train"))
    if not documents.of_split("test").any() and not opened["test"] and len(train):
        _, sources = np.unique(scan.groups[train], return_inverse=True)
        test = holdout.choose_within(sources, fraction, seed)
        scan.split[train[test]] = SPLITS.index("test")
        scan.drawn = True
    scan.filtered = _filtered(documents, scan.of("test"), len(scan.labels))
    scan.ids_as_texts = bool(opened["label"]) and all(
        "text" not in one.columns for one in opened["label"]
    )
    scan.refusal = _refusal(scan, opened, paths)
    return scan


def _refusal(scan: "Scan", opened: Mapping[str, Sequence[Opened]], paths: str) -> str | None:
    """Which split has no documents with labels, in one line; None if all have some."""
    documents = scan.documents
    labelled = np.bincount(documents.owners[~scan.filtered], minlength=len(documents))
    if scan.drawn and scan.groups.max() == 0:
        return (
            f"{paths}: expected documents of two groups at least, to train on and to test with, "
            f"found {len(documents)} of one group"
        )
    for name, adjective in (("train", "training"), ("test", "test"), ("validation", "validation")):
        chosen = scan.of(name)
        if labelled[chosen].any() or (name == "validation" and not (chosen.any() or opened[name])):
            continue
        kind = "documents with labels" if chosen.any() else "documents"
        unknown = counted(scan.unknown_pairs, "label was", "labels were")
        return (
            f"{paths}: expected {adjective} {kind}, found none among "
            f"{counted(len(documents), 'document')} of "
            f"{counted(len(np.unique(scan.groups)), 'group')}"
            f"{f'; {unknown} unknown' if scan.unknown_pairs else ''}"
        )
    return None


class Scan:
    """Records, read; what stands below `filter_unknown` is known in the end.

    Attributes:
        labels: facts about the labels.
        documents: facts about the documents.
        unknown_ids: ids of labels that none has.
        unknown_pairs: pairs with such a label.
        filter_unknown: pairs of filters with labels that do not exist, which filter nothing.
        groups: i64[n], see `RecordDocuments.groups`.
        split: u8[n], the number in `SPLITS` of each document's split.
        drawn: whether the test documents were drawn, since nothing says which they are.
        filtered: bool[pairs], which labels of test documents are taken out, since they may not be
            predicted, and so would never be right.
        ids_as_texts: whether labels have ids alone, which are then their texts.
        refusal: why there is nothing to train on, to test with or to tune on; None if there is.
    """

    groups: np.ndarray
    split: np.ndarray
    filtered: np.ndarray
    drawn = False
    ids_as_texts = False
    refusal: str | None = None

    def __init__(self, separator: str, unknown: str, keep: Keep):
        self.labels, self.documents = RecordLabels(), RecordDocuments()
        self.unknown_ids: set[str] = set()
        self.unknown_pairs = self.filter_unknown = 0
        self._first_unknown: ValueError | None = None
        self._added: dict[str, list[str]] = collections.defaultdict(list)
        self._waiting: list[tuple[int, str]] = []
        self._separator, self._unknown, self._keep = separator, unknown, keep

    def of(self, split: str) -> np.ndarray:
        """bool[n], which documents are of a split."""
        return self.split == SPLITS.index(split)

    def read_labels(self, opened: Opened, bar: tqdm.tqdm) -> None:
        """Reads a table of labels; `bar` counts them."""
        labels = self.labels
        labels.begin(opened, "label")
        for record in opened.records():
            number = len(labels)
            uid = record("id", cell_values.identifier) if record.has("id") else str(number)
            if (first := labels.numbers.setdefault(uid, number)) != number:
                raise record.error(
                    "id", f"expected ids that differ, found {uid!r:.60}, as {labels.at(first)} has"
                )
            self._keep_item(labels, record, "label", uid, {})
            bar.update()

    def read_documents(
        self, opened: Opened, file_split: str, allowed: set[str], row: int, bar: tqdm.tqdm
    ) -> int:
        """Reads a table of documents.

        Args:
            row: number of its first row among the rows of the files of this split.

        Returns:
            The number behind the last row's.
        """
        documents, separator = self.documents, self._separator
        # Images of validation documents are in one table with those of training documents.
        documents.begin(opened, "test" if file_split == "test" else "train")
        number_of = self.labels.numbers.get
        prefix = "" if file_split == "train" else f"{file_split}-"
        for record in opened.records():
            uid = record("id", cell_values.identifier) if record.has("id") else f"{prefix}{row}"
            ids = record("labels", cell_values.identifiers, separator)
            weights = None
            if record.has("weights"):
                weights = record("weights", cell_values.weights, separator, len(ids))
            repeated = len(ids) - len(set(ids))
            if repeated:
                first = {label: place for place, label in reversed(list(enumerate(ids)))}
                places = sorted(first.values())
                ids = [ids[place] for place in places]
                weights = weights and [weights[place] for place in places]
            rows = list(map(number_of, ids))
            if None in rows:
                rows = self._resolve(record, ids)
            if self.unknown_ids and self._unknown == "add":
                self.unknown_pairs += sum(map(self.unknown_ids.__contains__, ids))
            item: dict[str, Any] = {"target_ind": [label for label in rows if label is not None]}
            if weights is not None:
                item["target_rel"] = [w for w, label in zip(weights, rows) if label is not None]
            group = record("group", _group)
            filtered = record("filter", cell_values.identifiers, separator)
            split = record("split", _split, allowed) if record.has("split") else file_split
            self._keep_item(documents, record, "document", uid, item)
            documents.add_facts(uid, group, split, item["target_ind"], repeated)
            self._filter(filtered)
            row += 1
            bar.update()
        return row

    def joined(self) -> tuple[str, int, str] | None:
        """The usual separator that most added labels have in their id, how many, and the first."""
        if not self._added:
            return None
        separator, uids = max(self._added.items(), key=lambda added: len(added[1]))
        return separator, len(uids), uids[0]

    def finish(self) -> None:
        """Settles what waited for the last record.

        Raises:
            ValueError: there are labels that are not known, and may not be.
        """
        if self._first_unknown is not None:
            raise ValueError(
                f"{self._first_unknown} ({counted(len(self.unknown_ids), 'such id')} in "
                f"{counted(self.unknown_pairs, 'place')}); "
                "--unknown_labels=drop leaves them out, =add makes labels of them"
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
        self, items: RecordItems, record: Record, kind: str, uid: str, rest: Mapping[str, Any]
    ) -> None:
        title = record("text", cell_values.text) if record.has("text") else uid
        content = record("content", cell_values.text)
        images = record("images", cell_values.images, self._separator)
        items.add(record, title, content, images)
        self._keep(kind, {"uid": uid, "title": title, "content": content} | rest, images)

    def _resolve(self, record: Record, ids: Sequence[str]) -> list[int | None]:
        """Rows of labels some of which there are not; new ones if such are added."""
        numbers = self.labels.numbers
        unknown = [uid for uid in ids if uid not in numbers]
        self.unknown_ids.update(unknown)
        if self._unknown == "add":
            for uid in dict.fromkeys(unknown):
                numbers[uid] = len(numbers)
                self.labels.add_bare(uid)
                self._keep("label", {"uid": uid, "title": uid, "content": ""}, [])
                for separator in _SEPARATORS:
                    if separator in uid and separator != self._separator:
                        self._added[separator].append(uid)
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
        return cell_values.hint(uid) if alike is None else f"; did you mean {alike!r:.60}?"


def _filtered(documents: RecordDocuments, test: np.ndarray, columns: int) -> np.ndarray:
    """bool[pairs], see `Scan`; costs what documents with a filter have."""
    with_filter = np.zeros(len(documents), bool)
    with_filter[documents.filter[:, 0]] = True
    pairs = np.flatnonzero((with_filter & test)[documents.owners])
    listed = documents.filter[:, 0].astype(np.int64) * columns + documents.filter[:, 1]
    keys = documents.owners[pairs].astype(np.int64) * columns + np.asarray(documents.labels)[pairs]
    filtered = np.zeros(len(documents.labels), bool)
    filtered[pairs] = np.isin(keys, listed)
    return filtered


def _check_ids(documents: RecordDocuments) -> None:
    first = documents.first_of_id()
    again = np.flatnonzero(first != np.arange(len(first)))
    if len(again):
        raise ValueError(
            f"{documents.at(again[0])}: expected ids that differ, found that of "
            f"{documents.at(first[again[0]])}; "
            f"{counted(len(again), 'document has', 'documents have')} an id of others; "
            "--row_per_pair makes one document of rows of one id that follow each other"
        )


def _group(cell: Any) -> str | None:
    return None if cell_values.is_null(cell) or cell == "" else cell_values.identifier(cell)


def _split(cell: Any, allowed: set[str]) -> str:
    written = cell_values.text(cell).strip().lower()
    name = _SPLIT_NAMES.get(written, written)
    if name not in SPLITS:
        raise ValueError(
            f"expected {', '.join(SPLITS[:-1])} or {SPLITS[-1]}, found {written!r:.60}"
        )
    if name not in allowed:
        raise ValueError(
            f"expected {' or '.join(s for s in SPLITS if s in allowed)}, since files of their own "
            f"have the others, found {written!r}; --column split= leaves the column out"
        )
    return name
