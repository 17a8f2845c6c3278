"""A folder of raw files as one dataset: found, read, and checked against what is published."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from xmc_jax.data import holdout, raw
from xmc_jax.data.csr import Csr, concatenated
from xmc_jax.data.known import KNOWN
from xmc_jax.data.raw import RawItems
from xmc_jax.files.digests import sha256
from xmc_jax.runtime.wording import counted

# Names in use, in the order they are looked for: the repository's, then those of the archives of
# MM-AmazonTitles-300K and Renee, and of DeepXML. Each may end in .gz.
_ITEMS = {
    "train": ("trn.json", "trn.raw.txt", "train.raw.txt", "raw_data/train.raw.txt", "trn_X.txt"),
    "test": ("tst.json", "tst.raw.txt", "test.raw.txt", "raw_data/test.raw.txt", "tst_X.txt"),
    "label": ("lbl.json", "lbl.raw.txt", "label.raw.txt", "raw_data/label.raw.txt", "Y.txt"),
}
_MATRIX = {
    "train": ("trn_X_Y.txt", "trn_X_Y.npz"),
    "test": ("tst_X_Y.txt", "tst_X_Y.npz"),
}
_FILTER = {
    "train": ("filter_labels_train.txt", "trn_filter_labels.txt"),
    "test": ("filter_labels_test.txt", "tst_filter_labels.txt"),
}
_GROUPS = ("groups.tsv",)
_VALIDATION = ("validation.txt",)

Keep = Callable[[str, RawItems], None]
"""Is given "train", "test", "label" or "validation" and the next items of it, with their texts."""


@dataclasses.dataclass(frozen=True, eq=False)
class RawDataset:
    """A dataset in memory.

    Attributes:
        splits: "train", "test", "label", and "validation" where the folder names validation
            documents -> items; positives are over all L labels, each once.
        groups: split of documents -> i32[n], the source of each document; empty where unknown.
        filter: i32[p, 2], (test document, label) pairs to remove from predictions, each once.
        merged: "train", "test" -> duplicate labels of the file that were merged.
        raw_rows: split -> i32[n], rows of the training file, where its documents are in several
            splits; else empty.
        validation_filter: as `filter`, of validation documents; None where there are none.
    """

    splits: dict[str, RawItems]
    groups: dict[str, np.ndarray]
    filter: np.ndarray
    merged: dict[str, int]
    raw_rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    validation_filter: np.ndarray | None = None


def find(folder: pathlib.Path, train_only: bool = False) -> dict[str, pathlib.Path]:
    """Role -> file, of all that `read` will read.

    Args:
        train_only: leave the test files out, for a dataset that is to be split anew.

    Raises:
        ValueError: a file is missing; names what would do. Or the folder names its validation
            documents, and others are to be drawn.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of raw files, found none")
    splits = ("train",) if train_only else ("train", "test")
    files = {split: _first(folder, _ITEMS[split]) for split in (*splits, "label")}
    for split in splits:
        if ".json" not in files[split].name.lower():  # those hold their labels themselves
            files[f"{split} labels"] = _first(folder, _MATRIX[split])
    remedy = "; make an empty one if the dataset has no pairs to filter"
    files["filter"] = _first(folder, _FILTER[splits[-1]], remedy)
    if groups := _existing(folder, _GROUPS):
        files["groups"] = groups[0]
    if validation := _existing(folder, _VALIDATION):
        if train_only:
            raise already_named(validation[0])
        files["validation"] = validation[0]
        files["train filter"] = _first(folder, _FILTER["train"], remedy)
    return files


def already_named(where: str | pathlib.Path) -> ValueError:
    """The refusal to draw validation documents where `where` names some."""
    return ValueError(
        f"validation_fraction: expected 0, since {where} names the validation documents, got "
        "another; --mode=tune uses the named ones"
    )


def names_validation(folder: pathlib.Path) -> bool:
    """Whether a folder names validation documents among its training documents."""
    return bool(_existing(folder, _VALIDATION))


def read(
    files: Mapping[str, pathlib.Path],
    dataset: str,
    encoding: str,
    validation_fraction: float = 0.0,
    seed: int = 0,
    keep: Keep | None = None,
) -> RawDataset:
    """Reads and checks the files, in memory that does not grow with the texts if `keep` is given.

    Labels keep their ids in all splits. The filter's pairs of documents that are held out of the
    training file are taken out of their positives, as the test split's makers did: such predictions
    are removed before they are counted, so they could never be right.

    Args:
        dataset: the name; counts of known ones are checked.
        encoding: of the texts, "utf-8" or "latin-1".
        validation_fraction: share of the training documents that become the test split, at least;
            whole sources in a random order. Needs files without a test split, whose filter is the
            training split's. Documents without known sources are one source each.
        keep: is given the items of each split in order, some megabytes at a time, so that the texts
            need not be in memory; the result then has none. Whether all files fit is known only
            when the last item was given.

    Raises:
        ValueError: a file is bad, or does not fit the others or what is published.
    """
    return _RawFolderReader(files, dataset, encoding, keep).read(validation_fraction, seed)


def digests(files: Mapping[str, pathlib.Path]) -> dict[str, dict[str, str]]:
    """Role -> name and SHA-256 of each file, for the manifest."""
    return {role: {"name": p.name, "sha256": sha256(p)} for role, p in files.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldOut:
    """Documents of the training file that are not trained on."""

    name: str  # of the split that they are
    drawn: np.ndarray | None = None  # bool[n], of each document; None where they are named
    uids: frozenset[str] = frozenset()  # where they are named

    def of(self, first: int, block: RawItems) -> np.ndarray:
        """bool[n], of the items of a block, the first of which has this row."""
        if self.drawn is not None:
            return self.drawn[first : first + len(block)]
        return np.fromiter((uid in self.uids for uid in block.uids), bool, len(block))


class _RawFolderReader:
    """Reads a folder; see `read`."""

    def __init__(
        self, files: Mapping[str, pathlib.Path], dataset: str, encoding: str, keep: Keep | None
    ):
        self._files, self._dataset, self._encoding, self._keep = files, dataset, encoding, keep
        self._parts: dict[str, list[RawItems]] = collections.defaultdict(list)
        self._source_of = raw.read_groups(files["groups"]) if "groups" in files else None
        self._counts: dict[str, int] = {}

    def read(self, fraction: float, seed: int) -> RawDataset:
        for block in raw.blocks(self._files["label"], self._encoding):
            self._add("label", block)
        label = raw.together(self._parts["label"])
        _check_uids(self._files["label"], label.uids)
        self._counts["labels"] = len(label)
        check_published(self._dataset, self._counts)
        held_out = self._held_out(fraction, seed)
        positives, merged, rows = {}, {"train": 0, "test": 0}, {}
        for split in ("train", "test"):
            if split in self._files:
                whole, rows[split] = self._read_documents(
                    split, held_out if split == "train" else None
                )
                self._counts[split] = whole.rows
                pairs = len(whole.indices) if split == "train" else None
                check_published(self._dataset, self._counts, pairs)
                positives[split] = whole.deduplicated()
                merged[split] = len(whole.indices) - len(positives[split].indices)
        train_rows = rows["train"]
        if held_out is not None and held_out.drawn is None:
            self._check_named(held_out, train_rows, positives["train"])
        filters = self._filters(held_out, train_rows)
        if held_out is not None:
            whole = positives.pop("train")
            positives |= {split: whole.take(taken) for split, taken in train_rows.items()}
            held = positives[held_out.name]
            positives[held_out.name] = holdout.without(held, filters[held_out.name])
        splits = {
            split: dataclasses.replace(raw.together(self._parts[split]), positives=positives[split])
            for split in ("train", "test", "validation")
            if split in positives
        }
        groups = {}
        if self._source_of is not None:
            groups = {split: self._sources(split, items.uids) for split, items in splits.items()}
        return RawDataset(
            splits=splits | {"label": label},
            groups=groups,
            filter=filters["test"],
            merged=merged,
            raw_rows={s: r.astype(np.int32) for s, r in train_rows.items()} if held_out else {},
            validation_filter=filters.get("validation"),
        )

    def _add(self, split: str, block: RawItems) -> None:
        """Hands the texts of items on, or keeps them if there is nobody to take them."""
        if self._keep is not None:
            self._keep(split, block)
            block = dataclasses.replace(block, titles=[], contents=[])
        self._parts[split].append(dataclasses.replace(block, positives=None))

    def _read_documents(
        self, split: str, held_out: _HeldOut | None
    ) -> tuple[Csr, dict[str, np.ndarray]]:
        """The labels of all documents of a file, and for each split the rows that are in it."""
        path, matrix = self._files[split], self._files.get(f"{split} labels")
        positives = None if matrix is None else raw.read_label_matrix(matrix)
        parts: list[Csr] = []
        rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
        count = 0
        for block in raw.blocks(path, self._encoding, self._counts["labels"]):
            out = np.zeros(len(block), bool) if held_out is None else held_out.of(count, block)
            if block.positives is not None:
                parts.append(block.positives)
            for name, chosen in ((split, ~out), (held_out.name if held_out else split, out)):
                if chosen.any():
                    taken = np.flatnonzero(chosen)
                    self._add(name, block if chosen.all() else block.take(taken))
                    rows[name].append(count + taken)
            count += len(block)
        if positives is not None:
            self._check_matrix(split, positives, count)
        elif parts:
            positives = concatenated(parts)
        if positives is None or not len(positives.indices):
            raise ValueError(f"{path}: expected documents with labels, found none")
        return positives, {name: np.concatenate(parts) for name, parts in rows.items()}

    def _check_matrix(self, split: str, positives: Csr, rows: int) -> None:
        path, columns = self._files[f"{split} labels"], self._counts["labels"]
        if (positives.rows, positives.columns) != (rows, columns):
            raise ValueError(
                f"{path}: expected {counted(rows, 'row')}, the lines of {self._files[split].name}, "
                f"and {counted(columns, 'column')}, the lines of {self._files['label'].name}, "
                f"found {positives.rows} and {positives.columns}"
            )
        if positives.values.min(initial=1) <= 0:
            raise ValueError(f"{path}: expected positive values, found {positives.values.min():g}")

    def _held_out(self, fraction: float, seed: int) -> _HeldOut | None:
        """Which documents of the training file are in another split."""
        if "validation" in self._files:
            uids = frozenset(raw.read_names(self._files["validation"]))
            return _HeldOut("validation", uids=uids)
        if not fraction:
            return None
        # Whole sources are drawn, so all documents have to be known before the first is handed on.
        blocks = raw.blocks(self._files["train"], self._encoding)
        uids = [uid for block in blocks for uid in block.uids]
        known = self._source_of is not None
        sources = self._sources("train", uids) if known else np.arange(len(uids))
        return _HeldOut("test", drawn=draw(sources, fraction, seed))

    def _check_named(
        self, held_out: _HeldOut, rows: Mapping[str, np.ndarray], positives: Csr
    ) -> None:
        """Raises ValueError if named documents are missing, or nothing is left to train on."""
        path, named = self._files["validation"], len(held_out.uids)
        actual = len(rows.get("validation", ()))
        if actual != named:
            raise ValueError(
                f"{path}: expected uids of {counted(named, 'document')} of "
                f"{self._files['train'].name}, found {actual} with these"
            )
        for split, kind in (("train", "training"), ("validation", "validation")):
            if not positives.counts()[rows.get(split, np.zeros(0, int))].any():
                raise ValueError(
                    f"{path}: expected {kind} documents with labels to be left, found none"
                )

    def _filters(
        self, held_out: _HeldOut | None, rows: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Split -> i32[p, 2], see `RawDataset.filter`; held-out documents have training's."""
        filters = {}
        if "test" in self._files:
            filters["test"] = self._read_filter("filter", "test")
        if held_out is not None:
            role = "filter" if held_out.name == "test" else "train filter"
            pairs, out = self._read_filter(role, "train"), rows[held_out.name]
            pairs = pairs[np.isin(pairs[:, 0], out)]
            pairs[:, 0] = np.searchsorted(out, pairs[:, 0])
            filters[held_out.name] = pairs
        return filters

    def _read_filter(self, role: str, split: str) -> np.ndarray:
        counts = self._counts
        pairs = raw.read_filter(self._files[role], counts[split], counts["labels"])
        return np.unique(pairs, axis=0)

    def _sources(self, split: str, uids: list[str]) -> np.ndarray:
        """i32[n], the source of each document."""
        groups = self._source_of
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups.values()))}
        missing = next((uid for uid in uids if uid not in groups), None)
        if missing is not None:
            raise ValueError(
                f"{self._files['groups']}: expected a group for every document, found none for "
                f"{missing!r} of {self._files.get(split, self._files['train']).name}"
            )
        return np.array([numbers[groups[uid]] for uid in uids], np.int32)


def draw(sources: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool[n], which documents of a training file are held out; see `holdout.choose`.

    Args:
        sources: i[n], the source of each document.
        fraction: share of the documents that is held out, at least.

    Raises:
        ValueError: no document is left to train on.
    """
    drawn = holdout.choose(sources, fraction, seed)
    if drawn.all():
        raise ValueError(
            f"validation_fraction: expected to leave documents to train on, got {fraction} of "
            f"{counted(len(sources), 'document')} from {counted(len(np.unique(sources)), 'source')}"
        )
    return drawn


def _existing(folder: pathlib.Path, names: tuple[str, ...]) -> list[pathlib.Path]:
    """The files of these names, in the order of the names; capitals do not count."""
    there: dict[str, pathlib.Path] = {}
    for part in ("", *{name.rpartition("/")[0] for name in names if "/" in name}):
        listed = sorted(os.listdir(folder / part), reverse=True) if (folder / part).is_dir() else ()
        for name in listed:  # of two that differ in capitals the one with small letters is first
            there.setdefault(os.path.join(part, name).lower(), folder / part / name)
    paths = (there.get(name.lower() + suffix) for name in names for suffix in ("", ".gz"))
    return [path for path in paths if path is not None and path.is_file()]


def _first(folder: pathlib.Path, names: tuple[str, ...], remedy: str = "") -> pathlib.Path:
    paths = _existing(folder, names)
    if not paths:
        raise ValueError(
            f"{folder}: expected one of {', '.join(names)} (or + .gz), found none{remedy}"
        )
    return paths[0]


def _check_uids(path: pathlib.Path, uids: list[str]) -> None:
    """Raises ValueError if two labels have one identifier, by which predictions name them."""
    if len(set(uids)) == len(uids):
        return
    first: dict[str, int] = {}
    for line, uid in enumerate(uids, 1):
        if first.setdefault(uid, line) != line:
            raise ValueError(
                f"{path}:{line}: expected labels whose uids differ, found {uid!r:.60}, as line "
                f"{first[uid]} has"
            )


def check_published(dataset: str, counts: Mapping[str, int], pairs: int | None = None) -> None:
    """Raises ValueError if counts differ from what is published about a known name.

    Args:
        counts: "labels", "train", "test" -> how many there are, of those read so far.
        pairs: labels of all training documents, once they are read.
    """
    known = KNOWN.get(dataset)
    if known is None:
        return
    published = {split: getattr(known, split) for split in counts}
    if counts != published:
        raise ValueError(
            f"{dataset}: expected the published counts {published}, found {dict(counts)}; other "
            "data needs another --dataset name"
        )
    if pairs is None:
        return
    mean = pairs / known.train
    if abs(mean - known.labels_per_document) > 0.01 * known.labels_per_document:
        raise ValueError(
            f"{dataset}: expected the published {known.labels_per_document} labels per training "
            f"document, found {mean:.4f}"
        )
