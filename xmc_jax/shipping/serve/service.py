"""The life of the served model: warm-up, answers, replacement, end."""

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fastapi
import numpy as np
from absl import logging

from xmc_jax.config import ServeConfig
from xmc_jax.shipping import documents
from xmc_jax.shipping.predictor import Predictor, Query
from xmc_jax.shipping.serve import bodies
from xmc_jax.shipping.serve.batching import Batcher, Full, Results, warm_up
from xmc_jax.shipping.serve.bodies import Refused
from xmc_jax.shipping.serve.model import ServedModel
from xmc_jax.shipping.serve.telemetry import Metrics

STARTING, READY, ENDING = "starting", "ready", "ending"

_URL = re.compile(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*:")
_ITEM = re.compile(r"^queries: item (\d+)")
Answer = TypeVar("Answer")


class Service:
    """Serves a model, which may be replaced, in one event loop."""

    def __init__(self, config: ServeConfig):
        self.config, self.state = config, STARTING
        self.metrics = Metrics()
        self._batcher: Batcher | None = None
        self.metrics.gauge(
            "xmc_queue_queries",
            "Queries that wait.",
            lambda: 0 if self._batcher is None else self._batcher.waiting,
        )
        self.metrics.gauge(
            "xmc_stalled_seconds", "Since a batch was finished while queries wait.", self._stalled
        )
        self._told = False  # that it is stuck
        self._pool = ThreadPoolExecutor(os.cpu_count(), "images")

    async def serve(self, predictor: Predictor) -> None:
        """Answers by a predictor from now on, once it is warmed up; until then by the one before.

        Raises:
            ValueError: it cannot be used; the one before goes on.
        """
        model = await in_thread(self._warmed_up, predictor)
        if self._batcher is None:
            self._batcher = Batcher(model, self.config, self.metrics.batch)
            self.state = READY
        self._batcher.replace(model)

    def _stalled(self) -> float:
        return 0.0 if self._batcher is None else self._batcher.stalled()

    def check_not_stuck(self) -> None:
        """Raises Refused while the ranking thread is stuck; logs once where it stands."""
        seconds = self._stalled()
        if seconds <= self.config.stuck_after:
            self._told = False
            return
        error = f"the ranking thread has not finished a batch for {seconds:.0f} seconds"
        if not self._told:
            self._told = True
            logging.error("%s; it stands at %s", error, self._batcher.position() or "its end")
        raise bodies.busy(f"server: stuck: {error}")

    def _warmed_up(self, predictor: Predictor) -> ServedModel:
        warm_up(predictor, self.config)
        reason = None
        if predictor.artifact.model.images is None:
            reason = "the model was trained without"
        else:
            try:
                predictor.warm_up_pictures()
            except ValueError as error:  # its line may name folders of this machine
                logging.warning("%s", error)
                reason = "the image encoder cannot be had here; the server's log says why"
        return ServedModel(predictor, reason)

    def model(self) -> ServedModel:
        """The served model, also while the server ends.

        Raises:
            Refused: not yet.
        """
        if self._batcher is None:
            raise bodies.busy(f"server: {self.state}; try again")
        return self._batcher.model

    async def answer(
        self, request: fastapi.Request, queries: Sequence[Query], kind: str
    ) -> Results | None:
        """The results of the queries of a request; None if the client has gone.

        Raises:
            Refused: too many wait, or too long; or what is wrong with a query.
        """
        self.check_not_stuck()
        try:
            return await _unless_gone(
                request, self._batcher.answer(queries, kind), self.config.timeout
            )
        except Full:
            raise bodies.busy("server: too many queries wait; try again") from None
        except TimeoutError:
            raise bodies.busy(
                f"server: not answered within {self.config.timeout} seconds; try again"
            ) from None
        except ValueError as error:
            folder = self._batcher.model.artifact.folder
            line = f"queries: {error}".replace(f"{folder}", "model")
            raise Refused(422, _ITEM.sub(r"queries[\1]", line)) from None

    async def prepare(
        self, model: ServedModel, where: str, images: Sequence[str]
    ) -> list[np.ndarray]:
        """Images of a query, decoded and made small.

        Raises:
            Refused: in one line, what is wrong with one.
        """
        if images and model.no_images is not None:
            raise Refused(422, f"{where}: expected none, got {len(images)}; {model.no_images}")
        if len(images) > model.images_per_query:
            raise Refused(
                422, f"{where}: expected at most {model.images_per_query}, got {len(images)}"
            )
        loop = asyncio.get_running_loop()
        prepared = []
        for number, image in enumerate(images):
            try:
                prepared.append(
                    await loop.run_in_executor(self._pool, self._prepare, model.predictor, image)
                )
            except ValueError as error:
                raise Refused(422, f"{where}[{number}]: {error}") from None
        return prepared

    def _prepare(self, predictor: Predictor, image: str) -> np.ndarray:
        from xmc_jax.images.decoding import DecodeLimits

        limits = DecodeLimits(self.config.max_image_bytes, self.config.max_image_pixels)
        return predictor.prepare(_bytes(image), limits)

    async def close(self, seconds: float | None = None) -> bool:
        """Answers what waits, and ends.

        Args:
            seconds: to wait for the ranking thread, at most.

        Returns:
            Whether that thread has ended.
        """
        self.state = ENDING
        ended = self._batcher is None or await self._batcher.close(seconds)
        self._pool.shutdown(wait=ended, cancel_futures=True)
        return ended


async def in_thread(function: Callable[..., Answer], *arguments: Any) -> Answer:
    """The result of a slow function; the process may end before the function does."""
    loop = asyncio.get_running_loop()
    returned = loop.create_future()

    def settle(set_one: Callable[[Any], None], value: Any) -> None:
        if not returned.done():
            set_one(value)

    def call() -> None:
        try:
            value = function(*arguments)
        except Exception as error:
            outcome = returned.set_exception, error
        else:
            outcome = returned.set_result, value
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=call, name=function.__name__, daemon=True).start()
    return await returned


async def _unless_gone(
    request: fastapi.Request, awaited: Awaitable[Answer], seconds: float
) -> Answer | None:
    """The awaited result; None if the client goes first."""
    gone = asyncio.ensure_future(request.receive())
    task = asyncio.ensure_future(awaited)
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        if gone.done():
            return None
        raise TimeoutError
    finally:
        gone.cancel()
        task.cancel()


def _bytes(image: str) -> bytes:
    """An image file from base64 or a data: URL."""
    if start := documents.DATA_URL.match(image):
        return documents.decoded(image[start.end() :])
    if _URL.match(image):
        raise ValueError(
            f"expected an image file in base64 or as a data: URL, got {image[:40]!r}; nothing is "
            "fetched"
        )
    return documents.decoded(image)
