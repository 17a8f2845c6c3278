"""What stands before the routes: hosts, sizes and times of requests, headers, counting."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from xmc_jax.serve.config import ServeConfig
from xmc_jax.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

RETRY_AFTER = "1"
"""Seconds, of answers with 503."""

HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Of every answer: nothing from elsewhere is loaded, and no other page shows or reads this one."""

_LOCAL = ("localhost", "127.0.0.1", "::1")
_PROBES = ("/healthz", "/readyz")  # asked by address, and say nothing


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        headers: further ones.
    """

    def __init__(self, status: int, said: str, **headers: str):
        super().__init__(said)
        self.status, self.headers = status, headers


def busy(said: str) -> Refused:
    """Refused for now."""
    return Refused(503, said, **{"retry-after": RETRY_AFTER})


class Guard:
    """An ASGI application around another.

    Args:
        app: gets the whole body of a request at once.
        config: see `ServeConfig`.
        metrics: are told of each request.
        bodies: paths to which JSON is posted; other bodies are not looked at.

    Attributes:
        held: bytes of the bodies of requests in progress.
    """

    def __init__(self, app: App, config: ServeConfig, metrics: Metrics, bodies: Collection[str]):
        self._app, self.config, self._metrics = app, config, metrics
        self._bodies = frozenset(bodies)
        self._hosts = {name.lower() for name in (*_LOCAL, config.host, *config.allowed_hosts)}
        self.held = 0
        metrics.gauge("xmc_held_bytes", "Of requests in progress.", lambda: self.held)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, body = time.perf_counter(), 500, _Body(self, receive)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            self._check_host(scope)
            if scope["method"] == "POST" and scope["path"] in self._bodies:
                await body.read(scope)
            await self._app(scope, body.receive, sending)
        except Refused as refused:
            await _answer(sending, refused)
        finally:
            self.held -= body.size
            route = getattr(scope.get("route"), "path", "other")  # few, whatever is asked for
            self._metrics.request(route, status, time.perf_counter() - started)

    def _check_host(self, scope: MutableMapping[str, Any]) -> None:
        if "*" in self._hosts or scope["path"] in _PROBES:
            return
        named = [value for name, value in scope["headers"] if name == b"host"]
        host = named[0].decode("latin-1").lower() if len(named) == 1 else ""
        name, _, port = host.rpartition(":")
        host = name if name and port.isdigit() else host
        if host.strip("[]") not in self._hosts:
            raise Refused(
                421,
                f"host: expected a name that this server goes by, got {host[:100]!r}; it may be "
                "allowed by --serve.allowed_hosts",
            )


class _Body:
    """The body of a request, read whole, within limits; then what else is received."""

    def __init__(self, guard: Guard, receive: Receive):
        self._guard, self._receive = guard, receive
        self._parts: list[bytes] | None = []
        self.size = 0

    async def read(self, scope: MutableMapping[str, Any]) -> None:
        limit, headers = self._guard.config.max_body, dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise Refused(
                400, f"content-length: expected a number, got {length[:40]!r}", connection="close"
            )
        if int(length[:20]) > limit:
            raise Refused(
                413,
                f"body: expected at most {limit} bytes, got {length[:20].decode()}",
                connection="close",
            )
        if kind != b"application/json":
            raise Refused(
                415,
                f"content-type: expected application/json, got {kind.decode('latin-1')[:60]!r}",
                connection="close",
            )
        try:
            async with asyncio.timeout(self._guard.config.read_timeout):
                await self._read(limit)
        except TimeoutError:
            seconds = self._guard.config.read_timeout
            raise Refused(
                408, f"body: expected all of it within {seconds} seconds", connection="close"
            ) from None

    async def _read(self, limit: int) -> None:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "body: expected all of it, got a part", connection="close")
            part, more = message.get("body", b""), message.get("more_body", False)
            self.size += len(part)
            self._guard.held += len(part)
            if self.size > limit:
                raise Refused(
                    413, f"body: expected at most {limit} bytes, got more", connection="close"
                )
            if self._guard.held > self._guard.config.max_held:
                raise Refused(
                    503,
                    "server: too many requests in progress; try again",
                    connection="close",
                    **{"retry-after": RETRY_AFTER},
                )
            self._parts.append(part)

    async def receive(self) -> Message:
        if self._parts is not None:
            parts, self._parts = self._parts, None
            return {"type": "http.request", "body": b"".join(parts), "more_body": False}
        return await self._receive()


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps({"error": str(refused)}).encode()
    headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
