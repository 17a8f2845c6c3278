"""A folder of raw files as one dataset: found, read, and checked against what is published."""

import dataclasses
import pathlib

import numpy as np

from xmc_jax.data import raw
from xmc_jax.data.known import KNOWN
from xmc_jax.data.raw import Items
from xmc_jax.files.digests import sha256

# Names in use, in the order they are looked for: the repository's, then those of the archives of
# MM-AmazonTitles-300K and Renee. Each may end in .gz.
_ITEMS = {
    "train": ("trn.json", "trn.raw.txt", "train.raw.txt", "raw_data/train.raw.txt"),
    "test": ("tst.json", "tst.raw.txt", "test.raw.txt", "raw_data/test.raw.txt"),
    "label": ("lbl.json", "lbl.raw.txt", "label.raw.txt", "raw_data/label.raw.txt"),
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


@dataclasses.dataclass(frozen=True, eq=False)
class RawDataset:
    """A dataset in memory.

    Attributes:
        splits: "train", "test", "label" -> items; positives are over all L labels, each once.
        groups: "train", "test" -> i32[n], the source of each document; empty where unknown.
        filter: i32[p, 2], (test document, label) pairs to remove from predictions, each once.
        merged: "train", "test" -> duplicate labels that were merged.
        raw_rows: "train", "test" -> i32[n], rows of the training file, where documents of it are
            held out; else empty.
    """

    splits: dict[str, Items]
    groups: dict[str, np.ndarray]
    filter: np.ndarray
    merged: dict[str, int]
    raw_rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def find(folder: pathlib.Path, train_only: bool = False) -> dict[str, pathlib.Path]:
    """Role -> file, of all that `read` will read.

    Args:
        folder: the raw files.
        train_only: leave the test files out, for a dataset that is to be split anew.

    Raises:
        ValueError: a file is missing; names what would do.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of raw files, found none")
    splits = ("train",) if train_only else ("train", "test")
    files = {split: _first(folder, _ITEMS[split]) for split in (*splits, "label")}
    for split in splits:
        if ".json" not in files[split].suffixes:  # those hold their labels themselves
            files[f"{split} labels"] = _first(folder, _MATRIX[split])
    remedy = "; make an empty one if the dataset has no pairs to filter"
    files["filter"] = _first(folder, _FILTER[splits[-1]], remedy)
    groups = _existing(folder, _GROUPS)
    return files | ({"groups": groups[0]} if groups else {})


def read(files: dict[str, pathlib.Path], dataset: str, encoding: str) -> RawDataset:
    """Reads and checks the files.

    Args:
        files: see `find`. Without a test split, the filter is the training split's.
        dataset: the name; counts of known ones are checked.
        encoding: of the texts, "utf-8" or "latin-1".

    Raises:
        ValueError: a file is bad, or does not fit the others or what is published.
    """
    label = raw.read_items(files["label"], encoding)
    num_labels = len(label.titles)
    splits = {
        split: _read_split(files, split, encoding, num_labels)
        for split in ("train", "test")
        if split in files
    }
    _check_published(dataset, splits, num_labels)
    merged = {}
    for split, items in splits.items():
        unique = items.positives.deduplicated()
        merged[split] = len(items.positives.indices) - len(unique.indices)
        splits[split] = dataclasses.replace(items, positives=unique)
    filtered = splits["test" if "test" in files else "train"]
    pairs = raw.read_filter(files["filter"], len(filtered.titles), num_labels)
    groups = {}
    if "groups" in files:
        names = raw.read_groups(files["groups"])
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
        for split, items in splits.items():
            missing = next((uid for uid in items.uids if uid not in names), None)
            if missing is not None:
                raise ValueError(
                    f"{files['groups']}: expected a group for every document, found none for "
                    f"{missing!r} of {files[split].name}"
                )
            groups[split] = np.array([numbers[names[uid]] for uid in items.uids], np.int32)
    return RawDataset(splits | {"label": label}, groups, np.unique(pairs, axis=0), merged)


def digests(files: dict[str, pathlib.Path]) -> dict[str, dict[str, str]]:
    """Role -> name and SHA-256 of each file, for the manifest."""
    return {role: {"name": p.name, "sha256": sha256(p)} for role, p in files.items()}


def _existing(folder: pathlib.Path, names: tuple[str, ...]) -> list[pathlib.Path]:
    paths = (folder / (name + suffix) for name in names for suffix in ("", ".gz"))
    return [path for path in paths if path.is_file()]


def _first(folder: pathlib.Path, names: tuple[str, ...], remedy: str = "") -> pathlib.Path:
    paths = _existing(folder, names)
    if not paths:
        raise ValueError(
            f"{folder}: expected one of {', '.join(names)} (or + .gz), found none{remedy}"
        )
    return paths[0]


def _read_split(files, split: str, encoding: str, num_labels: int) -> Items:
    path = files[split]
    items = raw.read_items(path, encoding, num_labels)
    positives = items.positives
    if f"{split} labels" in files:
        path = files[f"{split} labels"]
        positives = raw.read_label_matrix(path)
        if (positives.rows, positives.columns) != (len(items.titles), num_labels):
            raise ValueError(
                f"{path}: expected {len(items.titles)} rows, the lines of {files[split].name}, and "
                f"{num_labels} columns, the lines of {files['label'].name}, found {positives.rows} "
                f"and {positives.columns}"
            )
        if positives.values.min(initial=1) <= 0:
            raise ValueError(f"{path}: expected positive values, found {positives.values.min():g}")
    if positives is None or not len(positives.indices):
        raise ValueError(f"{path}: expected documents with labels, found none")
    return dataclasses.replace(items, positives=positives)


def _check_published(dataset: str, splits: dict[str, Items], num_labels: int) -> None:
    known = KNOWN.get(dataset)
    if known is None:
        return
    found = {s: len(items.titles) for s, items in splits.items()} | {"labels": num_labels}
    published = {split: getattr(known, split) for split in found}
    if found != published:
        raise ValueError(
            f"{dataset}: expected the published counts {published}, found {found}; other data "
            "needs another --dataset name"
        )
    mean = len(splits["train"].positives.indices) / known.train
    if abs(mean - known.labels_per_document) > 0.01 * known.labels_per_document:
        raise ValueError(
            f"{dataset}: expected the published {known.labels_per_document} labels per training "
            f"document, found {mean:.4f}"
        )
