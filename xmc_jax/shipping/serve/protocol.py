"""HTTP/1.1 as uvicorn speaks it, with bounds that it lacks and refusals in JSON.

Bounds are on the number of connections, on the bytes and time of whatever of a request is not its
body, and on the time in which an answer is taken.
"""

import asyncio
import http
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xmc_jax.config import ServeConfig
from xmc_jax.shipping.serve import guard

MAX_HEAD = 2**16
"""Most bytes of a head, and between two parts of a body. One read may exceed it."""
MAX_HEADERS = 100
"""Headers of a request, and fields after its body."""
MAX_AHEAD = 16
"""Requests that a client may send before the first of them is answered."""
SECONDS = 10.0
"""Time for a head, for the rest of a refused body, and for the last part of an answer."""
SPARE = 50
"""Connections beyond `max_connections`, on which only probes are answered."""


class Protocol(HttpToolsProtocol):
    """A connection, which is closed if a request takes too long or too much room."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits: ServeConfig = self.app.config
        self._bytes = 0  # since the last part of a body
        self._fields = 0
        self._timer: asyncio.TimerHandle | None = None  # while the client has to send
        self._stalled: asyncio.TimerHandle | None = None  # while the client has to read

    # The connection

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if self._excess() > SPARE:
            self._refuse(503, "server: too many connections; try again", retry_after="1")
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._expect_nothing()
        self.resume_writing()
        super().connection_lost(exc)

    def _excess(self) -> int:
        return len(self.connections) - self._limits.max_connections

    def _refuse(self, status: int, error: str, **headers: str) -> None:
        """Answers an invalid request and closes the connection."""
        body = json.dumps({"error": error}).encode()
        named = {name.replace("_", "-").encode(): x.encode() for name, x in headers.items()}
        lines = {
            b"content-type": b"application/json",
            b"content-length": b"%d" % len(body),
            b"connection": b"close",
            **dict(guard.HEADERS),
            **named,
        }
        phrase = http.HTTPStatus(status).phrase
        head = [f"HTTP/1.1 {status} {phrase}".encode(), *(b": ".join(x) for x in lines.items())]
        self.transport.write(b"\r\n".join([*head, b"", body]))
        self._hang_up()

    def _hang_up(self) -> None:
        """Closes the connection, at once if the client does not take what was written."""
        self._expect_nothing()
        self.transport.close()
        self._timer = self.loop.call_later(SECONDS, self.transport.abort)

    # What comes

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.transport.is_closing():
            return
        if self._bytes > MAX_HEAD:
            self._refuse(431, f"head: expected at most {MAX_HEAD} bytes, got more")
            return
        self._bytes += len(data)
        if self._timer is None and self._idle():
            self._expect()  # blank lines before a head are part of it
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse_head()

    def _idle(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Ignores the wish for another protocol, which some clients always send."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(405, "CONNECT: Method Not Allowed")
            return
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def _refuse_head(self) -> None:
        error = "expected HTTP/1.1, got something else"
        if self._fields > MAX_HEADERS:
            error = f"expected at most {MAX_HEADERS} headers, got more"
        elif len(self.pipeline) > MAX_AHEAD:
            error = f"expected at most {MAX_AHEAD} requests before the first is answered, got more"
        self._refuse(431 if self._fields > MAX_HEADERS else 400, f"head: {error}")

    def on_message_begin(self) -> None:
        """See httptools."""
        self._bytes = self._fields = 0
        if self._timer is None:
            self._expect()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools; also called for fields after a body."""
        self._fields += 1
        if self._fields > MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._expect_nothing()
        self._bytes = 0
        if self.parser.should_upgrade():
            return
        if len(self.pipeline) > MAX_AHEAD:
            raise ValueError("too many requests ahead")
        self.scope[guard.CROWDED] = self._excess() > 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        if self.parser.should_upgrade():
            return
        self.cycle.more_body = False  # uvicorn leaves it if the answer is out
        if self.cycle.response_complete:
            self._expect_nothing()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._hang_up()
        elif self.cycle.response_complete and self.cycle.more_body:
            self._unset_keepalive_if_required()
            self._expect()  # the rest of what was refused; without it, no other request can follow

    def _expect(self) -> None:
        self._expect_nothing()
        self._timer = self.loop.call_later(SECONDS, self._hang_up)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def timeout_keep_alive_handler(self) -> None:
        """See uvicorn."""
        self._hang_up()

    # What goes

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
