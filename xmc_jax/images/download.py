"""One URL: its body within limits, from addresses that were checked, or the reason why not.

HTTP is httpcore2's, the layer under httpx2, which huggingface_hub stands on: it has a public place
where connections are made (`network_backend`), so that a name is resolved once and one of the very
addresses that were checked is connected to, for every redirect alike. TLS still verifies the name.
It follows no redirect, decodes no content and reads no proxy from the environment; those rules are
here. A proxy would resolve names itself, so there is no way to use one.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import ipaddress
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from typing import BinaryIO

import httpcore2
import httpx2

from xmc_jax.images.settings import DownloadLimits

_REDIRECTS = (301, 302, 303, 307, 308)
_ADDRESSES = 4  # of a name, tried one after the other
_IN_MEMORY = 1 << 18  # bytes of a body kept there; more goes to an unnamed file
_KEEPALIVE_SECONDS = 15.0
_NO_ANSWER = "Server disconnected without sending"  # how httpcore2 says it
# Bodies in crumbs cost seconds of work per megabyte: this many pieces are free, and those after
# them must bring this many bytes each, on average.
_FREE_PIECES, _PIECE_BYTES = 4096, 64
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_6TO4 = ipaddress.ip_network("2002::/16")
# IPv6 networks whose last 32 bits are the IPv4 address that is reached: mapped, and NAT64.
_IPV4_INSIDE = (ipaddress.ip_network("::ffff:0:0/96"), ipaddress.ip_network("64:ff9b::/96"))


class Failure(Exception):
    """Why a URL gave nothing.

    Args:
        kind: a word to count by: "url", "private", "dns", "connect", "tls", "timeout", "slow",
            "protocol", "redirects", "encoding", "bytes", "image" or "http_<status>".
        reason: in one line; holds nothing that another run would see differently.
        retry: whether another attempt may fare better.
        wait: seconds that the server asked for.
    """

    def __init__(self, kind: str, reason: str, retry: bool = False, wait: float | None = None):
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason, self.retry, self.wait = kind, reason, retry, wait


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's, also the one inside of another."""
    ip = _innermost(address)
    if ip.version == 6:
        return ip in _GLOBAL_UNICAST and ip not in _6TO4 and ip.is_global
    return ip.is_global and not ip.is_multicast


class Downloader:
    """Downloads, a bounded number at a time, in all and per host; an async context manager.

    Args:
        limits: of each URL.
        concurrency: answers being received or kept at a time.
        per_host: of those, from one host; redirects count at the host they lead to.
        user_agent: the header's value.
        executor: its threads run `keep`.
        folder: of bodies too large for memory, files without a name.
    """

    def __init__(
        self,
        limits: DownloadLimits,
        concurrency: int,
        per_host: int,
        user_agent: str,
        executor: Executor,
        folder: str,
    ):
        self._limits, self._executor, self._folder = limits, executor, folder
        self._slots = asyncio.Semaphore(concurrency)
        self._per_host, self._hosts = per_host, {}
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "image/jpeg,image/png,image/webp,image/gif;q=0.9,*/*;q=0.1",
            "Accept-Encoding": "identity",
        }
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpcore2.default_ssl_context(),
            max_connections=concurrency,
            keepalive_expiry=_KEEPALIVE_SECONDS,
            network_backend=_CheckedBackend(limits),
        )

    async def __aenter__(self) -> "Downloader":
        return self

    async def __aexit__(self, *_) -> None:
        await self._pool.aclose()

    async def download(self, url: str, keep: Callable[[BinaryIO], None]) -> None:
        """Downloads one URL.

        Args:
            url: as it was found.
            keep: called once, in a thread, with the body from its start; may raise Failure. Until
                it returns, the download counts as running.

        Raises:
            Failure: why there is nothing to keep; retries have been made.
        """
        limits, target = self._limits, _parse(url)
        clock = _Clock(limits.deadline)
        for attempt in range(1, limits.attempts + 1):
            try:
                return await self._attempt(target, clock, keep)
            except Failure as failure:
                wait = failure.wait
                if wait is None:
                    wait = limits.backoff * 2 ** (attempt - 1)
                wait = min(wait, limits.max_wait)
                if not failure.retry or attempt == limits.attempts or clock.left <= wait:
                    raise
            clock.left -= wait
            await asyncio.sleep(wait)

    async def _attempt(self, url: httpx2.URL, clock: "_Clock", keep) -> None:
        for _ in range(self._limits.max_redirects + 1):
            # One slot per hop: to hold one host's while waiting for another's could lock up.
            async with self._slot(url.host) as host:
                with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=self._folder) as body:
                    async with clock.running():
                        location = await self._receive(url, host, body)
                    if location is None:
                        host.refusals = 0
                        body.seek(0)
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(self._executor, keep, body)
            url = _parse(location, url)
        raise Failure("redirects", f"more than {self._limits.max_redirects}")

    @contextlib.asynccontextmanager
    async def _slot(self, name: str) -> AsyncIterator["_Host"]:
        """Waits for a turn at a host and then for one of all, so that slow hosts hold few."""
        loop = asyncio.get_running_loop()
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self._per_host)))
        host.users += 1
        try:
            async with host.slots:
                while (pause := host.resumes - loop.time()) > 0:
                    await asyncio.sleep(pause)
                async with self._slots:
                    yield host
        finally:
            host.users -= 1
            if not host.users and host.resumes <= loop.time():
                del self._hosts[name]

    async def _receive(self, url: httpx2.URL, host: "_Host", body: BinaryIO) -> str | None:
        """One request. Returns where it is redirected to, or None with the body written."""
        timeout = self._limits.timeout
        opened = answered = False

        async def trace(event: str, info: dict) -> None:
            nonlocal opened
            opened |= event == "connection.connect_tcp.started"

        while True:
            try:
                with _as_failures(timeout):
                    async with self._pool.stream(
                        "GET",
                        httpcore2.URL(
                            scheme=url.raw_scheme,
                            host=url.raw_host,
                            port=url.port,
                            target=url.raw_path,
                        ),
                        headers={"Host": url.netloc, **self._headers},
                        extensions={
                            "timeout": {"connect": timeout, "read": timeout, "write": timeout},
                            "trace": trace,
                        },
                    ) as response:
                        answered = True
                        location = self._judge(response, host)
                        if location is None:
                            await self._read(response, body)
                        return location
            except _Disconnected:
                # A connection of an earlier request may have been closed since: no attempt yet.
                if opened or answered:
                    raise

    def _judge(self, response: httpcore2.Response, host: "_Host") -> str | None:
        """Raises on all but what can be read; returns the target of a redirect."""
        headers = {
            name.lower(): value.decode("utf-8", "replace") for name, value in response.headers
        }
        status = response.status
        if status in _REDIRECTS:
            if b"location" not in headers:
                raise Failure("protocol", f"status {status} without Location")
            return headers[b"location"]
        if status != 200:
            wait = None
            if status in (429, 503):
                wait = _retry_after(headers.get(b"retry-after", ""))
            if wait is not None:
                loop = asyncio.get_running_loop()
                host.pause(loop.time(), min(wait, self._limits.max_wait), self._limits.attempts)
            busy = status in (408, 425, 429) or status >= 500
            raise Failure(f"http_{status}", f"status {status}", busy, wait)
        encoding = headers.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise Failure("encoding", "a Content-Encoding, which was not asked for")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limits.max_bytes:
            raise self._too_large()
        return None

    async def _read(self, response: httpcore2.Response, body: BinaryIO) -> None:
        limits, loop = self._limits, asyncio.get_running_loop()
        start, size, pieces = loop.time(), 0, 0
        async for piece in response.stream:
            size += len(piece)
            pieces += 1
            if size > limits.max_bytes:
                raise self._too_large()
            if pieces > _FREE_PIECES + size / _PIECE_BYTES:
                raise Failure("protocol", f"pieces of fewer than {_PIECE_BYTES} bytes")
            seconds = loop.time() - start
            if seconds > limits.timeout and size < limits.min_rate * seconds:
                raise Failure("slow", f"fewer than {limits.min_rate:g} bytes/s", retry=True)
            body.write(piece)

    def _too_large(self) -> Failure:
        return Failure("bytes", f"more than {self._limits.max_bytes}")


class _Clock:
    """The time that a URL has left."""

    def __init__(self, deadline: float):
        self._deadline = self.left = deadline

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self.left):
                yield
        except TimeoutError:
            raise Failure("timeout", f"not done in {self._deadline:g} seconds") from None
        finally:
            self.left -= loop.time() - start


@dataclasses.dataclass
class _Host:
    """The turns at one host.

    Attributes:
        slots: for requests to it.
        users: coroutines that hold or await a slot.
        resumes: the loop's time before which the host is left alone.
        refusals: pauses it has asked for since it last gave a body.
    """

    slots: asyncio.Semaphore
    users: int = 0
    resumes: float = 0.0
    refusals: int = 0

    def pause(self, now: float, wait: float, most: int) -> None:
        """Leaves the host alone, as it asks; not for ever, if it gives nothing in between."""
        if self.resumes <= now and self.refusals < most:
            self.refusals += 1
            self.resumes = now + wait


class _Disconnected(Failure):
    """The other side hung up."""


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to a name's public or allowed addresses, and to nothing else."""

    def __init__(self, limits: DownloadLimits):
        self._limits = limits
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        resolved = await _resolve(host, port, self._limits.timeout)
        usable = [address for address in resolved if self._allows(address)]
        if not usable:
            raise Failure("private", "no address of the host is public")
        for address in usable[:_ADDRESSES]:
            try:
                # An address, not the name: nothing is resolved a second time.
                return await self._inner.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed

    def _allows(self, address: str) -> bool:
        ip = _innermost(address)
        return is_public(address) or any(ip in network for network in self._limits.allow_private)


async def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """A host's addresses, in a thread of its own: a slow name delays no other, nor the exit."""
    loop = asyncio.get_running_loop()
    answer = loop.create_future()

    def settle(addresses: list[str], failure: Failure | None) -> None:
        if answer.cancelled():
            return
        if failure is None:
            answer.set_result(addresses)
        else:
            answer.set_exception(failure)

    def look_up() -> None:
        addresses, failure = [], None
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(entry[4][0] for entry in entries))
        except socket.gaierror as error:
            unknown = error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None))
            reason = "no such host" if unknown else "the host cannot be resolved now"
            failure = Failure("dns", reason, retry=not unknown)
        except (OSError, ValueError):  # of UnicodeError, labels of more than 63 letters
            failure = Failure("dns", "no name of a host")
        with contextlib.suppress(RuntimeError):  # the loop is closed by now
            loop.call_soon_threadsafe(settle, addresses, failure)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        async with asyncio.timeout(timeout):
            return await answer
    except TimeoutError:
        raise Failure("dns", f"not resolved in {timeout:g} seconds", retry=True) from None


@contextlib.contextmanager
def _as_failures(timeout: float) -> Iterator[None]:
    """httpcore2's errors as Failures."""
    try:
        yield
    except httpcore2.TimeoutException:
        raise Failure("timeout", f"nothing for {timeout:g} seconds", retry=True) from None
    except httpcore2.ConnectError as error:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise Failure("tls", "the certificate is not valid for the host") from None
        if isinstance(cause, ssl.SSLError):
            raise Failure("tls", "no secure connection", retry=True) from None
        raise Failure("connect", "no connection", retry=True) from None
    except httpcore2.NetworkError:
        raise _Disconnected("connect", "the connection broke", retry=True) from None
    except httpcore2.RemoteProtocolError as error:
        kind = _Disconnected if str(error).startswith(_NO_ANSWER) else Failure
        raise kind("protocol", "an answer cut short or not HTTP", retry=True) from None
    except (httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol):
        raise Failure("url", "cannot be asked for") from None


def _parse(text: str, base: httpx2.URL | None = None) -> httpx2.URL:
    try:
        url = httpx2.URL(text.strip()) if base is None else base.join(text.strip())
    except (httpx2.InvalidURL, ValueError, TypeError):
        raise Failure("url", "not a URL") from None
    if url.scheme not in ("http", "https"):
        raise Failure("url", "neither http nor https")
    port = 80 if url.port is None else url.port
    if not url.host or not 0 < port < 1 << 16:
        raise Failure("url", "without a host or with an impossible port")
    return url


def _innermost(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _IPV4_INSIDE):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _retry_after(value: str) -> float | None:
    """Seconds, from either form of the header; None if it says nothing."""
    value = value.strip()
    if value.isdecimal() and value.isascii():
        return float(value[:9])
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
