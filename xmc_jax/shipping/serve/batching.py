"""Requests that come together are ranked together.

One thread owns the predictor. While it ranks a batch, requests wait; then it takes those that wait,
at most `max_batch` queries, and ranks them in one call: under load batches fill by themselves. If
there were several requests, it first waits a moment for those who have just got their answers and
may ask again, since fewer and larger batches cost less. A lone request never waits for company.
"""

import asyncio
import collections
import dataclasses
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from xmc_jax.config import ServeConfig
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping.predictor import Predictor, Query
from xmc_jax.shipping.serve.model import NEIGHBOURS, ServedModel

_WAITED = 0.25  # of the time that a batch took, at most, for a fuller one

_EVERY = 5.0  # seconds between lines on how far warming up is


class Full(Exception):
    """The queue is full; the client may try again later."""


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """Answer to a request of n queries.

    Attributes:
        scores: f32[n, k], descending; -inf where there are no more.
        rows: i32[n, k] of its labels or documents; -1 where there are no more.
        cut: bool[n], whether a text has more tokens than the model takes.
    """

    model: ServedModel
    scores: np.ndarray
    rows: np.ndarray
    cut: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    queries: Sequence[Query]
    kind: str
    answer: asyncio.Future

    @property
    def weight(self) -> int:
        return sum(1 + len(query.images) for query in self.queries)


class Batcher:
    """Answers requests of one event loop; to be closed.

    Args:
        model: the model, warmed up for `config`, see `warm_up`.
        observe: told of each batch: its queries, and seconds it took; by another thread.
    """

    def __init__(
        self,
        model: ServedModel,
        config: ServeConfig,
        observe: Callable[[int, float], None] = lambda queries, seconds: None,
    ):
        self._model, self._config, self._observe = model, config, observe
        self._loop = asyncio.get_running_loop()
        self._waiting: collections.deque[_Request] = collections.deque()
        self._weight = self._queries = 0
        self._company = 1  # requests that a batch waits for
        self._since: float | None = None  # when what is ranked or waits was begun, or came
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="ranks", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ServedModel:
        """The model that ranks the next batch."""
        return self._model

    def replace(self, model: ServedModel) -> None:
        """Has another model rank from the next batch on."""
        self._model = model

    @property
    def waiting(self) -> int:
        """Queries that wait."""
        return self._queries

    async def answer(self, queries: Sequence[Query], kind: str) -> Results:
        """Ranks the queries of a request; a cancelled one is not ranked.

        Raises:
            Full: too many wait.
            ValueError: in one line, what is wrong with a query.
        """
        request = _Request(queries, kind, self._loop.create_future())
        with self._changed:
            if self._closing or self._weight + request.weight > self._config.queue:
                raise Full
            if self._since is None:
                self._since = time.monotonic()
            self._waiting.append(request)
            self._weight += request.weight
            self._queries += len(queries)
            if len(self._waiting) == 1 or self._is_enough():
                self._changed.notify()
        return await request.answer

    def stalled(self) -> float:
        """Seconds for which the thread has not finished a batch, although there are queries."""
        if not (self._thread.is_alive() or self._closing):
            return math.inf
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def position(self) -> str:
        """Where the thread stands, in one line: innermost call first."""
        frame = sys._current_frames().get(self._thread.ident)
        calls = [] if frame is None else traceback.extract_stack(frame)
        return " < ".join(f"{x.name} ({x.filename}:{x.lineno})" for x in reversed(calls))

    async def close(self, seconds: float | None = None) -> bool:
        """Answers what waits, and ends.

        Args:
            seconds: to wait for it, at most.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        company, seconds = 1, 0.0
        while batch := self._gather(company, seconds):
            self._since = time.monotonic()
            requests = len(batch)
            batch = [request for request in batch if not request.answer.done()]
            if not batch:
                continue
            started = time.monotonic()
            answers = self._answers(batch)
            seconds = time.monotonic() - started
            company = requests + len(self._waiting)
            self._observe(sum(len(request.queries) for request in batch), seconds)
            self._loop.call_soon_threadsafe(_deliver, batch, answers)

    def _gather(self, company: int, seconds: float) -> list[_Request]:
        """Waits for the next batch of requests; [] at the end."""
        wait = min(self._config.max_wait_ms / 1000, seconds * _WAITED)
        with self._changed:
            self._company = company
            self._since = time.monotonic() if self._waiting else None
            while not self._waiting and not self._closing:
                self._changed.wait()
            end = time.monotonic() + wait
            while not (self._is_enough() or self._closing):
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch, count, limit = [], 0, self._config.max_batch
            while self._waiting and (not batch or count + len(self._waiting[0].queries) <= limit):
                request = self._waiting.popleft()
                batch.append(request)
                count += len(request.queries)
                self._queries -= len(request.queries)
                self._weight -= request.weight
            return batch

    def _is_enough(self) -> bool:
        return len(self._waiting) >= self._company or self._queries >= self._config.max_batch

    def _answers(self, batch: list[_Request]) -> list[Results | Exception]:
        """All together, or where that fails one by one, so that a request fails alone."""
        try:
            return ranked(self._model, batch, self._config)
        except Exception as error:
            if len(batch) > 1:
                return [self._answers([request])[0] for request in batch]
            if not isinstance(error, ValueError):
                logging.exception("a request failed")
            return [error]


def warm_up(predictor: Predictor, config: ServeConfig) -> None:
    """Compiles all that `Batcher` may need, so that no request waits for it; logs its progress."""
    started = logged = time.monotonic()

    def progress(ready: int, total: int) -> None:
        nonlocal logged
        now = time.monotonic()
        if ready == total:
            logging.info("warmed up: %s in %.0f s", counted(total, "program"), now - started)
        elif now - logged >= _EVERY:
            logged = now
            logging.info("warming up: %d of %s", ready, counted(total, "program"))

    predictor.warm_up(config.max_k, config.rows, config.max_exclude, config.max_k, progress)


def ranked(
    model: ServedModel, requests: Sequence[_Request], config: ServeConfig
) -> list[Results | Exception]:
    """Answers of requests, encoded in one call, and ranked in one for each kind.

    Raises:
        ValueError: something is wrong with a query of one of them.
    """
    queries = [query for request in requests for query in request.queries]
    of = np.repeat(np.arange(len(requests)), [len(request.queries) for request in requests])
    predictor = model.predictor
    embedded, cut = predictor.embed_measured(queries, config.rows)
    answers: dict[int, Results] = {}
    for kind in dict.fromkeys(request.kind for request in requests):
        chosen = [i for i, request in enumerate(requests) if request.kind == kind]
        places = np.flatnonzero(np.isin(of, chosen))
        # As many as any request may ask for, which is compiled; the best of them are answered.
        if kind == NEIGHBOURS:
            ranked = predictor.neighbours_embedded(embedded[places], config.max_k, config.rows)
        else:
            of_kind = [queries[place] for place in places]
            ranked = predictor.rank_embedded(
                embedded[places], of_kind, config.max_k, kind, config.rows
            )
        ends = np.cumsum([len(requests[i].queries) for i in chosen])[:-1]
        for i, *parts in zip(chosen, *(np.split(x, ends) for x in (*ranked, cut[places]))):
            answers[i] = Results(model, *parts)
    return [answers[i] for i in range(len(requests))]


def _deliver(batch: list[_Request], answers: list[Results | Exception]) -> None:
    for request, answer in zip(batch, answers):
        if request.answer.done():  # who asked has gone
            continue
        if isinstance(answer, Exception):
            request.answer.set_exception(answer)
        else:
            request.answer.set_result(answer)
