"""Connections between process 0 and each other process, watched by the kernels.

A process that is killed closes its connection; a host that fails no longer answers its peer's
kernel. A process that is busy, holds Python's lock or is suspended does neither, however long.
How the run ended goes over the same connections, as one line.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Collection
from typing import Any

LOST = 75  # exit code of a run that may go on if it is started again (EX_TEMPFAIL)
_LINE = 1 << 16  # bytes of a message, at most

Ended = Callable[[str, int], None]
"""What to do with the line that says how the run ended, and an exit code; called in a thread."""


class Hub:
    """Process 0's end.

    Args:
        silence: seconds after which a host that does not answer is gone.

    Attributes:
        address: "port token", for the others.
    """

    def __init__(self, count: int, silence: int, ended: Ended):
        self._silence, self._ended = silence, ended
        dual = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            backlog=count,
            dualstack_ipv6=dual,
        )
        self._token = secrets.token_hex(16)
        self.address = f"{self._listener.getsockname()[1]} {self._token}"
        self._peers: dict[int, _Link] = {}
        self._missing, self._complete = set(range(1, count)), threading.Event()
        self._over = False
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def wait(self, seconds: float) -> Collection[int]:
        """Waits until all are here; gives those that are not."""
        self._complete.wait(seconds)
        return () if self._complete.is_set() else sorted(self._missing)

    def say(self, line: str, code: int = 0) -> None:
        """Tells all how the run ended, "" if well; nothing is looked at any more."""
        self._over = True
        for link in list(self._peers.values()):
            link.send({"end": line, "code": code})

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        with contextlib.suppress(OSError):  # gone before it was accepted
                            connection, _ = self._listener.accept()
                            link = _Link(connection, self._silence)
                            selector.register(connection, selectors.EVENT_READ, link)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    def _hear(self, link: "_Link") -> bool:
        """Handles the messages of a peer; False if no more can come."""
        try:
            messages = link.receive()
        except OSError as error:
            if link.process and not self._over:
                self._end(f"{link.who} is gone: {_why(error, self._silence)}", LOST, link)
            return False
        for message in messages:
            if not link.process:
                if message.get("token") != self._token:
                    return False  # a stranger
                link.process, link.host = message["process"], message["host"]
                link.send({"host": socket.gethostname()})
                self._peers[link.process] = link
                self._missing.discard(link.process)
                if not self._missing:
                    self._complete.set()
            elif not self._over:
                if message["end"]:
                    self._end(message["end"], message["code"], link)
                self._peers.pop(link.process, None)
                return False
        return True

    def _end(self, line: str, code: int, source: "_Link") -> None:
        self._peers.pop(source.process, None)
        self.say(line, code)
        self._ended(line, code)


class Spoke:
    """Another process's end; connects at once.

    Args:
        host: of process 0.
        timeout: seconds that connecting may take.

    Raises:
        OSError: process 0 is not reached.
    """

    def __init__(
        self, host: str, address: str, process: int, silence: int, ended: Ended, timeout: float
    ):
        port, token = address.split()
        connection = socket.create_connection((host, int(port)), timeout)
        self._silence, self._ended, self._over = silence, ended, False
        self._link = _Link(connection, silence)
        self._link.send({"token": token, "process": process, "host": socket.gethostname()})
        self._link.host = _first(self._link)["host"]
        connection.settimeout(None)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def say(self, line: str, code: int = 0) -> None:
        """Tells process 0 how the run ended, and it the others; see `Hub.say`."""
        self._over = True
        self._link.send({"end": line, "code": code})

    def _watch(self) -> None:
        try:
            told = _first(self._link)
            line, code = told["end"], told["code"]
        except OSError as error:
            line, code = f"{self._link.who} is gone: {_why(error, self._silence)}", LOST
        if line and not self._over:
            self._ended(line, code)


class _Link:
    """One connection: JSON values, a line each."""

    def __init__(self, connection: socket.socket, silence: int):
        self._connection, self._read = connection, b""
        self.process, self.host = 0, ""
        every = max(silence // 5, 1)
        tcp = {
            "TCP_KEEPIDLE": max(silence - 3 * every, 1),
            "TCP_KEEPINTVL": every,
            "TCP_KEEPCNT": 3,
            "TCP_USER_TIMEOUT": 1000 * silence,
            "TCP_NODELAY": 1,
        }
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in tcp.items():
            if hasattr(socket, name):  # Linux has all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def who(self) -> str:
        return f"process {self.process} ({self.host})"

    def send(self, value: Any) -> None:
        """Does nothing if the other end is gone, which reading finds out."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Waits for data, and gives the messages that are complete."""
        data = self._connection.recv(_LINE)
        *lines, self._read = (self._read + data).split(b"\n")
        if not data or len(self._read) > _LINE:
            raise ConnectionResetError("closed")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionResetError("not a peer")
        return messages


def _first(link: _Link) -> dict[str, Any]:
    while not (messages := link.receive()):
        pass
    return messages[0]


def _why(error: OSError, silence: int) -> str:
    if isinstance(error, ConnectionError):
        return "its connection is closed"
    return f"no sign of its host for {silence} s"
