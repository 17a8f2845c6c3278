"""Ranked labels to a file that is there only when it is whole, and that a killed run goes on with.

While `out.jsonl` is made, `out.jsonl.partial`, `out.jsonl.progress.json` and `out.jsonl.lock` lie
beside it. The progress is written when what it counts is on the disk, and the file gets its name
when the progress says that it is whole. The progress stays: it says what the file was made of.
What is written does not depend on where runs were killed.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np

from xmc_jax.files import atomic, locks
from xmc_jax.shipping.artifact import Labels
from xmc_jax.shipping.predictor import Ranking

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Of the files that can be written; capitals do not count."""
STDOUT = "-"

_FORMAT = 1
_SECONDS = 1.0  # between two commits of lines
_PART_SECONDS = 30.0  # likewise of Parquet, each of which is a file
_GROUP = 16_384  # documents of a row group
_KEPT = 65_536  # labels whose JSON is kept
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclasses.dataclass(frozen=True)
class OutputProgress:
    """What is on the disk.

    Attributes:
        documents: how many.
        errors: of those, without labels since something was wrong.
        cut: of those, with a text that has more tokens than the model takes.
        digest: of the pipe's lines that they were made of; None of files.
        written: what the sink goes on with.
    """

    documents: int = 0
    errors: int = 0
    cut: int = 0
    digest: str | None = None
    written: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Output:
    """An output that is being made, or is there.

    Attributes:
        path: the output.
        complete: whether it is there already, made of the same.
    """

    def __init__(
        self, path: pathlib.Path, made_of: Mapping[str, Any], done: OutputProgress, complete: bool
    ):
        self.path, self.done, self.complete = path, done, complete
        self._made_of = made_of

    @property
    def partial(self) -> pathlib.Path:
        """The file, or of Parquet the folder, that holds what is there so far."""
        return _beside(self.path, "partial")

    def commit(self, done: OutputProgress, size: int | None = None) -> None:
        """Records what is on the disk; with the size of the whole file, that it is whole."""
        content = {
            "format": _FORMAT,
            "complete": size is not None,
            "bytes": size,
            "made_of": self._made_of,
            **dataclasses.asdict(done),
        }
        atomic.write(_beside(self.path, "progress.json"), json.dumps(content, indent=1) + "\n")
        self.done = done

    def finish(self, whole: pathlib.Path, done: OutputProgress) -> None:
        """Gives the whole file, which is on the disk, its name."""
        self.commit(done, whole.stat().st_size)
        self._name(whole)
        self.complete = True

    def _name(self, whole: pathlib.Path) -> None:
        atomic.move_file(whole, self.path)
        shutil.rmtree(self.partial, ignore_errors=True)


@contextlib.contextmanager
def begin(
    path: pathlib.Path, made_of: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Output]:
    """Begins an output or goes on with it; no other process does meanwhile.

    Args:
        path: the output.
        made_of: JSON of all that it follows from.
        overwrite: replace what is there, which else is only gone on with if it is of the same.

    Raises:
        ValueError: another process is at it, or something else is there.
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
            output.commit(OutputProgress())  # before there is anything that it would have to count
        yield output


def _resumed(path: pathlib.Path, made_of: Mapping[str, Any], overwrite: bool) -> Output | None:
    """What is there to go on with, or is complete; None for nothing."""
    progress = _beside(path, "progress.json")
    recorded = _read(progress)
    same = recorded is not None and recorded["made_of"] == made_of
    if not same:
        nothing = recorded is not None and not recorded["documents"] and not path.exists()
        if overwrite or nothing:
            return None
        if recorded is not None:
            then = recorded["made_of"]
            name = next(n for n in (*made_of, *then) if then.get(n) != made_of.get(n))
            raise ValueError(
                f"{progress}: expected {name} {json.dumps(made_of.get(name))}, found "
                f"{json.dumps(then.get(name)):.100}: {path.name} is of another run; choose another "
                "--output, or replace it with --overwrite"
            )
        for there in (path, _beside(path, "partial")):
            if there.exists():
                raise ValueError(
                    f"{there}: expected nothing, or what a run of this command left, found "
                    "another file; choose another --output, or replace it with --overwrite"
                )
        return None
    fields = {field.name for field in dataclasses.fields(OutputProgress)}
    done = OutputProgress(**{name: value for name, value in recorded.items() if name in fields})
    output = Output(path, made_of, done, complete=recorded["complete"])
    if not output.complete:
        if path.exists() and not overwrite:
            raise ValueError(
                f"{path}: expected nothing, since it is only half made ({done.documents:,} "
                "documents), found a file; go on and replace it with --overwrite"
            )
        return output
    whole = _whole(output.partial)
    if whole.is_file():  # killed before it had its name
        output._name(whole)
    elif not path.exists() or overwrite:
        return None
    if path.stat().st_size != recorded["bytes"]:
        raise ValueError(
            f"{path}: expected {recorded['bytes']} bytes, as {progress.name} says, found "
            f"{path.stat().st_size}; make it anew with --overwrite"
        )
    shutil.rmtree(output.partial, ignore_errors=True)
    return output


def _read(progress: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(progress.read_bytes())
        kinds = (("complete", bool), ("made_of", dict), ("documents", int), ("written", dict))
        if content["format"] != _FORMAT or any(type(content[n]) is not t for n, t in kinds):
            raise ValueError("another format")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{progress}: expected the progress of a run, found something else ({error!r:.60}); "
            "remove it, and begin anew with --overwrite"
        ) from error
    return content


def _beside(path: pathlib.Path, name: str) -> pathlib.Path:
    return path.with_name(f"{path.name}.{name}")


def _whole(partial: pathlib.Path) -> pathlib.Path:
    """The file that gets the output's name."""
    return partial / "whole" if ".parquet." in partial.name.lower() else partial


# Formats


class Sink(Protocol):
    """What takes ranked labels, in order."""

    def add(self, ids: Sequence[str], ranking: Ranking, problems: Mapping[int, str]) -> None:
        """Takes n documents more.

        Args:
            ids: theirs.
            ranking: of the n documents.
            problems: number -> why a document has none.
        """

    def due(self) -> bool:
        """Whether it is time to `sync`."""

    def sync(self) -> dict[str, int]:
        """Has all of it on the disk; returns what a later run goes on with."""

    def finish(self) -> pathlib.Path:
        """Has all of it on the disk, as the file that is returned."""


def sink(output: Output, labels: Labels) -> Sink:
    """What writes an output.

    Args:
        labels: what rows are of.

    Raises:
        ValueError: what was written before is not there, or pyarrow is missing.
    """
    kind = ParquetSink if output.path.suffix.lower() == ".parquet" else LineSink
    return kind(output.partial, labels, output.done.written)


class Lines:
    """Ranked labels as lines of JSON.

    Args:
        labels: what rows are of.
    """

    def __init__(self, labels: Labels):
        self._labels = labels
        self._begin = functools.lru_cache(_KEPT)(self._begun)

    def __call__(self, ids: Sequence[str], ranking: Ranking, problems: Mapping[int, str]) -> bytes:
        """Lines of n documents, with `"cut": true` where a text was cut; see `Sink.add`."""
        lines = []
        # As few digits as tell a float32 from others.
        digits = ranking.scores.astype("U16").tolist()
        cut = ranking.cut.tolist()
        for number, (uid, found) in enumerate(zip(ids, ranking.rows.tolist())):
            if number in problems:
                lines.append(_encode({"id": uid, "error": problems[number]}))
                continue
            listed = ", ".join(
                [
                    f"{self._begin(row)}{score}}}"
                    for row, score in zip(found, digits[number])
                    if row >= 0
                ]
            )
            note = ', "cut": true' if cut[number] else ""
            lines.append(f'{{"id": {_encode(uid)}{note}, "labels": [{listed}]}}')
        return "".join(f"{line}\n" for line in lines).encode()

    def _begun(self, row: int) -> str:
        label = {"id": self._labels.ids[row], "text": self._labels.texts[row]}
        return f'{_encode(label)[:-1]}, "score": '


class PipeSink:
    """Lines to a pipe, at once; nothing to go on with.

    Args:
        file: where to.
        labels: what rows are of.
    """

    def __init__(self, file: BinaryIO, labels: Labels):
        self._file, self._lines = file, Lines(labels)

    def add(self, ids, ranking, problems) -> None:
        """See `Sink`."""
        self._file.write(self._lines(ids, ranking, problems))
        self._file.flush()

    def due(self) -> bool:
        """See `Sink`."""
        return False


class LineSink:
    """Lines in a file, of which a later run keeps as many bytes as were counted.

    Args:
        partial: the file.
        labels: what rows are of.
        written: what `sync` gave; empty for none.
    """

    def __init__(self, partial: pathlib.Path, labels: Labels, written: Mapping[str, int]):
        self._lines, self._path = Lines(labels), partial
        size = written.get("bytes", 0)
        found = partial.stat().st_size if partial.is_file() else 0
        if found < size:
            raise ValueError(
                f"{partial}: expected at least {size} bytes, found {found}; begin anew with "
                "--overwrite"
            )
        self._file = partial.open("ab")
        self._file.truncate(size)
        self._synced = time.monotonic()

    def add(self, ids, ranking, problems) -> None:
        """See `Sink`."""
        with atomic.naming(self._path):
            self._file.write(self._lines(ids, ranking, problems))

    def due(self) -> bool:
        """See `Sink`."""
        return time.monotonic() - self._synced >= _SECONDS

    def sync(self) -> dict[str, int]:
        """See `Sink`."""
        with atomic.naming(self._path):
            atomic.to_disk(self._file)
        self._synced = time.monotonic()
        return {"bytes": self._file.tell()}

    def finish(self) -> pathlib.Path:
        """See `Sink`."""
        atomic.to_disk(self._file)
        self._file.close()
        return self._path


class ParquetSink:
    """Parquet files of some documents each, in a folder; in the end one with even row groups.

    Columns are `id`, `cut` (whether the text has more tokens than the model takes), `labels` (a
    list of structs of `id`, `text` and `score`, null where there is an error) and `error`.

    Args:
        partial: the folder.
        labels: what rows are of.
        written: what `sync` gave; empty for none.
    """

    def __init__(self, partial: pathlib.Path, labels: Labels, written: Mapping[str, int]):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"{partial}: expected the package pyarrow to write Parquet, found none; pip "
                'install "xmc_jax[vision]", or write .jsonl'
            ) from error
        self._arrow, self._folder, self._labels = pyarrow, partial, labels
        text = pyarrow.string()
        label = pyarrow.struct([("id", text), ("text", text), ("score", pyarrow.float32())])
        self._schema = pyarrow.schema(
            [
                ("id", text),
                ("cut", pyarrow.bool_()),
                ("labels", pyarrow.list_(label)),
                ("error", text),
            ]
        )
        self._parts = written.get("parts", 0)
        self._held: list[tuple[Any, ...]] = []
        self._count = 0
        self._synced = time.monotonic()
        partial.mkdir(exist_ok=True)
        names = [self._part(number).name for number in range(self._parts)]
        for path in partial.iterdir():
            if path.name not in names:  # what no progress counts
                path.unlink()
        for name in names:
            if not (partial / name).is_file():
                raise ValueError(
                    f"{partial / name}: expected a part of the output, found none; begin anew with "
                    "--overwrite"
                )

    def add(self, ids, ranking, problems) -> None:
        """See `Sink`."""
        self._held.append((ids, ranking, problems))
        self._count += len(ids)

    def due(self) -> bool:
        """See `Sink`."""
        late = time.monotonic() - self._synced >= _PART_SECONDS
        return self._count >= _GROUP or (late and self._count > 0)

    def sync(self) -> dict[str, int]:
        """See `Sink`."""
        if self._count:
            table = self._arrow.concat_tables([self._table(*held) for held in self._held])
            with atomic.replaced(self._part(self._parts)) as file:
                self._arrow.parquet.write_table(table, file)
            self._parts += 1
            self._held, self._count = [], 0
        self._synced = time.monotonic()
        return {"parts": self._parts}

    def finish(self) -> pathlib.Path:
        """See `Sink`; row groups are the same whatever the parts are."""
        self.sync()
        arrow, whole = self._arrow, _whole(self._folder)
        with (
            atomic.replaced(whole) as file,
            arrow.parquet.ParquetWriter(file, self._schema) as writer,
        ):
            left = self._schema.empty_table()
            for number in range(self._parts):
                part = arrow.parquet.read_table(self._part(number))
                # A part that an earlier version wrote has no column `cut`.
                left = arrow.concat_tables([left, part], promote_options="default")
                while len(left) >= _GROUP:
                    writer.write_table(left.slice(0, _GROUP).combine_chunks(), _GROUP)
                    left = left.slice(_GROUP)
            if len(left) or not self._parts:
                writer.write_table(left.combine_chunks(), _GROUP)
        return whole

    def _part(self, number: int) -> pathlib.Path:
        return self._folder / f"{number:06d}"

    def _table(self, ids, ranking, problems) -> Any:
        """The documents of one `add` as a table."""
        arrow, (scores, rows, cut) = self._arrow, ranking
        wrong = np.zeros(len(ids), bool)
        wrong[list(problems)] = True
        there = (rows >= 0) & ~wrong[:, None]
        known, places = np.unique(rows[there], return_inverse=True)
        places = arrow.array(places)
        texts = [
            arrow.array([column[row] for row in known.tolist()], arrow.string()).take(places)
            for column in (self._labels.ids, self._labels.texts)
        ]
        fields = list(self._schema.field("labels").type.value_type)
        labels = arrow.StructArray.from_arrays([*texts, arrow.array(scores[there])], fields=fields)
        offsets = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
        listed = arrow.ListArray.from_arrays(
            arrow.array(offsets), labels, self._schema.field("labels").type, mask=arrow.array(wrong)
        )
        errors = arrow.array([problems.get(i) for i in range(len(ids))], arrow.string())
        return arrow.Table.from_arrays(
            [arrow.array(ids, arrow.string()), arrow.array(cut), listed, errors],
            schema=self._schema,
        )
