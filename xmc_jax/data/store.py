"""Open a dataset folder, as `prepare` writes it; everything large is memory-mapped.

The folder: `{train,test,label}.tokens.npy` i32[n, T] right padded, `.lengths.npy` u16[n],
`.uids.txt`, `.titles.txt`; `{train,test}.positives.{indptr,indices}.npy`; `{train,test}.groups.npy`
i32[n] where sources are known; `{train,test}.raw_rows.npy` i32[n] where documents are held out;
`filter.npy` i32[p, 2]; the same of `validation`, with `validation.filter.npy`, where the raw files
name validation documents; and `manifest.json`, written last. Images have a folder of their own, see
`images`.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from xmc_jax.data import propensity
from xmc_jax.data.csr import Csr
from xmc_jax.data.image_rows import ImageRows, ImageStore
from xmc_jax.data.types import DataShape, Inputs, Prompts, own_tokens
from xmc_jax.files import array_folders, manifests
from xmc_jax.files.array_folders import FileFacts, FolderManifest

FORMAT = 1
"""Version of the folder's layout."""
SPLITS = ("train", "test", "label")
_DOCUMENTS = ("train", "test", "validation")  # the last one perhaps
_SCANNED = 1 << 24  # bytes looked through for line ends at a time
REMEDY = (
    "choose another folder (--out, --config.data.data_dir), or make this one anew: remove it and "
    "run the same command again (of xmc_jax.data.prepare: --overwrite)"
)

_Constant = Annotated[float, Field(ge=0, le=100)]


class _TokenizerFacts(BaseModel, strict=True):
    vocab_size: int


class _DatasetManifest(BaseModel, strict=True):
    """The fields that are read, see `prepare`."""

    files: dict[Annotated[str, Field(pattern=r"^[\w.-]+\.(npy|txt)$")], FileFacts]
    dataset: str
    max_length: int
    tokenizer: _TokenizerFacts
    propensity: Annotated[list[_Constant], Field(min_length=2, max_length=2)]
    validation: dict[str, Any] | None
    raw: dict[str, Any]
    report: dict[str, Any]
    special_tokens: bool = True
    prompts: Annotated[list[str], Field(min_length=2, max_length=2)] = ["", ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The texts, and perhaps images, of train, test or label.

    Attributes:
        tokens: i32[n, T], memory-mapped.
        lengths: u16[n], tokens per text; 0 only for an empty text without special tokens.
        images: of these items, or of the raw split that they are part of; None for text only.
        per_item: K, images taken of each item.
        image_items: i32[n], which of the items of `images` these are; None for all, in order.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    images: ImageRows | None = None
    per_item: int = 0
    image_items: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def inputs(self, ids: np.ndarray) -> Inputs:
        """The rows `ids` (i[n], in any order, repeated or not), copied."""
        texts = Inputs(tokens=self.tokens[ids], lengths=self.lengths[ids].astype(np.int32))
        if self.images is None:
            return texts
        images, count = self.images.gather(self._items(ids), self.per_item)
        return texts.replace(images=images, image_count=count)

    def own_tokens(self, ids: np.ndarray, prompts: Prompts) -> np.ndarray:
        """i64[n], see `types.own_tokens`, of the rows `ids`."""
        count = None
        if self.images is not None:
            count = self.images.count(self._items(ids), self.per_item)
        return own_tokens(self.lengths[ids].astype(np.int64), count, prompts)

    def _items(self, ids: np.ndarray) -> np.ndarray:
        return ids if self.image_items is None else self.image_items[ids]


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """A dataset folder; see the module.

    `split` is "train", "test", "label" or, where there is one, "validation" throughout.

    Attributes:
        folder: where it lies.
        manifest: what `prepare` recorded.
        digest: SHA-256 of manifest.json; equal on two hosts when their data are.
        train: texts of the N training documents.
        test: texts of the M test documents (held-out training documents in a validation split).
        label: texts of the L labels.
        validation: texts of the validation documents that the raw files name, which are neither
            trained on nor tested on; None where they name none.
        images: the image folder whose images the splits have; None for text only.
    """

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    digest: str
    train: Split
    test: Split
    label: Split
    _positives: Mapping[str, Csr]
    _filter: Mapping[str, np.ndarray]
    validation: Split | None = None
    images: ImageStore | None = None

    def with_images(self, images: ImageStore, per_item: int) -> "Store":
        """The same with images.

        Args:
            per_item: K, at most so many of each item.

        Raises:
            ValueError: they are not of these items; names both.
        """
        if per_item < 1:
            raise ValueError(f"data.images.per_item: expected at least 1, got {per_item}")
        raw_rows = self.raw_rows()
        splits = {}
        for name in self.splits:
            split, source, items = getattr(self, name), name, raw_rows.get(name)
            if items is not None:
                source = "train"
                what = f"{images.folder}/manifest.json: train items"
                _compare(what, sum(map(len, raw_rows.values())), len(images.train))
            else:
                uids = self.manifest["files"][f"{name}.uids.txt"]["sha256"]
                what = f"{images.folder}/manifest.json: source.uids.{name}"
                recorded_uids = images.manifest["source"].get("uids")
                _compare(
                    what, uids, recorded_uids.get(name) if isinstance(recorded_uids, dict) else None
                )
            rows = getattr(images, source)
            splits[name] = dataclasses.replace(
                split, images=rows, per_item=per_item, image_items=items
            )
        return dataclasses.replace(self, images=images, **splits)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that it has."""
        return SPLITS if self.validation is None else (*SPLITS, "validation")

    @functools.cached_property
    def shape(self) -> DataShape:
        """What the shapes of a run's arrays depend on."""
        positives = self.positives("train")
        most_first = np.sort(positives.counts())[::-1]
        ends = 2 ** np.arange(max(len(most_first) - 1, 0).bit_length() + 1)
        return DataShape(
            documents=self.num_documents,
            test=self.num_test,
            labels=self.num_labels,
            length=self.max_length,
            pairs=len(positives.indices),
            positives=tuple(int(most_first[:end].sum()) for end in ends),
            image_width=0 if self.images is None else self.images.width,
            images_per_item=self.train.per_item,
        )

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.manifest["dataset"]

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.train)

    @property
    def num_test(self) -> int:
        """M."""
        return len(self.test)

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.label)

    @property
    def max_length(self) -> int:
        """T."""
        return self.manifest["max_length"]

    @property
    def special_tokens(self) -> bool:
        """Whether texts carry the tokenizer's special tokens; bare ones are for decoders."""
        return self.manifest.get("special_tokens", True)

    @property
    def prompts(self) -> tuple[str, str]:
        """What was put before the texts of documents and of labels before they were tokenised."""
        document, label = self.manifest.get("prompts", ("", ""))
        return document, label

    @property
    def propensity(self) -> tuple[float, float]:
        """The dataset's constants A and B."""
        a, b = self.manifest["propensity"]
        return a, b

    def positives(self, split: str) -> Csr:
        """Labels of each document of "train", "test" or "validation", each once, ascending."""
        return self._positives[split]

    def filter(self, split: str = "test") -> np.ndarray:
        """i32[p, 2]: (document, label) pairs to remove from predictions; "train" has none."""
        if split not in self._filter:
            splits = " or ".join(self._filter)
            raise ValueError(f"{self.folder}: expected filter pairs of {splits}, got {split!r}")
        return self._filter[split]

    def raw_rows(self) -> dict[str, np.ndarray]:
        """Split -> i32[n], the row of each of its documents in the raw training file.

        Empty where the training file is the training split.

        Raises:
            ValueError: the folder was made before it kept them.
        """
        files = {split: f"{split}.raw_rows.npy" for split in _DOCUMENTS}
        drawn = self.manifest["validation"] is not None
        for split in ("train", "test") if drawn else ():
            if files[split] not in self.manifest["files"]:
                raise ValueError(
                    f"{self.folder}: expected {files[split]}, which says whose images are whose, "
                    "found a folder made before there were images; make it anew with python -m "
                    "xmc_jax.data.prepare --overwrite"
                )
        return {
            split: np.load(self.folder / file, allow_pickle=False)
            for split, file in files.items()
            if file in self.manifest["files"]
        }

    def raw_uids(self) -> dict[str, list[str]]:
        """The identifiers of the items of the raw files' splits, but of a test split left out."""
        rows = self.raw_rows()
        uids = {split: self.uids(split) for split in self.splits if split not in rows}
        if rows:
            uids["train"] = [""] * sum(map(len, rows.values()))
            for split, places in rows.items():
                for place, uid in zip(places.tolist(), self.uids(split)):
                    uids["train"][place] = uid
        return uids

    def largest_token(self) -> tuple[int, str]:
        """The largest token id in the texts, padding included, and its split; reads all tokens."""
        return max((int(getattr(self, s).tokens.max(initial=0)), s) for s in self.splits)

    @functools.cached_property
    def label_frequency(self) -> np.ndarray:
        """i64[L], training documents of each label."""
        return np.bincount(self.positives("train").indices, minlength=self.num_labels)

    @functools.cached_property
    def inverse_propensity(self) -> np.ndarray:
        """f64[L], from the training positives."""
        return propensity.inverse_propensity(
            self.label_frequency, self.num_documents, *self.propensity
        )

    def texts(self, split: str, ids: np.ndarray | None = None) -> list[str]:
        """The titles of the items `ids` (i[n]), of all by default.

        They are to show, without the content, tokenised or not. Of a few items no more is read into
        memory than theirs.
        """
        path = self.folder / f"{split}.titles.txt"
        count = len(getattr(self, split))
        return _read_lines(path, count) if ids is None else _read_some_lines(path, count, ids)

    def uids(self, split: str) -> list[str]:
        """The identifier of each item."""
        return _read_lines(self.folder / f"{split}.uids.txt", len(getattr(self, split)))

    def groups(self, split: str) -> np.ndarray | None:
        """i32[n], the source of each document, numbered over both splits; None where unknown."""
        name = f"{split}.groups.npy"
        return (
            np.load(self.folder / name, allow_pickle=False)
            if name in self.manifest["files"]
            else None
        )


def open(folder, expect: Mapping[str, Any] | None = None, verify: bool = False) -> Store:
    """Opens a dataset folder after checking it against its manifest.

    Args:
        expect: dotted manifest field -> value that the run needs, e.g.
            {"tokenizer.digest": ..., "max_length": 32}.
        verify: also hash every file; sizes, dtypes and shapes are always checked.

    Raises:
        ValueError: the folder differs from its manifest or from `expect`; names both values.
    """
    folder = pathlib.Path(folder)
    manifest = array_folders.read_manifest(
        folder, FORMAT, _DatasetManifest, "a dataset folder", REMEDY
    )
    content = manifest.content
    recorded = manifests.flat(content)
    for field, value in (expect or {}).items():
        manifest.compare(field, value, recorded.get(field))
    documents = [split for split in _DOCUMENTS if f"{split}.tokens.npy" in content["files"]]
    for name in (f"{split}.{kind}.txt" for split in SPLITS for kind in ("uids", "titles")):
        if name not in content["files"]:
            manifest.compare("files", name, "none")
    arrays = manifest.open(content["files"], verify)
    _check_arrays(manifest, arrays)
    splits = {
        split: Split(arrays[f"{split}.tokens"], arrays[f"{split}.lengths"])
        for split in (*documents, "label")
    }
    labels = len(splits["label"])
    positives = {
        split: Csr(*(arrays[f"{split}.positives.{x}"] for x in ("indptr", "indices")), None, labels)
        for split in documents
    }
    return Store(
        folder=folder,
        manifest=content,
        digest=manifest.digest,
        _positives=positives,
        _filter={split: arrays[_filter_name(split)] for split in documents if split != "train"},
        **splits,
    )


def _filter_name(split: str) -> str:
    return "filter" if split == "test" else f"{split}.filter"


def escape(text: str) -> str:
    """One line for any text; `Store.texts` and `Store.uids` undo it."""
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def lines(texts: Iterable[str]) -> bytes:
    """The contents of `{split}.uids.txt` and `{split}.titles.txt`."""
    return "".join(escape(text) + "\n" for text in texts).encode("utf-8")


def _read_lines(path: pathlib.Path, count: int) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
        texts = [_unescape(line) if "\\" in line else line for line in lines]
    except (KeyError, UnicodeDecodeError) as error:
        raise _damaged(path) from error
    _compare(f"{path}: lines", count, len(texts))
    return texts


def _read_some_lines(path: pathlib.Path, count: int, numbers: np.ndarray) -> list[str]:
    if not len(numbers):  # an empty file cannot be mapped
        return []
    content = np.memmap(path, np.uint8, "r")
    ends = np.concatenate(
        [
            start + np.flatnonzero(content[start : start + _SCANNED] == ord("\n"))
            for start in range(0, len(content), _SCANNED)
        ]
    )
    _compare(f"{path}: lines", count, len(ends))
    starts = np.concatenate([[0], ends + 1])[numbers]
    lines = (bytes(content[start:end]) for start, end in zip(starts, ends[numbers]))
    try:
        return [_unescape(line.decode("utf-8")) for line in lines]
    except (KeyError, UnicodeDecodeError) as error:
        raise _damaged(path) from error


def _damaged(path: pathlib.Path) -> ValueError:
    return ValueError(f"{path}: expected texts as written, found a damaged file; {REMEDY}")


def _unescape(line: str) -> str:
    undo = {"\\\\": "\\", "\\n": "\n"}
    return re.sub(r"\\.?", lambda m: undo[m[0]], line)


def _check_arrays(manifest: FolderManifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless the arrays that every folder has fit together."""

    def check(name: str, dtype: type, *shape: int | None) -> np.ndarray:
        array = arrays.get(name)
        fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
        if not fits or any(n not in (None, size) for n, size in zip(shape, array.shape)):
            actual = "none" if array is None else f"{array.dtype}{list(array.shape)}"
            wanted = [size if size is not None else "n" for size in shape]
            manifest.compare_file(f"{name}.npy", f"{np.dtype(dtype)}{wanted}", actual)
        return array

    def within(name: str, array: np.ndarray, limit: int) -> None:
        if array.size and not (array.min() >= 0 and array.max() < limit):
            actual = f"{array.min()} to {array.max()}"
            manifest.compare_file(f"{name}.npy", f"numbers in [0, {limit})", actual)

    count, max_length = {}, manifest.content["max_length"]
    documents = _DOCUMENTS if "validation.tokens" in arrays else ("train", "test")
    for split in ("label", *documents):
        lengths = check(f"{split}.lengths", np.uint16, None)
        within(f"{split}.lengths", lengths, max_length + 1)
        count[split] = len(check(f"{split}.tokens", np.int32, len(lengths), max_length))
    for split in documents:
        name = f"{split}.positives.indptr"
        indptr = check(name, np.int64, count[split] + 1)
        indices = check(f"{split}.positives.indices", np.int32, None)
        if indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
            expected = f"ascending offsets to {len(indices)}"
            manifest.compare_file(f"{name}.npy", expected, "others")
        within(f"{split}.positives.indices", indices, count["label"])
        for name in (f"{split}.groups", f"{split}.raw_rows"):
            if name in arrays:
                check(name, np.int32, count[split])
        if split != "train":
            pairs = check(_filter_name(split), np.int32, None, 2)
            within(_filter_name(split), pairs[:, 0], count[split])
            within(_filter_name(split), pairs[:, 1], count["label"])


def _compare(what: str, expected: Any, actual: Any) -> None:
    array_folders.compare(what, expected, actual, REMEDY)
