"""Bodies of requests: read within limits, unpacked, and parsed as JSON without blocking the loop.

Everything that a body may cost is bounded before it is paid: bytes before they are kept, and values
before objects are made of them. A long body is parsed by a thread.
"""

import asyncio
import dataclasses
import json
import zlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from xmc_jax.config import ServeConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

RETRY_AFTER = "1"
"""Seconds, of answers with 503."""

_ENCODINGS = (b"", b"identity", b"gzip", b"x-gzip")
_FIELDS = 16  # of an object; no object of the API has more
_SHORT = 2**16  # bytes that the event loop parses itself
_GZIP = "body: expected gzip, as content-encoding says, got"
_UNPACKED = 2**16  # bytes that are unpacked at a time
# One thread: parsing holds the interpreter, and several bodies would share it anyway.
_PARSER = ThreadPoolExecutor(1, "parses")


class Refused(HTTPException):
    """A request that is refused.

    Args:
        error: one line that says why.
        **headers: further headers of the answer.
    """

    def __init__(self, status: int, error: str, **headers: str):
        super().__init__(status, error, {name.replace("_", "-"): x for name, x in headers.items()})


def busy(error: str, **headers: str) -> Refused:
    """A refusal for now."""
    return Refused(503, error, retry_after=RETRY_AFTER, **headers)


@dataclasses.dataclass
class Held:
    """Bytes of the bodies of all requests in progress."""

    size: int = 0


class Body:
    """The body of a request, read as a whole.

    Args:
        held: counts its bytes, until `free`.
    """

    def __init__(self, config: ServeConfig, held: Held, receive: Receive):
        self._config, self._held, self._receive = config, held, receive
        self._content: bytearray | None = None  # None: not read, or handed on
        self._size = 0

    async def read(self, scope: MutableMapping[str, Any]) -> None:
        """Reads and unpacks it.

        Raises:
            Refused: it is no JSON, too large, too slow, or not packed as it says.
        """
        config, headers = self._config, dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        packed = headers.get(b"content-encoding", b"").strip().lower()
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise _bad(400, f"content-length: expected a number, got {length[:40]!r}")
        if int(length[:20]) > config.max_body:
            raise self._too_large(length[:20].decode())
        if kind != b"application/json":
            raise _bad(
                415, f"content-type: expected application/json, got {kind.decode('latin-1')[:60]!r}"
            )
        if packed not in _ENCODINGS:
            raise _bad(
                415,
                f"content-encoding: expected gzip or none, got {packed.decode('latin-1')[:60]!r}",
                accept_encoding="gzip",
            )
        self._content = bytearray()
        unpacked = _Gzip() if packed.endswith(b"gzip") else None
        try:
            async with asyncio.timeout(config.read_timeout):
                await self._read(unpacked)
        except TimeoutError:
            raise _bad(
                408, f"body: expected all of it within {config.read_timeout} seconds"
            ) from None

    async def _read(self, gzip: "_Gzip | None") -> None:
        received, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _bad(400, "body: expected all of it, got a part")
            part, more = message.get("body", b""), message.get("more_body", False)
            received += len(part)
            if received > self._config.max_body:
                raise self._too_large("more")
            if gzip is None:
                self._keep(part)
                continue
            for piece in gzip.unpack(part):
                self._keep(piece)
                await asyncio.sleep(0)  # a small part may unpack to much
        if gzip is not None:
            self._keep(gzip.end())

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        self._held.size += len(part)
        if self._size > self._config.max_body:
            raise self._too_large("more")
        if self._held.size > self._config.max_held:
            raise busy("server: too many requests in progress; try again", connection="close")
        self._content += part

    def _too_large(self, size: str) -> Refused:
        return _bad(413, f"body: expected at most {self._config.max_body} bytes, got {size}")

    async def receive(self) -> Message:
        """See ASGI: the body in one message, and then what the connection says."""
        if self._content is not None:
            content, self._content = bytes(self._content), None
            return {"type": "http.request", "body": content, "more_body": False}
        return await self._receive()

    def free(self) -> None:
        """Its bytes are no longer held."""
        self._held.size -= self._size
        self._size, self._content = 0, None


def _bad(status: int, error: str, **headers: str) -> Refused:
    """A refusal before the body is read to its end; the connection is closed."""
    return Refused(status, error, connection="close", **headers)


class _Gzip:
    """Unpacks what was packed by gzip."""

    def __init__(self):
        self._unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def unpack(self, part: bytes) -> Iterator[bytes]:
        """Pieces of at most `_UNPACKED` bytes."""
        try:
            while part:
                yield self._unpacker.decompress(part, _UNPACKED)
                part = self._unpacker.unconsumed_tail
        except zlib.error:
            raise _bad(400, f"{_GZIP} something else") from None
        if self._unpacker.unused_data:
            raise _bad(400, f"{_GZIP} more after its end")

    def end(self) -> bytes:
        """The last bytes."""
        last = self._unpacker.flush()
        if not self._unpacker.eof:
            raise _bad(400, f"{_GZIP} a part of it")
        return last


class Request(fastapi.Request):
    """A request whose JSON is checked before it is made objects of."""

    config: ServeConfig

    async def json(self) -> Any:
        """The parsed body.

        Raises:
            Refused: it is no JSON, has too many values, or an object has a field twice.
        """
        body = await self.body()
        if len(body) <= _SHORT:
            return parse(body, self.config)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_PARSER, parse, body, self.config)


def route_class(config: ServeConfig) -> type[APIRoute]:
    """Routes whose requests are parsed within the limits of a config."""

    class Limited(Request):
        pass

    Limited.config = config

    class Route(APIRoute):
        def get_route_handler(self):
            handle = super().get_route_handler()

            async def handler(request: fastapi.Request) -> fastapi.Response:
                return await handle(Limited(request.scope, request.receive))

            return handler

    return Route


def most_values(config: ServeConfig) -> int:
    """Commas and opening brackets of a body, at most, those within texts included."""
    of_query = config.max_text + config.max_only + config.max_exclude + _FIELDS
    return config.max_queries * of_query


def parse(body: bytes, config: ServeConfig) -> Any:
    """JSON in UTF-8; the same whatever the time and memory that it would take to hold it.

    Raises:
        Refused: see `Request.json`.
    """
    most = most_values(config)
    if len(body) > most and sum(body.count(mark) for mark in (b",", b"[", b"{")) > most:
        raise Refused(413, f"body: expected at most {most} commas and brackets, got more")
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Refused(400, f"body: expected JSON in UTF-8, got: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"body: expected JSON, got: {error.msg}") from None
    except RecursionError:
        raise Refused(400, "body: expected JSON, got lists within lists without end") from None
    except ValueError:  # of a number with thousands of digits
        raise Refused(400, "body: expected JSON, got a number of too many digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _FIELDS:
        raise Refused(
            422, f"body: expected at most {_FIELDS} fields of an object, got {len(pairs)}"
        )
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise Refused(422, f"body: expected each field once, got {twice[:60]!r} twice")
    return fields
