"""Ranked labels to a file that appears when it is whole, and that a killed run goes on with.

While `out.jsonl` is made, `out.jsonl.partial`, `out.jsonl.progress.json` and `out.jsonl.lock` lie
beside it. The partial file holds lines of JSON; those of `out.parquet` are converted at the end.
The progress is written when the lines that it counts are on the disk. It stays, since it says what
the output was made of. The output does not depend on where runs were killed.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from xmc_jax.files import atomic, locks
from xmc_jax.shipping.artifact import Labels
from xmc_jax.shipping.predictor import Ranking

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Of the files that can be written; capitals do not count."""
STDOUT = "-"

_FORMAT = 1
_SECONDS = 1.0  # between two commits
_GROUP = 16_384  # documents of a row group
_KEPT = 65_536  # labels whose JSON is kept
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclasses.dataclass(frozen=True)
class OutputProgress:
    """The part of an output that is on the disk.

    Attributes:
        errors: documents with an error in place of labels.
        cut: documents with a text that has more tokens than the model takes.
        digest: of the pipe's lines that they were made of; None of files.
        written: {"bytes": bytes of the lines}; {} before the first.
    """

    documents: int = 0
    errors: int = 0
    cut: int = 0
    digest: str | None = None
    written: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Output:
    """An output that is being made, or is complete.

    Attributes:
        complete: whether the output is there already, made of the same.
    """

    def __init__(
        self,
        path: pathlib.Path,
        made_of: Mapping[str, Any],
        progress: OutputProgress,
        complete: bool,
    ):
        self.path, self.progress, self.complete = path, progress, complete
        self.partial = _beside(path, "partial")
        self._made_of = made_of
        self._is_parquet = path.suffix.lower() == ".parquet"
        self._whole = _beside(path, "whole") if self._is_parquet else self.partial
        if self._is_parquet:
            _arrow(path)

    def commit(self, progress: OutputProgress, size: int | None = None) -> None:
        """Records the progress; `size`, the bytes of the whole file, marks it as complete."""
        content = {
            "format": _FORMAT,
            "complete": size is not None,
            "bytes": size,
            "made_of": self._made_of,
            **dataclasses.asdict(progress),
        }
        atomic.write(_beside(self.path, "progress.json"), json.dumps(content, indent=1) + "\n")
        self.progress = progress

    def finish(self, progress: OutputProgress) -> None:
        """Gives the output its name, when all its lines are on the disk."""
        if self._is_parquet:
            _convert(self.partial, self._whole)
        self.commit(progress, self._whole.stat().st_size)
        self.name_whole()
        self.complete = True

    def name_whole(self) -> bool:
        """Moves the whole file to its name; False if there is none."""
        there = self._whole.is_file()
        if there:
            atomic.move_file(self._whole, self.path)
        self.partial.unlink(missing_ok=True)
        return there


@contextlib.contextmanager
def begin(
    path: pathlib.Path, made_of: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Output]:
    """Begins an output or goes on with it, and keeps other processes from doing so.

    Args:
        made_of: JSON of all that it follows from.
        overwrite: replace an output that was made of something else.

    Raises:
        ValueError: another process makes the output, or there is another file.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}, or -")
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, found a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    remedy = "wait for it, or choose another --output"
    with locks.locked(_beside(path, "lock"), str(path), remove=True, remedy=remedy):
        output = _resumed(path, made_of, overwrite)
        if output is None:
            output = Output(path, made_of, OutputProgress(), complete=False)
            output.commit(OutputProgress())  # before there are lines that it would have to count
            shutil.rmtree(output.partial, ignore_errors=True)  # the folder of an earlier version
        yield output


def _resumed(path: pathlib.Path, made_of: Mapping[str, Any], overwrite: bool) -> Output | None:
    """An unfinished or complete output; None if there is none."""
    record = _beside(path, "progress.json")
    recorded = _read(record)
    if recorded is None or recorded["made_of"] != made_of:
        _check_nothing_is_lost(path, record, recorded, made_of, overwrite)
        return None
    names = [field.name for field in dataclasses.fields(OutputProgress)]
    progress = OutputProgress(**{name: recorded[name] for name in names if name in recorded})
    output = Output(path, made_of, progress, complete=recorded["complete"])
    if not output.complete:
        if path.exists() and not overwrite:
            raise ValueError(
                f"{path}: expected nothing, since it is only half made ({progress.documents:,} "
                "documents), found a file; go on and replace it with --overwrite"
            )
        return output
    if not output.name_whole() and (not path.exists() or overwrite):
        return None
    if path.stat().st_size != recorded["bytes"]:
        raise ValueError(
            f"{path}: expected {recorded['bytes']} bytes, as {record.name} says, found "
            f"{path.stat().st_size}; make it anew with --overwrite"
        )
    return output


def _check_nothing_is_lost(
    path: pathlib.Path,
    record: pathlib.Path,
    recorded: Mapping[str, Any] | None,
    made_of: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Raises ValueError for files of another origin."""
    if overwrite:
        return
    if recorded is None:
        for file in (path, _beside(path, "partial")):
            if file.exists():
                raise ValueError(
                    f"{file}: expected nothing, or what a run of this command left, found "
                    "another file; choose another --output, or replace it with --overwrite"
                )
    elif recorded["documents"] or path.exists():
        then = recorded["made_of"]
        name = next(n for n in (*made_of, *then) if then.get(n) != made_of.get(n))
        raise ValueError(
            f"{record}: expected {name} {json.dumps(made_of.get(name))}, found "
            f"{json.dumps(then.get(name)):.100}: {path.name} is of another run; choose another "
            "--output, or replace it with --overwrite"
        )


def _read(record: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(record.read_bytes())
        kinds = (("complete", bool), ("made_of", dict), ("documents", int), ("written", dict))
        if content["format"] != _FORMAT or any(type(content[n]) is not t for n, t in kinds):
            raise ValueError("another format")
        if not content["complete"] and content["written"].keys() - {"bytes"}:
            raise ValueError("written by an earlier version")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{record}: expected the progress of a run, found something else ({error!r:.60}); "
            "remove it, and begin anew with --overwrite"
        ) from error
    return content


def _beside(path: pathlib.Path, name: str) -> pathlib.Path:
    return path.with_name(f"{path.name}.{name}")


class Lines:
    """Ranked labels as lines of JSON. `labels` are those that rows are of."""

    def __init__(self, labels: Labels):
        self._labels = labels
        self._label = functools.lru_cache(_KEPT)(self._encode_label)

    def __call__(self, ids: Sequence[str], ranking: Ranking, problems: Mapping[int, str]) -> bytes:
        """The lines of n documents.

        Args:
            problems: number of a document -> why it has no labels.
        """
        lines = []
        digits = ranking.scores.astype("U16").tolist()  # as few as tell a float32 from others
        cut = ranking.cut.tolist()
        for number, (uid, rows) in enumerate(zip(ids, ranking.rows.tolist())):
            if number in problems:
                lines.append(_encode({"id": uid, "error": problems[number]}))
                continue
            labels = ", ".join(
                f"{self._label(row)}{score}}}"
                for row, score in zip(rows, digits[number])
                if row >= 0
            )
            note = ', "cut": true' if cut[number] else ""
            lines.append(f'{{"id": {_encode(uid)}{note}, "labels": [{labels}]}}')
        return "".join(f"{line}\n" for line in lines).encode()

    def _encode_label(self, row: int) -> str:
        label = {"id": self._labels.ids[row], "text": self._labels.texts[row]}
        return f'{_encode(label)[:-1]}, "score": '


class PipeSink:
    """Writes lines to a pipe, at once; no run can go on with them."""

    def __init__(self, file: BinaryIO, labels: Labels):
        self._file, self._lines = file, Lines(labels)

    def add(self, ids: Sequence[str], ranking: Ranking, problems: Mapping[int, str]) -> None:
        """Writes the lines of some documents; see `Lines`."""
        self._file.write(self._lines(ids, ranking, problems))
        self._file.flush()

    def due(self) -> bool:
        """Whether it is time to `sync`."""
        return False


class LineSink:
    """Writes lines to the partial file of an output, of which it keeps those that were counted.

    Raises:
        ValueError: the file lacks lines that were counted.
    """

    def __init__(self, output: Output, labels: Labels):
        self._lines, self._path = Lines(labels), output.partial
        size = output.progress.written.get("bytes", 0)
        there = self._path.stat().st_size if self._path.is_file() else 0
        if there < size:
            raise ValueError(
                f"{self._path}: expected at least {size} bytes, found {there}; begin anew with "
                "--overwrite"
            )
        self._file = self._path.open("ab")
        self._file.truncate(size)
        self._synced = time.monotonic()

    def add(self, ids: Sequence[str], ranking: Ranking, problems: Mapping[int, str]) -> None:
        """Writes the lines of some documents; see `Lines`."""
        with atomic.naming(self._path):
            self._file.write(self._lines(ids, ranking, problems))

    def due(self) -> bool:
        """Whether it is time to `sync`."""
        return time.monotonic() - self._synced >= _SECONDS

    def sync(self) -> dict[str, int]:
        """Brings the lines to the disk; returns `OutputProgress.written`."""
        with atomic.naming(self._path):
            atomic.to_disk(self._file)
        self._synced = time.monotonic()
        return {"bytes": self._file.tell()}

    def close(self) -> None:
        """Brings the lines to the disk and closes the file."""
        self.sync()
        self._file.close()


def _arrow(path: pathlib.Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: expected the package pyarrow to write Parquet, found none; pip install "
            '"xmc_jax[vision]", or write .jsonl'
        ) from error
    return pyarrow


def _convert(lines: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a Parquet file of lines.

    Its columns are `id`, `cut`, `labels` (a list of structs of `id`, `text` and `score`, null where
    there is an error) and `error`.
    """
    arrow = _arrow(target)
    text = arrow.string()
    label = arrow.struct([("id", text), ("text", text), ("score", arrow.float32())])
    fields = [("id", text), ("cut", arrow.bool_()), ("labels", arrow.list_(label)), ("error", text)]
    schema = arrow.schema(fields)
    with (
        lines.open("rb") as source,
        atomic.replaced(target) as file,
        arrow.parquet.ParquetWriter(file, schema) as writer,
    ):
        rows = ({"cut": False} | json.loads(line) for line in source)
        while group := list(itertools.islice(rows, _GROUP)):
            writer.write_table(arrow.Table.from_pylist(group, schema), _GROUP)
