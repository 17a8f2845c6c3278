"""A user's own records, JSONL, CSV or Parquet, to a raw folder that `prepare` reads.

A document is a record with `text` (or `title`, and perhaps `content`) and `labels`; perhaps `id`,
`images`, `group` (documents of a group stay in one split), `filter` (labels that may not be
predicted for it), `weights` and `split`. A label has `id` and `text`, perhaps `content` and
`images`. See docs/data.md.

The folder holds `{trn,tst,lbl}.json`, `filter_labels_{train,test}.txt`, `groups.tsv` where
documents share a group or a text, `validation.txt` with the uids of the documents in `trn.json`
that are for validation, if any are; `{trn,tst,lbl}.images.csv` where there are images;
`report.json`; and `records.json`, what it was made from. All but the last are the same for the same
records, whatever the format. The same files leave it as it is; it appears only when it is whole.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xmc_jax.config import RecordsOptions
from xmc_jax.data.records import data_report, record_scan
from xmc_jax.data.records.record_scan import Keep, Scan
from xmc_jax.data.tables import named_columns, table_files
from xmc_jax.data.tables.named_columns import Opened
from xmc_jax.data.tables.table_format import Table
from xmc_jax.files import atomic, json_files, locks, manifests
from xmc_jax.files.digests import sha256
from xmc_jax.runtime.wording import counted

FORMAT = 2
"""Version of what a raw folder says of the same records; those of earlier ones are taken."""

# What folders of earlier versions, which do not say it, were made with.
_BEFORE = {"delimiter": "", "label_columns": [], "row_per_pair": False, "validation": []}
_LABEL_FIELDS = ("id", "text", "content", "images")
_ROLES = (*record_scan.SPLITS, "label")
_NAMES = {"train": "trn", "test": "tst", "label": "lbl"}

encode = json.JSONEncoder(ensure_ascii=False).encode
"""One line of JSON."""


class RecordsConfig:
    """Which records, and how they are read.

    Args:
        records: a folder with `train.*`, perhaps `validation.*` and `test.*`, and `label.*` or
            `labels.*`; or a file of documents.
        overwrite: replace a folder that was made from other records.

    Attributes:
        records: see above.
        overwrite: see above.
        options: see `config.RecordsOptions`.
        form: how the labels of documents are written.
        named: field -> columns that are to be taken for it.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(self, records: str | pathlib.Path, overwrite: bool = False, **options: Any):
        self.records, self.overwrite = pathlib.Path(records), overwrite
        self.options = options = RecordsOptions(**options)
        self.form = named_columns.Form(
            options.label_columns, options.row_per_pair, options.separator
        )
        self.named: dict[str, list[str]] = {}
        for column in options.columns:
            field, equals, name = column.partition("=")
            if not equals or field not in (*named_columns.FIELDS, "title"):
                fields = ", ".join(named_columns.FIELDS)
                raise ValueError(
                    f"records: column: expected FIELD=NAME, FIELD one of {fields}, got {column!r}"
                )
            self.named.setdefault("text" if field == "title" else field, []).append(name)


def folder(data_dir: str | pathlib.Path, dataset: str) -> pathlib.Path:
    """The raw folder of a dataset that is made of records."""
    return pathlib.Path(data_dir) / dataset / "raw"


def convert(config: RecordsConfig, folder: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """Makes the raw folder, unless it is there already.

    Returns:
        The report, and whether the folder was made now.

    Raises:
        ValueError: bad records, or a folder that was made from others.
    """
    source = _open(config)
    inputs = _inputs(config, source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two processes of one host, one after the other.
    with locks.locked(folder.with_name(f".{folder.name}.lock"), str(folder), wait=True):
        if folder.exists() and not config.overwrite:
            _check_same(folder, inputs, source)
            return json_files.read(folder / "report.json"), False
        with atomic.replaced_folder(folder) as partial:
            report = _write(partial, config, source, inputs)
    return report, True


def describe(config: RecordsConfig) -> str:
    """A line on each file: what is taken of it, and what is not.

    Raises:
        ValueError: files that are missing, or lack columns.
    """
    lines, source = [], _open(config)
    for role, files in source.opened.items():
        for one in files:
            taken = ", ".join(
                field if field == column else f"{field}={column}"
                for field, column in one.columns.items()
            )
            if one.label_columns:
                taken += f", labels in {counted(len(one.label_columns), 'column')}"
            used = {*one.columns.values(), *one.label_columns}
            rest = [column for column in one.table.columns if column and column not in used]
            ignored = f"; not read: {', '.join(rest)[:200]}" if rest else ""
            dialect = f" ({one.table.dialect})" if one.table.dialect else ""
            lines.append(f"{role:10}  {one.table.path}{dialect}: {taken}{ignored}")
    lines += [f"{'test':10}  {table.path}: not read, has no labels" for table in source.unlabelled]
    return "\n".join(lines)


def check(config: RecordsConfig, keep: Keep | None = None) -> tuple[dict[str, Any], Scan]:
    """Reads all records and writes nothing.

    Args:
        keep: is given every item; None if nobody wants them.

    Returns:
        The report, and the records' facts. Their `refusal` says why `convert` would refuse them.

    Raises:
        ValueError: bad records.
    """
    source = _open(config)
    scan = _scan(config, source, keep or (lambda *item: None))
    return _report(config, source, scan), scan


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of records."""

    opened: Mapping[str, Sequence[Opened]]  # each of `_ROLES` -> tables, with the columns to read
    unlabelled: Sequence[Table]  # test files for predictions, not for evaluation


def _open(config: RecordsConfig) -> _Files:
    records, options = config.records, config.options
    if records.is_dir():
        paths = {role: table_files.find(records, role) for role in _ROLES}
        if not paths["train"]:
            suffixes = ", ".join(table_files.SUFFIXES)
            raise ValueError(f"{records}: expected a file train.*, one of {suffixes}, found none")
    elif records.is_file():
        paths = {role: [] for role in _ROLES} | {"train": [records]}
    else:
        raise ValueError(f"{records}: expected a folder of records or a file, found none")
    if options.labels is not None:
        paths["label"] = [pathlib.Path(options.labels)]
    if not paths["label"] and options.unknown_labels != "add":
        beside = table_files.find(records.parent, "label") if records.is_file() else []
        raise ValueError(
            f"{records}: expected labels, a file label.* or labels.* in the folder or another one "
            f"named by --labels{''.join(f' (such as --labels={path})' for path in beside)}, found "
            "none; --unknown_labels=add makes labels of the documents' ids"
        )
    delimiter = table_files.delimiter(options.delimiter)
    opened: dict[str, list[Opened]] = {}
    for role in _ROLES:
        fields = _LABEL_FIELDS if role == "label" else tuple(named_columns.FIELDS)
        needed = {"label": (), "test": ("text",)}.get(role, ("text", "labels"))
        opened[role] = []
        for path in paths[role]:
            table = table_files.open_table(path, delimiter)
            one = named_columns.open_fields(
                table, fields, config.named, needed, config.form, options.allow_paths
            )
            if role == "label" and not {"text", "id"} & one.columns.keys():
                raise named_columns.missing(table, "text", named_columns.FIELDS["text"])
            opened[role].append(one)
    unlabelled = [
        one.table for one in opened["test"] if "labels" not in one.columns and not one.label_columns
    ]
    if len(unlabelled) == len(opened["test"]):
        opened["test"] = []
    elif unlabelled:
        raise named_columns.missing(unlabelled[0], "labels", named_columns.FIELDS["labels"])
    _check_columns(config, opened)
    return _Files(opened, unlabelled)


def _check_columns(config: RecordsConfig, opened: Mapping[str, Sequence[Opened]]) -> None:
    """Raises ValueError if a named column is no file's, or some training files lack `split`."""
    tables = [one for files in opened.values() for one in files]
    used = {column for one in tables for column in one.columns.items()}
    for field, names in config.named.items():
        for name in names:
            if name and (field, name) not in used:
                raise named_columns.missing(tables[0].table, field, [name])
    paths = {"split" in one.columns: one.table.path for one in opened["train"]}
    if len(paths) == 2:
        raise ValueError(
            f"{paths[False]}: expected a column split, as in {paths[True].name}, found none"
        )


def _inputs(config: RecordsConfig, source: _Files) -> dict[str, Any]:
    """All that the folder's contents follow from."""
    options = dataclasses.asdict(config.options)
    for field in ("labels", "allow_paths"):
        del options[field]
    digests = {
        role: [{"name": one.table.path.name, "sha256": sha256(one.table.path)} for one in files]
        for role, files in source.opened.items()
    }
    return {"format": FORMAT, **digests, **options}


def _scan(config: RecordsConfig, source: _Files, keep: Keep) -> Scan:
    o = config.options
    return record_scan.read(
        source.opened, o.separator, o.unknown_labels, o.test_fraction, o.split_seed, keep
    )


def _report(config: RecordsConfig, source: _Files, scan: Scan) -> dict[str, Any]:
    unlabelled = [table.path.name for table in source.unlabelled]
    return data_report.make(scan, config.options.unknown_labels, unlabelled)


def _write(
    partial: pathlib.Path, config: RecordsConfig, source: _Files, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills the folder; returns the report."""
    # The split is known only when all documents are read: until then their lines wait in a file.
    waiting = {kind: partial / f".{kind}" for kind in ("document", "label")}
    with contextlib.ExitStack() as stack:
        files = {kind: stack.enter_context(path.open("wb")) for kind, path in waiting.items()}

        def keep(kind: str, item: dict[str, Any], images: list[str]) -> None:
            listed = json.dumps(images) if images else ""
            files[kind].write(f"{item['uid']}\t{encode(item)}\t{listed}\n".encode())

        scan = _scan(config, source, keep)
    if scan.refusal is not None:
        raise ValueError(scan.refusal)
    documents, images, out = scan.documents, _Images(partial, source.opened, scan), scan.filtered
    changed = set(documents.owners[out].tolist())
    counts = np.asarray(documents.counts)
    ends = np.cumsum(counts, dtype=np.int64)
    grouped = documents.grouped or len(np.unique(scan.groups)) < len(documents)
    test, validation = scan.of("test"), scan.of("validation")
    with contextlib.ExitStack() as stack:

        def opened(name: str) -> Any:
            return stack.enter_context((partial / name).open("wb"))

        files = {split: opened(f"{name}.json") for split, name in _NAMES.items()}
        images.open(stack)
        groups = opened("groups.tsv") if grouped else None
        named = opened("validation.txt") if validation.any() else None
        for uid, line, listed in _waiting(waiting["label"]):
            files["label"].write(line + b"\n")
            images.write("label", uid, listed)
        for number, (uid, line, listed) in enumerate(_waiting(waiting["document"])):
            if number in changed:
                line = _without(line, out[ends[number] - counts[number] : ends[number]])
            split = "test" if test[number] else "train"
            files[split].write(line + b"\n")
            images.write(split, uid, listed)
            if groups:
                groups.write(b"%s\t%d\n" % (uid, scan.groups[number]))
            if validation[number]:
                named.write(uid + b"\n")
    for path in waiting.values():
        path.unlink()
    for split, chosen in (("train", ~test), ("test", test)):
        pairs = documents.filter[chosen[documents.filter[:, 0]]]
        row_of = np.cumsum(chosen) - 1
        text = "".join(f"{row_of[number]} {label}\n" for number, label in pairs.tolist())
        (partial / f"filter_labels_{split}.txt").write_text(text, encoding="ascii")
    report = _report(config, source, scan)
    _write_json(partial / "report.json", report)
    drawn = {} if scan.drawn else {"test_fraction": None, "split_seed": None}
    written = {"images_from": images.folders, "files": manifests.files(partial)}
    _write_json(partial / "records.json", {**inputs, **drawn, **written})
    return report


class _Images:
    """Tables of images as `images` reads them: a row for each, all splits or none.

    `folders` says where the paths of a split's images begin, None where it has no paths.
    """

    def __init__(self, partial: pathlib.Path, opened: Mapping[str, Sequence[Opened]], scan: Scan):
        kinds = scan.documents.kinds | scan.labels.kinds
        roles = {role: role for role in _NAMES} | ({} if opened["test"] else {"test": "train"})
        self._kinds = {split: kinds.get(role) for split, role in roles.items()}
        self.folders = {
            split: _folder_of(opened[role]) if self._kinds[split] == "path" else None
            for split, role in roles.items()
        }
        self._partial = partial
        self._writers: dict[str, Any] = {}

    def open(self, stack: contextlib.ExitStack) -> None:
        """Opens the tables and writes their headers."""
        for split, kind in self._kinds.items() if any(self._kinds.values()) else ():
            path = self._partial / f"{_NAMES[split]}.images.csv"
            file = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
            self._writers[split] = csv.writer(file, lineterminator="\n")
            self._writers[split].writerow(["uid", kind or "path"])

    def write(self, split: str, uid: bytes, listed: bytes) -> None:
        """Writes the rows of an item."""
        for image in json.loads(listed) if listed else ():
            folder = self.folders[split]
            self._writers[split].writerow(
                [uid.decode(), image if folder is None else os.path.join(folder, image)]
            )


def _folder_of(files: Sequence[Opened]) -> str:
    return str(files[0].table.path.parent.absolute())


def _waiting(path: pathlib.Path) -> Iterator[list[bytes]]:
    with path.open("rb") as file:
        for line in file:
            yield line[:-1].split(b"\t")


def _without(line: bytes, out: np.ndarray) -> bytes:
    """A document's line without some of its labels."""
    document = json.loads(line)
    for field in ("target_ind", "target_rel"):
        if field in document:
            document[field] = [one for one, gone in zip(document[field], out) if not gone]
    return encode(document).encode()


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _check_same(folder: pathlib.Path, inputs: Mapping[str, Any], source: _Files) -> None:
    """Raises ValueError if the folder is not whole, or was made from other records."""
    remedy = (
        "choose another --dataset or --out (--config.data.dataset, --config.data.data_dir), or "
        "make it anew with python -m xmc_jax.data.prepare --records --overwrite"
    )
    try:
        recorded = _BEFORE | json_files.read(folder / "records.json")
        files, begun = dict(recorded["files"]), dict(recorded["images_from"])
        whole = all((folder / f).stat().st_size == size["bytes"] for f, size in files.items())
        whole &= sha256(folder / "report.json") == files["report.json"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):  # said below
        whole = False
    if not whole:
        raise ValueError(
            f"{folder}: expected to be free, or whole and made of records, found something else; "
            f"{remedy}"
        )
    opened = source.opened
    # The fields of a drawn split count where one was drawn, folders of images where there are any.
    now = {name: value for name, value in inputs.items() if recorded.get(name) is not None}
    if recorded.get("format") in range(1, FORMAT):
        del now["format"]
    now["images_from"] = {
        split: folder_of and _folder_of(opened[split] or opened["train"])
        for split, folder_of in begun.items()
    }
    then = {name: recorded.get(name) for name in now}
    differ = manifests.difference(_with_names(then), _with_names(now))
    if differ:
        raise ValueError(f"{folder}: made from other records ({'; '.join(differ)}); {remedy}")


def _with_names(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the digest of each file by its name."""
    files = {
        role: {file["name"]: file["sha256"] for file in inputs[role]}
        for role in _ROLES
        if role in inputs
    }
    return dict(inputs) | files
