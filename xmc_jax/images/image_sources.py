"""Where the images of a split's items come from: bytes of image files, item after item.

A source is one path; what lies there says what it is (see `open`). It lists, for each item, the
records that hold its images; only the list is kept in memory, and images are read one by one, from
any item on. Nothing is downloaded here: see `fetch`.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xmc_jax.data import image_maps
from xmc_jax.data.csr import Csr
from xmc_jax.data.image_vectors import STAMP
from xmc_jax.data.tables import cell_values, table_files
from xmc_jax.data.tables.parquet_tables import ParquetRows, ParquetTable
from xmc_jax.data.tables.table_format import Table
from xmc_jax.data.tables.text_tables import TextCells
from xmc_jax.images.image_records import (
    URLS,
    FileRecords,
    LineRecords,
    Records,
    TableRecords,
    columns_of,
    image_column,
    stamp,
)

MAX_BYTES = 32 << 20
"""Bytes of an image's file, unless told otherwise."""

_PREFIXES = {
    "train": ("train", "trn"),
    "test": ("test", "tst"),
    "label": ("label", "labels", "lbl"),
}
_NUMBERED = re.compile(r"(.+)_(\d{1,9})")
MAX_RECORD = 256 << 20  # bytes of a record of a text table, which may hold images


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """The images of one split's items.

    Attributes:
        listed: records of each of the n items, in order; most records are one image.
        files: that hold the images, or say whose they are; none for a folder of image files.
    """

    listed: Csr
    _records: Records
    files: Sequence[pathlib.Path] = ()

    def __len__(self) -> int:
        return self.listed.rows

    @property
    def items_with_images(self) -> int:
        """Items that have a record; whether its image can be read is another matter."""
        return int((self.listed.counts() > 0).sum())

    def read(
        self, limit: int, items: np.ndarray | None = None
    ) -> Iterator[tuple[int, int, bytes | str]]:
        """Reads images in item order.

        Args:
            limit: K; of each item the first K images listed, unreadable ones included.
            items: i[m], ascending, the items to read; None for all.

        Yields:
            Item; number k of the image among the item's; the bytes of its file or, as a str, the
            reason why there are none. Nothing for an item without images.
        """
        items = np.arange(len(self)) if items is None else items
        starts, ends = self.listed.indptr[items], self.listed.indptr[items + 1]
        counts = np.minimum(ends - starts, limit)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        fetched = self._records.fetch(self.listed.indices[np.repeat(starts, counts) + within])
        for item, start, count, end in zip(*(a.tolist() for a in (items, starts, counts, ends))):
            k = 0
            for images in itertools.islice(fetched, count):
                for image in images[: limit - k]:
                    yield item, k, image
                    k += 1
            if k < limit and start + count < end:  # some of those records were empty
                rest = self._records.fetch(self.listed.indices[start + count : end])
                for image in itertools.islice(itertools.chain.from_iterable(rest), limit - k):
                    yield item, k, image
                    k += 1

    def stamps(self) -> np.ndarray:
        """u8[n, 16], of names, sizes and times of the files that hold an item's images.

        While an item's stamp stays the same, so do its images; none is read for it. An item without
        images has zeros.
        """
        base = b"".join(map(stamp, self.files))
        with_images = self.listed.counts() > 0
        stamps = np.zeros((len(self), STAMP), np.uint8)
        numbers, place = np.unique(self.listed.indices, return_inverse=True)
        outside = self._records.stamps(numbers)
        if outside is None:
            stamps[with_images] = np.frombuffer(
                hashlib.blake2b(base, digest_size=STAMP).digest(), np.uint8
            )
            return stamps
        of_record, bounds = list(outside), self.listed.indptr.tolist()
        for item in np.flatnonzero(with_images).tolist():
            rows = place[bounds[item] : bounds[item + 1]].tolist()
            content = base + b"".join(of_record[row] for row in rows)
            digest = hashlib.blake2b(content, digest_size=STAMP).digest()
            stamps[item] = np.frombuffer(digest, np.uint8)
        return stamps


@dataclasses.dataclass(frozen=True)
class Place:
    """Where images are, for every split: the arguments of `open` that are the same for all.

    Attributes:
        path: a file or a folder.
        by: what image files are named by, "uid" or "index".
        allow_paths: whether paths in a table may lead out of its folder; see `files.paths.within`.
    """

    path: pathlib.Path
    by: str = "uid"
    allow_paths: bool = False

    def open(self, split: str, uids: Sequence[str]) -> ImageSource:
        """The images of a split's items; see the function `open`."""
        return open(self.path, split, uids, self.by, allow_paths=self.allow_paths)


def open(
    path,
    split: str,
    uids: Sequence[str],
    by: str = "uid",
    max_bytes: int = MAX_BYTES,
    allow_paths: bool = False,
) -> ImageSource:
    """Finds out what lies at a path, and which of it belongs to the items of a split.

    - A Parquet, JSONL or CSV file has one row per image, with a column `uid` (or `id`), or `index`,
      the number of the item in its split; and one of `bytes`, `image` (bytes, or Hugging Face's
      struct of bytes and path), `base64`, `path` (within the table's folder, see `allow_paths`). A
      cell may hold a list of images, a null none. Rows of other uids are skipped.
    - A folder of such files: those whose names begin with the split's (train, trn; test, tst;
      label, labels, lbl) or, if none does, all that do not begin with another split's.
    - A folder of image files: `<uid>`, `<uid>.<any>`, `<uid>_<k>.<any>`, or `<uid>/<any>`, ordered
      by k and name; with a subfolder named like the split, there.
    - ViXML's `{train,test,labels}_imgs_<size>_<K>.bin`, one base64 image per line, each with its
      `*_map.npy`; the file itself or its folder.
    - The folder that `fetch` has made; images that it could not get are not listed.
    - A folder with `images.parquet` and `{trn,tst,lbl}_img_index.npy`, the row of each item or -1.

    Args:
        path: a file or a folder.
        split: "train", "test" or "label".
        uids: identifiers of the split's n items, in order.
        by: what image files are named by, "uid" or "index".
        max_bytes: larger image files are not read; that is their reason.
        allow_paths: see `Place`.

    Raises:
        ValueError: no such source, a damaged file, or a map or index that does not fit the items.
    """
    path = pathlib.Path(path)
    if split not in _PREFIXES or by not in ("uid", "index"):
        raise ValueError(
            f"{path}: expected split train, test or label by uid or index, got {split!r} by {by!r}"
        )
    if path.is_file():
        if path.suffix.lower() == ".bin":
            return _lines(path, uids, max_bytes)
        if not path.name.lower().endswith(table_files.SUFFIXES):
            raise ValueError(
                f"{path}: expected a folder of images, a table of them ("
                f"{', '.join(table_files.IN_FOLDERS)}), or a .bin of ViXML, found another file; "
                "unpack archives, and name the folder of a picture"
            )
        return _table([path], uids, max_bytes, allow_paths)
    if not path.is_dir():
        raise ValueError(f"{path}: expected a file or folder of images, found none")
    fetched = (path / "images").is_dir() and (path / "inputs.json").is_file()
    if fetched:
        if not (path / "report.json").is_file():  # which fetch writes last
            raise ValueError(
                f"{path}: expected all images fetched, found an unfinished folder; run the same "
                "xmc_jax.images.fetch again"
            )
        path = path / "images"
    with os.scandir(path) as entries:
        there = [entry for entry in entries if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in there if _is(entry.is_dir))
        files = sorted(entry.name for entry in there if _is(entry.is_file))
    indices = [f"{prefix}_img_index.npy" for prefix in _PREFIXES[split]]
    index = next((name for name in indices if name in files), None)
    if index and "images.parquet" in files:
        return _indexed(path / "images.parquet", path / index, uids, max_bytes, allow_paths)
    names = "|".join(_PREFIXES[split])
    binaries = [name for name in files if re.fullmatch(rf"({names})_imgs_\d+_\d+\.bin", name, re.I)]
    if binaries:
        if len(binaries) > 1:
            raise ValueError(
                f"{path}: expected one .bin of {split}, found {', '.join(binaries)}; name one"
            )
        return _lines(path / binaries[0], uids, max_bytes)
    tables = [name for name in files if name.lower().endswith(table_files.IN_FOLDERS)]
    if not fetched and len(there) > 1:  # others may be tables of items, beside their pictures
        useful = [name for name in tables if _may_have_images(path / name)]
        tables = useful if useful or len(tables) < len(there) else tables
    if tables:
        return _table(_of_split(path, tables, split), uids, max_bytes, allow_paths, fetched)
    of_splits = {name: _split_of(name) for name in folders}
    if split in of_splits.values():
        (name, *_) = (name for name, owner in of_splits.items() if owner == split)
        return _files(path / name, uids, by, max_bytes)
    if any(of_splits.values()):
        raise ValueError(
            f"{path}: expected a folder {split}, as another split has one, found none; make an "
            "empty one if it has no images"
        )
    return _files(path, uids, by, max_bytes)


def without_images(folder: pathlib.Path) -> str | None:
    """Why the first of a folder's tables that have no images is none of images; None without."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        path = folder / name
        if name.lower().endswith(table_files.IN_FOLDERS) and not _may_have_images(path):
            try:
                columns_of(path, dict.fromkeys(table_files.open_table(path).columns, ""))
            except ValueError as error:
                return str(error)
    return None


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry of a folder is of a kind; one that leads nowhere is of none."""
    try:
        return kind()
    except OSError:
        return False


def _split_of(name: str) -> str | None:
    """The split that a folder is named for, in capitals or not."""
    lower = name.lower()
    return next((split for split, prefixes in _PREFIXES.items() if lower in prefixes), None)


def _may_have_images(path: pathlib.Path) -> bool:
    """Whether a table has a column of images, or of their URLs."""
    table = table_files.open_table(path, limit=MAX_RECORD)
    columns = dict.fromkeys(table.columns, "") | dict(table.types)
    return image_column(columns) is not None or any(name in columns for name in URLS)


def table_of_split(files: Sequence[pathlib.Path], split: str) -> pathlib.Path | None:
    """The only one of a folder's tables that is a split's by its name; None if there is no such."""
    owners = _owners_of([file.name for file in files])
    matching = [file for file in files if owners.get(file.name) == split]
    return matching[0] if len(matching) == 1 else None


def _owners_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> the split that it begins with, of those that begin with one."""
    return {
        name: owner
        for name in names
        for owner, prefixes in _PREFIXES.items()
        if re.match(rf"({'|'.join(prefixes)})(?![A-Za-z0-9])", name, re.IGNORECASE)
    }


def _of_split(folder: pathlib.Path, names: list[str], split: str) -> list[pathlib.Path]:
    """The tables that are a split's by their names, or else those that are nobody's."""
    owners = _owners_of(names)
    taken = [name for name in names if owners.get(name) == split]
    taken = taken or [name for name in names if name not in owners]
    kinds = {pathlib.PurePath(name).suffix.lower() for name in taken}
    if len(taken) != 1 and kinds != {".parquet"}:
        raise ValueError(
            f"{folder}: expected one table of {split}, or several Parquet files, found "
            f"{', '.join(taken or names)}"
        )
    return [folder / name for name in taken]


def _owners(uids: Sequence[str]) -> tuple[dict[str, int], np.ndarray]:
    """A number for each different uid; and i64[n], the number of each item's."""
    numbers: dict[str, int] = {}
    normal = map(cell_values.normal, uids)
    return numbers, np.array([numbers.setdefault(uid, len(numbers)) for uid in normal], np.int64)


def _grouped(owner: np.ndarray, of_item: np.ndarray) -> Csr:
    """Records of each item, in order, of `_owners`' i64[records] (-1: of no item) and i64[n]."""
    counts = np.bincount(owner[owner >= 0], minlength=int(of_item.max(initial=-1)) + 1)
    order = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    grouped = Csr(np.concatenate([[0], np.cumsum(counts)]), order, None, len(owner))
    return grouped.take(of_item)


def _match(
    keys: Iterable[tuple[Table, int, Any]], key: str, uids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Owner of each record by its table, place and cell, and i64[n], as `_grouped` takes them."""
    by_index = key == "index"
    numbers, of_item = _owners(list(map(str, range(len(uids)))) if by_index else uids)

    def owners() -> Iterator[int]:
        for table, place, cell in keys:
            try:
                uid = cell_values.identifier(cell)
                if by_index and uid not in numbers:
                    raise ValueError(f"expected a number below {len(numbers)}, found {cell!r:.60}")
            except ValueError as error:
                raise ValueError(f"{table.at(place)}: column {key}: {error}") from None
            yield numbers.get(uid, -1)

    return np.fromiter(owners(), np.int64), of_item


def _files(folder: pathlib.Path, uids: Sequence[str], by: str, max_bytes: int) -> ImageSource:
    numbers, of_item = _owners(uids if by == "uid" else list(map(str, range(len(uids)))))
    entries = []  # (number of the owner, k, name)
    with os.scandir(folder) as folder_entries:
        for entry in folder_entries:
            if _is(entry.is_dir):
                owner = numbers.get(cell_values.normal(entry.name))
                if owner is not None:
                    with os.scandir(entry.path) as inner:
                        entries += [
                            (owner, _rank(one.name), f"{entry.name}/{one.name}")
                            for one in inner
                            if not one.name.startswith(".") and not _is(one.is_dir)
                        ]
                continue
            name = cell_values.normal(entry.name)
            stem = cell_values.normal(pathlib.PurePath(name).stem)
            numbered = _NUMBERED.fullmatch(stem)
            if name in numbers or stem in numbers:
                entries.append((numbers.get(name, numbers.get(stem)), -1, entry.name))
            elif numbered and numbered[1] in numbers:
                entries.append((numbers[numbered[1]], int(numbered[2]), entry.name))
    entries.sort()
    names = [name for _, _, name in entries]
    owner = np.array([owner for owner, _, _ in entries], np.int64)
    return ImageSource(_grouped(owner, of_item), FileRecords(folder, names, max_bytes))


def _rank(name: str) -> int:
    """The number that a name ends with, before its suffix."""
    digits = re.search(r"(\d{1,9})$", pathlib.PurePath(name).stem)
    return int(digits[1]) if digits else -1


def _lines(path: pathlib.Path, uids: Sequence[str], max_bytes: int) -> ImageSource:
    """ViXML's base64 lines with their map. Source: ViXML reference, download_amazon_imgs.py."""
    map_path = path.with_name(f"{path.stem}_map.npy")
    if not map_path.is_file():
        raise ValueError(f"{path}: expected {map_path.name} beside it, found none")
    records = LineRecords(path, max_bytes)
    listed = image_maps.read(map_path, len(records))
    _check_items(map_path, listed, uids)
    return ImageSource(listed, records, (path, map_path))


def _table(
    files: list[pathlib.Path],
    uids: Sequence[str],
    max_bytes: int,
    allow_paths: bool,
    fetched: bool = False,
) -> ImageSource:
    """A table in one file, or in several Parquet files that are read one after the other.

    Of those that `fetch` has made, rows with an error have no image and are left out.
    """
    where = files[0]
    parts = [table_files.open_table(path, limit=MAX_RECORD) for path in files]
    cells: ParquetRows | TextCells
    if isinstance(parts[0], ParquetTable):
        key, column = columns_of(where, parts[0].types)
        for part in parts:
            for name in (key, column, *(["error"] if fetched else [])):
                if name not in part.columns:
                    raise ValueError(
                        f"{part.path}: expected a column {name}, found {', '.join(part.columns)}"
                    )
        keys = ((part, row, cell) for part in parts for row, (cell,) in part.rows([key]))
        owner, of_item = _match(keys, key, uids)
        if fetched:
            errors = (cell for part in parts for cell in part.cells("error"))
            owner[np.fromiter((cell is not None for cell in errors), bool, len(owner))] = -1
        cells = ParquetRows(parts, column)
    else:
        (part,) = parts
        key, column = columns_of(where, dict.fromkeys(part.columns, ""))
        cells = TextCells(part, column)
        owner, of_item = _match(((part, *pair) for pair in cells.keys(key)), key, uids)
    records = TableRecords(cells, column, where.parent, max_bytes, allow_paths)
    return ImageSource(_grouped(owner, of_item), records, files)


def _indexed(
    table_path: pathlib.Path,
    index_path: pathlib.Path,
    uids: Sequence[str],
    max_bytes: int,
    allow_paths: bool,
) -> ImageSource:
    """Rows of a Parquet file by an index of the items."""
    table = ParquetTable(table_path)
    _, column = columns_of(table_path, table.types | {"uid": "string"})
    listed = image_maps.read(index_path, table.num_rows)
    _check_items(index_path, listed, uids)
    rows = ParquetRows([table], column)
    records = TableRecords(rows, column, table_path.parent, max_bytes, allow_paths)
    return ImageSource(listed, records, (table_path, index_path))


def _check_items(path: pathlib.Path, listed: Csr, uids: Sequence[str]) -> None:
    if listed.rows != len(uids):
        raise ValueError(f"{path}: expected {len(uids)} items, as the split has, got {listed.rows}")
