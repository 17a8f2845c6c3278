"""The process of `--mode=serve`: opens a model, listens, answers, reloads, ends."""

import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import os
import pathlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from absl import logging

from xmc_jax.config import ServeConfig
from xmc_jax.runtime import command
from xmc_jax.shipping.predictor import Predictor
from xmc_jax.shipping.serve import app
from xmc_jax.shipping.serve.protocol import Protocol
from xmc_jax.shipping.serve.service import ENDING, Service, in_thread

_BACKLOG = 2048  # connections that wait to be accepted
_FILES = 200  # that are open besides connections
_LAST = 5  # seconds for the batch that is being ranked when all connections have ended


def run(find: Callable[[], pathlib.Path], config: ServeConfig) -> None:
    """Serves an artifact until SIGTERM or SIGINT; SIGHUP opens its folder again.

    Args:
        find: gives what `--mode=export` wrote; it may take long, and is called when the address is
            known to be free.

    Raises:
        ValueError: no such artifact, or an address that cannot be listened at.
    """
    with _bound(config) as listener:
        folder = find()
        predictor = Predictor.open(folder, config.index)
        config = _with_documents(config, listener)
        _allow_connections(config)
        service = Service(config)
        server = _Server(settings(service), service, folder, predictor)
        with _address(config):
            listener.listen(_BACKLOG)
        server.run([listener])
    if server.failure is not None:
        raise server.failure
    if server.left_at_work is not None:
        # A thread still computes, under which the interpreter cannot be taken down.
        logging.flush()
        os._exit(server.left_at_work)


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
        timeout_keep_alive=config.keep_alive,
        timeout_graceful_shutdown=config.drain,
    )


@contextlib.contextmanager
def _address(config: ServeConfig) -> Iterator[None]:
    """Turns an OSError into a ValueError that names the address."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{config.host}:{config.port}: expected an address to listen at, got: {error}; set "
            "--serve.host and --serve.port"
        ) from error


@contextlib.contextmanager
def _bound(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket with the server's address, which nobody can connect to yet."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as bound:
        with _address(config):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind((config.host, config.port))
        yield bound


def _with_documents(config: ServeConfig, listener: socket.socket) -> ServeConfig:
    """The config, in which it is decided whether training documents are shown."""
    if config.show_documents is not None:
        return config
    local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    return dataclasses.replace(config, show_documents=local)


def _allow_connections(config: ServeConfig) -> None:
    """Raises this process's limit of open files to what the connections need, or warns."""
    needed = config.max_connections + _FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < needed:
            logging.warning(
                "serve.max_connections: expected at most %d, since this process may have %d files "
                "open (ulimit -Hn), got %d",
                max(allowed - _FILES, 1),
                allowed,
                config.max_connections,
            )


class _Server(uvicorn.Server):
    """uvicorn's, which warms up while it listens, and has signals of its own."""

    def __init__(
        self, config: uvicorn.Config, service: Service, folder: pathlib.Path, predictor: Predictor
    ):
        super().__init__(config)
        self.failure: Exception | None = None
        self.left_at_work: int | None = None
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
        if not self._opening.done():
            self.left_at_work = 0
        self._opening.cancel()
        if not await self._service.close(_LAST):
            logging.error("%s: the ranking thread did not end within %d s", self._folder, _LAST)
            self.left_at_work = 1

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
