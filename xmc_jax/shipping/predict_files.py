"""Ranked labels for a file of documents, whatever its size: `--mode=predict`.

A thread reads ahead and one writes behind, while blocks of one size are encoded, so that what is
found for a document depends on nothing else that is in the file.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import tqdm

from xmc_jax.config import PredictConfig
from xmc_jax.retrieval import scann
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping import documents, outputs
from xmc_jax.shipping.artifact import Artifact
from xmc_jax.shipping.documents import Document, DocumentFile
from xmc_jax.shipping.outputs import LineSink, Output, OutputProgress, PipeSink
from xmc_jax.shipping.predictor import Predictor, Ranking
from xmc_jax.shipping.query_encoder import QueryEncoder

T = TypeVar("T")

_ROWS = (64,)  # of every block
_AHEAD = 2  # batches that are read


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a run.

    Attributes:
        progress: of the output, at the end of the run.
        before: documents that the output had before the run.
        complete: whether the output was complete before the run.
    """

    progress: OutputProgress
    before: int
    seconds: float
    complete: bool = False

    def __str__(self) -> str:
        progress = self.progress
        said = [f"{counted(progress.documents, 'document')}"]
        if self.complete:
            return f"is complete: {said[0]}"
        if self.before:
            said.append(f"{progress.documents - self.before:,} of them now")
        if progress.errors:
            said.append(f"{progress.errors:,} with an error in place of labels")
        if progress.cut:
            said.append(f"{progress.cut:,} longer than the model takes, and cut")
        rate = (progress.documents - self.before) / max(self.seconds, 1e-9)
        digits = 1 if rate < 10 else 0
        return f"{', '.join(said)}; {self.seconds:,.1f} s, {rate:,.{digits}f} documents/s"


def predict(
    opened: Artifact, config: PredictConfig, source: str, target: str, overwrite: bool = False
) -> Report:
    """Ranks labels for the documents of a file.

    Args:
        source: a file of documents, or "-" for JSONL from standard input; see `documents`.
        target: .jsonl or .parquet, or "-" for JSONL to standard output, which no run can go on
            with; see `outputs`.
        overwrite: replace a target that was made of others.

    Raises:
        ValueError: bad records, or settings that do not fit; or a target that is there already.
    """
    only, exclude = (documents.ids_of(path) for path in (config.only, config.exclude))
    restricted = only is not None or exclude is not None
    if config.index == "scann" and restricted:
        raise ValueError(
            "predict.index: expected exact with predict.only or predict.exclude, whose labels are "
            "searched exactly, got scann"
        )
    with_index = opened.index is not None and scann.available() and not restricted
    approximate = config.index == "scann" or (config.index == "auto" and with_index)
    index = "scann" if approximate else "exact"

    def load() -> Predictor:
        predictor = Predictor(opened, QueryEncoder(opened), index)
        if not restricted:
            return predictor
        for path, ids in ((config.only, only), (config.exclude, exclude)):
            for name, line in (ids or {}).items():
                try:
                    predictor.row(name)
                except ValueError as error:
                    raise ValueError(f"{path}:{line}: {error}") from None
        kept = set(opened.labels.ids if only is None else only)
        return predictor.restricted(kept.difference(exclude or ()))

    read = DocumentFile(
        source,
        opened.model,
        config.columns,
        delimiter=config.delimiter,
        allow_paths=config.allow_paths,
    )
    if target == outputs.STDOUT:
        return _run(load(), read, config, PipeSink(sys.stdout.buffer, opened.labels), None)
    path = pathlib.Path(target)
    if source != documents.STDIN and path.exists() and path.samefile(source):
        raise ValueError(f"{path}: expected another file than the input, got the same")
    made_of = {
        "artifact": opened.digest,
        "input": read.digest or "standard input",
        "k": config.k,
        "index": index,
        "ranking": config.ranking,
        "only": _digest(only),
        "exclude": _digest(exclude),
        "columns": sorted(config.columns),
        **({"delimiter": config.delimiter} if config.delimiter else {}),
    }
    with outputs.begin(path, made_of, overwrite) as output:
        if output.complete:
            read.check_ends(output.progress.documents, output.progress.digest)
            return Report(output.progress, output.progress.documents, 0.0, complete=True)
        return _run(load(), read, config, LineSink(output, opened.labels), output)


def _run(
    predictor: Predictor,
    source: DocumentFile,
    config: PredictConfig,
    sink: LineSink | PipeSink,
    output: Output | None,
) -> Report:
    before = OutputProgress() if output is None else output.progress
    behind = _Behind(sink, output, before)
    batches = source.batches(config.batch_size, before.documents, before.digest)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        ahead = stack.enter_context(contextlib.closing(_ahead(batches)))
        bar = stack.enter_context(
            tqdm.tqdm(
                desc="predict",
                unit="document",
                total=source.total,
                initial=before.documents,
                disable=None,
            )
        )
        try:
            for batch in ahead:
                ranking, problems = _ranked(predictor, batch, config)
                if problems and config.on_error == "stop":
                    number = min(problems)
                    raise ValueError(
                        f"{batch[number].at}: {problems[number]}; --predict.on_error=skip writes "
                        "that in place of its labels and goes on"
                    )
                behind.write(batch, ranking, problems)
                bar.update(len(batch))
        except (ValueError, KeyboardInterrupt):
            behind.keep()
            raise
        behind.finish()
    return Report(behind.progress, before.documents, time.perf_counter() - start)


def _ranked(
    predictor: Predictor, batch: list[Document], config: PredictConfig
) -> tuple[Ranking, dict[int, str]]:
    """The ranking of a batch, and why some documents have no labels."""
    problems = {i: document.problem for i, document in enumerate(batch) if document.problem}
    whole = [i for i in range(len(batch)) if i not in problems]
    unranked: dict[int, str] = {}
    queries = [batch[i].query for i in whole]
    ranked = predictor.rank(queries, config.k, config.ranking, _ROWS, unranked)
    shape = len(batch), ranked.rows.shape[1]
    ranking = Ranking(
        np.full(shape, -np.inf, np.float32),
        np.full(shape, -1, np.int32),
        np.zeros(len(batch), bool),
    )
    for of_all, of_whole in zip(ranking, ranked):
        of_all[whole] = of_whole
    return ranking, problems | {whole[i]: problem for i, problem in unranked.items()}


class _Behind:
    """Writes a batch in a thread while the next is ranked, and commits the progress."""

    def __init__(self, sink: LineSink | PipeSink, output: Output | None, progress: OutputProgress):
        self._sink, self._output, self.progress = sink, output, progress
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def write(
        self,
        batch: list[Document],
        ranking: Ranking,
        problems: dict[int, str],
    ) -> None:
        """Begins to write a batch, when the one before is written."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, batch, ranking, problems)

    def keep(self) -> None:
        """Has what was written so far on the disk, after an error elsewhere."""
        self._thread.shutdown()
        if self._writing is not None and self._writing.exception() is None:
            self._commit()

    def finish(self) -> None:
        """Has all on the disk, under its name."""
        self._thread.shutdown()
        if self._writing is not None:
            self._writing.result()
        if self._output is not None:
            self._sink.close()
            self._output.finish(self.progress)

    def _write(self, batch, ranking, problems) -> None:
        self._sink.add([document.id for document in batch], ranking, problems)
        self.progress = dataclasses.replace(
            self.progress,
            documents=self.progress.documents + len(batch),
            errors=self.progress.errors + len(problems),
            cut=self.progress.cut + int(ranking.cut.sum()),
            digest=batch[-1].digest,
        )
        if self._sink.due():
            self._commit()

    def _commit(self) -> None:
        if self._output is not None:
            self._output.commit(dataclasses.replace(self.progress, written=self._sink.sync()))


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, of which a thread makes some in advance."""
    made: queue.SimpleQueue = queue.SimpleQueue()
    slots = threading.Semaphore(_AHEAD)
    ended = threading.Event()

    def make() -> None:
        try:
            for item in items:
                slots.acquire()
                if ended.is_set():
                    return
                made.put((item, None))
            made.put((None, StopIteration()))
        except BaseException as error:  # raised where the items are taken
            made.put((None, error))

    # A thread that waits for a pipe does not keep the process.
    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
            slots.release()
    finally:
        ended.set()
        slots.release()


def _digest(ids: Iterable[str] | None) -> str | None:
    return None if ids is None else hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()
