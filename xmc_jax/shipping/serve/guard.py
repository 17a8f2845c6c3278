"""What stands before the routes: hosts, sizes and times of requests, headers, counting."""

import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from absl import logging

from xmc_jax.config import ServeConfig
from xmc_jax.shipping.serve import bodies
from xmc_jax.shipping.serve.bodies import Message, Refused
from xmc_jax.shipping.serve.telemetry import Metrics

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, bodies.Receive, Send], Awaitable[None]]

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
FAILED = "server: failed; see its log"
"""Error of an answer with 500."""
CROWDED = "crowded"
"""Key of a request's scope: whether more connections are open than may be."""

_PROBES = ("/healthz", "/readyz")  # answered under any name, and while there is too much to do


class Guard:
    """An ASGI application around another.

    Args:
        app: gets the whole body of a request at once.
        metrics: are told of each request.
        posts: paths to which JSON is posted; other bodies are not looked at.
    """

    def __init__(self, app: App, config: ServeConfig, metrics: Metrics, posts: Collection[str]):
        self._app, self.config, self._metrics = app, config, metrics
        self._posts = frozenset(posts)
        self._hosts = {name.lower() for name in ("localhost", config.host, *config.allowed_hosts)}
        self._held = bodies.Held()
        metrics.gauge("xmc_held_bytes", "Of requests in progress.", lambda: self._held.size)

    async def __call__(self, scope: Scope, receive: bodies.Receive, send: Send) -> None:
        """See ASGI."""
        started, status, whole = time.perf_counter(), None, False
        body = bodies.Body(self.config, self._held, receive)
        # A route of GET answers HEAD, too; uvicorn leaves the content of that answer out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method}

        async def sending(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            else:
                whole = not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope)
            if method == "POST" and scope["path"] in self._posts:
                await body.read(scope)
            await self._app(scope, body.receive, sending)
        except Refused as refused:
            await _answer(sending, refused)
        except Exception:
            logging.exception("a request failed")
            if status is None:
                await _answer(sending, Refused(500, FAILED, connection="close"))
            elif not whole:  # half of an answer is out
                raise
        finally:
            body.free()
            route = getattr(scope.get("route"), "path", "other")  # few, whatever is asked for
            self._metrics.request(route, status or 500, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        """Raises Refused for a host that this is not, or while too many are connected."""
        if scope["path"] in _PROBES:
            return
        if scope.get(CROWDED):
            raise bodies.busy("server: too many connections; try again", connection="close")
        if "*" in self._hosts:
            return
        named = [value for name, value in scope["headers"] if name == b"host"]
        host = named[0].decode("latin-1").lower() if len(named) == 1 else ""
        name, _, port = host.rpartition(":")
        name = name if name and port.isdigit() else host
        # A page elsewhere can have its own name point here, but no address.
        if not (_is_address(name.strip("[]")) or name in self._hosts):
            raise Refused(
                421,
                f"host: expected a name that this server goes by, got {host[:100]!r}; it may be "
                "allowed by --serve.allowed_hosts",
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps({"error": refused.detail}).encode()
    headers = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
