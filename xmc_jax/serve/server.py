"""The process of `--mode=serve`: opens a model, listens, answers, reloads, ends."""

import asyncio
import contextlib
import gc
import os
import pathlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from absl import logging

from xmc_jax import command
from xmc_jax.inference.predictor import Predictor
from xmc_jax.serve import app
from xmc_jax.serve.config import ServeConfig
from xmc_jax.serve.protocol import Protocol
from xmc_jax.serve.service import ENDING, Service, in_thread


def run(folder: pathlib.Path, config: ServeConfig) -> None:
    """Serves an artifact until SIGTERM or SIGINT; SIGHUP opens its folder again.

    Args:
        folder: what `--mode=export` wrote.
        config: see `ServeConfig`.

    Raises:
        ValueError: no such artifact, or an address that cannot be listened at.
    """
    predictor = Predictor.open(folder, config.index)
    with _listening(config) as listener:
        service = Service(config)
        server = _Server(settings(service), service, folder, predictor)
        server.run([listener])
    if server.failure is not None:
        raise server.failure
    if server.left_at_work:
        # A thread still compiles, under which the interpreter cannot be taken down.
        logging.flush()
        os._exit(0)


def settings(service: Service) -> uvicorn.Config:
    """How uvicorn runs a service."""
    config = service.config
    return uvicorn.Config(
        app.create(service),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=config.keep_alive,
        timeout_graceful_shutdown=config.drain,
    )


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"{config.host}:{config.port}: expected an address to listen at, got: {error}; set "
            "--serve.host and --serve.port"
        ) from error
    with listener:
        yield listener


class _Server(uvicorn.Server):
    """uvicorn's, which warms up while it listens, and has signals of its own.

    Attributes:
        failure: what ended it, if not a signal.
        left_at_work: whether it ended while a model was being opened.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, folder: pathlib.Path, predictor: Predictor
    ):
        super().__init__(config)
        self.failure: Exception | None = None
        self.left_at_work = False
        self._service, self._folder, self._first = service, folder, predictor
        self._digest = predictor.artifact.digest
        self._opening: asyncio.Task | None = None
        self._again = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        self._address = "{}:{}".format(*sockets[0].getsockname()[:2])
        logging.info("%s: warming up; it listens at http://%s", self._folder, self._address)
        self._opening = asyncio.create_task(self._begin())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._service.state = ENDING
        await super().shutdown(sockets)
        self.left_at_work = not self._opening.done()
        self._opening.cancel()
        await self._service.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Instead of uvicorn's, which ends the process by the signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        logging.info("%s: ending, since there was %s", self._folder, signal.Signals(number).name)
        self._service.state = ENDING
        self.handle_exit(number, None)

    async def _begin(self) -> None:
        predictor, self._first = self._first, None
        try:
            await self._service.serve(predictor)
        except Exception as error:
            self.failure, self.should_exit = error, True
        else:
            logging.info("%s: ready at http://%s", self._folder, self._address)

    def _reload(self) -> None:
        if self._opening.done():
            self._opening = asyncio.create_task(self._open_again())
        else:
            self._again = True  # what is being opened may be what was there before

    async def _open_again(self) -> None:
        said = "replaced"
        try:
            predictor = await in_thread(Predictor.open, self._folder, self._service.config.index)
            if predictor.artifact.digest == self._digest:
                said = "unchanged"
            else:
                await self._service.serve(predictor)
                self._digest = predictor.artifact.digest
                await in_thread(_let_go)
            logging.info("%s: %s, %s", self._folder, said, predictor.artifact.digest[:12])
        except Exception as error:
            said = "failed"
            logging.error("%s: the model stays as it was: %s", self._folder, error)
        self._service.metrics.reload(said)
        if self._again:
            self._again = False
            self._opening = asyncio.create_task(self._open_again())


def _let_go() -> None:
    """Frees a model that was replaced: it lies in circles of references, as jitted functions do."""
    gc.collect()
    command.return_freed_memory()
