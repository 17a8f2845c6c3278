"""HTTP/1.1 as uvicorn speaks it, with bounds on the heads of requests, for which it has none."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 2**16
"""Bytes of a request's line and headers; what is read at once may be more."""
SECONDS = 10.0
"""For them to arrive."""

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


class Protocol(HttpToolsProtocol):
    """A connection, which is closed if a head takes too long or too much room."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head = 0
        self._timer: asyncio.TimerHandle | None = None  # while a head is expected

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._timer is not None:
            if self._head > MAX_HEAD:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
                return
            self._head += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """See httptools."""
        if self._timer is None:
            self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
