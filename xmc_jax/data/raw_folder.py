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
        folder: the raw files.
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
        files: see `find`.
        dataset: the name; counts of known ones are checked.
        encoding: of the texts, "utf-8" or "latin-1".
        validation_fraction: share of the training documents that become the test split, at least;
            whole sources in a random order. Needs files without a test split, whose filter is the
            training split's. Documents without known sources are one source each.
        seed: of that order.
        keep: is given the items of each split in order, some megabytes at a time, so that the texts
            need not be in memory; the result then has none. Whether all files fit is known only
            when the last item was given.

    Raises:
        ValueError: a file is bad, or does not fit the others or what is published.
    """
    groups = raw.read_groups(files["groups"]) if "groups" in files else None
    items = _Collected(keep)
    for block in raw.blocks(files["label"], encoding):
        items.add("label", block)
    label = items.of("label")
    _check_uids(files["label"], label.uids)
    counts = {"labels": len(label)}
    check_published(dataset, counts)
    held_out = _held_out(files, encoding, groups, validation_fraction, seed)
    positives, merged, rows = {}, {}, {}
    for split in ("train", "test"):
        if split in files:
            out = held_out if split == "train" else None
            read_positives, rows[split] = _read_documents(
                files, split, encoding, len(label), out, items
            )
            counts[split] = read_positives.rows
            pairs = len(read_positives.indices) if split == "train" else None
            check_published(dataset, counts, pairs)
            positives[split] = read_positives.deduplicated()
            merged[split] = len(read_positives.indices) - len(positives[split].indices)
    train_rows = rows["train"]
    if held_out is not None:
        _check_held_out(files, held_out, train_rows, positives["train"])
    filters = _filters(files, counts, held_out, train_rows)
    splits = {}
    for split in ("train", "test", "validation"):
        if split in train_rows:
            labels = positives["train"]
            if held_out is not None:
                labels = labels.take(train_rows[split])
                if split == held_out.name:
                    labels = holdout.without(labels, filters[split])
        elif split in positives:
            labels = positives[split]
        else:
            continue
        splits[split] = dataclasses.replace(items.of(split), positives=labels)
    return RawDataset(
        splits=splits | {"label": label},
        groups={} if groups is None else _groups(files, groups, splits),
        filter=filters["test"],
        merged={"train": 0, "test": 0} | merged,
        raw_rows={} if held_out is None else {s: r.astype(np.int32) for s, r in train_rows.items()},
        validation_filter=filters.get("validation"),
    )


def digests(files: Mapping[str, pathlib.Path]) -> dict[str, dict[str, str]]:
    """Role -> name and SHA-256 of each file, for the manifest."""
    return {role: {"name": p.name, "sha256": sha256(p)} for role, p in files.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldOut:
    """Documents of the training file that are not trained on.

    Attributes:
        name: the split that they are.
        drawn: bool[n], of each document; None where they are named.
        uids: their identifiers where they are named.
    """

    name: str
    drawn: np.ndarray | None = None
    uids: frozenset[str] = frozenset()

    def of(self, first: int, block: RawItems) -> np.ndarray:
        """bool[n], of the items of a block, the first of which has this row."""
        if self.drawn is not None:
            return self.drawn[first : first + len(block)]
        return np.fromiter((uid in self.uids for uid in block.uids), bool, len(block))


class _Collected:
    """RawItems by split: their texts handed on, or in memory if there is nobody to take them."""

    def __init__(self, keep: Keep | None):
        self._keep = keep
        self._parts: dict[str, list[RawItems]] = collections.defaultdict(list)

    def add(self, split: str, block: RawItems) -> None:
        if self._keep is not None:
            self._keep(split, block)
            block = dataclasses.replace(block, titles=[], contents=[])
        self._parts[split].append(dataclasses.replace(block, positives=None))

    def of(self, split: str) -> RawItems:
        return raw.together(self._parts[split])


def _read_documents(
    files: Mapping[str, pathlib.Path],
    split: str,
    encoding: str,
    num_labels: int,
    held_out: _HeldOut | None,
    items: _Collected,
) -> tuple[Csr, dict[str, np.ndarray]]:
    """Reads a file of documents, and its matrix of labels if they are not in it.

    Returns:
        The labels of all documents of the file, and for each split the rows that are in it.
    """
    matrix = f"{split} labels"
    positives = raw.read_label_matrix(files[matrix]) if matrix in files else None
    parts: list[Csr] = []
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    count = 0
    for block in raw.blocks(files[split], encoding, num_labels):
        out = np.zeros(len(block), bool) if held_out is None else held_out.of(count, block)
        if block.positives is not None:
            parts.append(block.positives)
        for name, chosen in ((split, ~out), (held_out.name if held_out else split, out)):
            if chosen.any():
                taken = np.flatnonzero(chosen)
                items.add(name, block if chosen.all() else block.take(taken))
                rows[name].append(count + taken)
        count += len(block)
    if positives is not None:
        _check_matrix(files, split, positives, count, num_labels)
    elif parts:
        positives = concatenated(parts)
    if positives is None or not len(positives.indices):
        raise ValueError(f"{files[split]}: expected documents with labels, found none")
    return positives, {name: np.concatenate(found) for name, found in rows.items()}


def _held_out(
    files: Mapping[str, pathlib.Path],
    encoding: str,
    groups: Mapping[str, str] | None,
    fraction: float,
    seed: int,
) -> _HeldOut | None:
    """Which documents of the training file are in another split."""
    if "validation" in files:
        return _HeldOut("validation", uids=frozenset(raw.read_names(files["validation"])))
    if not fraction:
        return None
    # Whole sources are drawn, and so all documents have to be known before the first is handed on.
    uids = [uid for block in raw.blocks(files["train"], encoding) for uid in block.uids]
    sources = np.arange(len(uids)) if groups is None else _sources(files, "train", groups, uids)
    return _HeldOut("test", drawn=draw(sources, fraction, seed))


def draw(sources: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool[n], which documents of a training file are held out; see `holdout.choose`.

    Args:
        sources: i[n], the source of each document.
        fraction: share of the documents that is held out, at least.
        seed: of the choice.

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


def _check_held_out(
    files: Mapping[str, pathlib.Path],
    held_out: _HeldOut,
    rows: Mapping[str, np.ndarray],
    positives: Csr,
) -> None:
    """Raises ValueError if named documents are not there, or there is nothing to train on."""
    if held_out.drawn is not None:
        return
    path, named = files["validation"], len(held_out.uids)
    found = len(rows.get("validation", ()))
    if found != named:
        raise ValueError(
            f"{path}: expected uids of {counted(named, 'document')} of {files['train'].name}, "
            f"found {found} "
            "with these"
        )
    for split, what in (("train", "training"), ("validation", "validation")):
        if not positives.counts()[rows.get(split, np.zeros(0, int))].any():
            raise ValueError(
                f"{path}: expected {what} documents with labels to be left, found none"
            )


def _filters(
    files: Mapping[str, pathlib.Path],
    counts: Mapping[str, int],
    held_out: _HeldOut | None,
    rows: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Split -> i32[p, 2], see `RawDataset.filter`; of held-out documents the training filter's."""
    filters = {}
    if "test" in files:
        pairs = raw.read_filter(files["filter"], counts["test"], counts["labels"])
        filters["test"] = np.unique(pairs, axis=0)
    if held_out is not None:
        path = files["filter" if held_out.name == "test" else "train filter"]
        pairs = np.unique(raw.read_filter(path, counts["train"], counts["labels"]), axis=0)
        out = rows[held_out.name]
        pairs = pairs[np.isin(pairs[:, 0], out)]
        pairs[:, 0] = np.searchsorted(out, pairs[:, 0])
        filters[held_out.name] = pairs
    return filters


def _groups(
    files: Mapping[str, pathlib.Path], groups: Mapping[str, str], splits: Mapping[str, RawItems]
) -> dict[str, np.ndarray]:
    """Split -> i32[n], the source of each document."""
    return {split: _sources(files, split, groups, items.uids) for split, items in splits.items()}


def _sources(
    files: Mapping[str, pathlib.Path], split: str, groups: Mapping[str, str], uids: list[str]
) -> np.ndarray:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups.values()))}
    missing = next((uid for uid in uids if uid not in groups), None)
    if missing is not None:
        raise ValueError(
            f"{files['groups']}: expected a group for every document, found none for {missing!r} "
            f"of {files.get(split, files['train']).name}"
        )
    return np.array([numbers[groups[uid]] for uid in uids], np.int32)


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


def _check_matrix(
    files: Mapping[str, pathlib.Path], split: str, positives: Csr, rows: int, columns: int
) -> None:
    path = files[f"{split} labels"]
    if (positives.rows, positives.columns) != (rows, columns):
        raise ValueError(
            f"{path}: expected {counted(rows, 'row')}, the lines of {files[split].name}, and "
            f"{counted(columns, 'column')}, the lines of {files['label'].name}, found "
            f"{positives.rows} and {positives.columns}"
        )
    if positives.values.min(initial=1) <= 0:
        raise ValueError(f"{path}: expected positive values, found {positives.values.min():g}")


def check_published(dataset: str, counts: Mapping[str, int], pairs: int | None = None) -> None:
    """Raises ValueError if counts differ from what is published about a known name.

    Args:
        dataset: the name.
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
