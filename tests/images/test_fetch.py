"""Downloads from a server that does all a server may do wrong, and kills at any moment."""

import contextlib
import gzip
import io
import json
import pathlib
import re
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from xmc_jax.images import download, fetch, image_sources, shards

ROOT = pathlib.Path(__file__).parents[2]
MAX_BYTES = 2_000_000
# Small time-outs, so that nothing but the server makes a test wait.
QUICK = (
    *("--timeout", "2", "--deadline", "12", "--min_rate", "2000", "--backoff", "0.01"),
    *("--attempts", "3", "--max_wait", "1", "--max_redirects", "3"),
    *("--max_bytes", str(MAX_BYTES), "--max_pixels", "1000000"),
)


def picture(seed: int, format: str = "PNG", size: tuple[int, int] = (24, 16), **options) -> bytes:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """A whole one-bit PNG, all black: of side 50,000 it is 1.4 MB, and 312 MB of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    squeeze = zlib.compressobj(1)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join([squeeze.compress(row * 100) for _ in range(side // 100)] + [squeeze.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Hostile(socketserver.ThreadingTCPServer):
    """Answers as the first part of the path says; counts requests and remembers their times."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self, address: str = "127.0.0.1"):
        super().__init__((address, 0), _Handler)
        self.base = f"http://{address}:{self.server_address[1]}"
        self.hits: dict[str, list[float]] = {}
        self.fields: list[dict[str, str]] = []  # of each request
        self.requests = self.running = self.most = self.connections = 0
        self.changed = threading.Condition()
        self.gate = threading.Event()
        self.gate.set()
        self.bodies: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients hang up; that is what they should."""

    def wait_for(self, requests: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.requests >= requests, 60)


class _Handler(socketserver.StreamRequestHandler):
    server: Hostile

    def handle(self):
        self.server.connections += 1
        while self.one():
            pass

    def one(self) -> bool:
        line = self.rfile.readline()
        if not line:
            return False
        path = line.split()[1].decode().partition("?")[0]
        fields = {}
        while (header := self.rfile.readline().strip()) != b"":
            name, _, value = header.decode().partition(": ")
            fields[name.lower()] = value
        server = self.server
        with server.changed:
            server.requests += 1
            server.running += 1
            server.most = max(server.most, server.running)
            server.fields.append(fields)
            server.hits.setdefault(path, []).append(time.monotonic())
            tries = len(server.hits[path])
            server.changed.notify_all()
        try:
            kind, *parts = path.strip("/").split("/")
            return bool(getattr(self, "do_" + re.sub(r"\W", "_", kind))(parts, tries))
        finally:
            with server.changed:
                server.running -= 1

    def send(self, status: int, body: bytes = b"", length: int | None = None, **headers) -> bool:
        headers = {"Content-Length": len(body) if length is None else length} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.wfile.write(f"HTTP/1.1 {status} Any\r\n{head}\r\n".encode() + body)
        return True

    def forever(self, piece: bytes, pause: float = 0.0) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(piece)
                time.sleep(pause)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        for file in (self.rfile, self.wfile, self.connection):
            file.close()
        self.rfile = self.wfile = io.BytesIO()

    def do_ok(self, parts, tries):
        self.server.gate.wait(30)
        seed = int(parts[0])
        return self.send(200, picture(seed, "JPEG" if seed % 2 else "PNG"))

    def do_body(self, parts, tries):
        return self.send(200, self.server.bodies[parts[0]])

    def do_slow(self, parts, tries):
        self.send(200, length=100_000)
        self.forever(b"x", 0.01)

    def do_stall(self, parts, tries):
        self.send(200, b"x" * 10, length=1000)
        self.connection.recv(1)

    def do_silent(self, parts, tries):
        self.connection.recv(1)

    def do_slow_headers(self, parts, tries):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.forever(b"X-A: 1\r\n", 0.05)

    def do_endless(self, parts, tries):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.forever(b"x" * 65536)

    def do_endless_headers(self, parts, tries):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.forever(b"X-A: 1\r\n" * 1000)

    def do_endless_chunks(self, parts, tries):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.forever(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")

    def do_continue(self, parts, tries):
        self.forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    def do_crumbs(self, parts, tries):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.forever(b"1\r\nx\r\n" * 1000)

    def do_chunks(self, parts, tries):
        body = picture(5)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in (body[:100], body[100:], b""):
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        return True

    def do_announced(self, parts, tries):
        self.send(200, length=1 << 40)

    def do_gzip(self, parts, tries):
        return self.send(200, self.server.bodies["zeros.gz"], Content_Encoding="gzip")

    def do_html(self, parts, tries):
        return self.send(200, b"<html>no such picture</html>", Content_Type="image/png")

    def do_loop(self, parts, tries):
        return self.send(302, Location="/loop")

    def do_hops(self, parts, tries):
        left = int(parts[0])
        return self.send(301 + left % 2, Location=f"/hops/{left - 1}" if left > 1 else "/ok/1")

    def do_to(self, parts, tries):
        return self.send(302, Location=bytes.fromhex(parts[0]).decode())

    def do_nowhere(self, parts, tries):
        return self.send(302)

    def do_status(self, parts, tries):
        status, failures, *after = parts
        if tries <= int(failures):
            return self.send(int(status), **({"Retry-After": after[0]} if after else {}))
        return self.send(200, picture(2))

    def do_reset(self, parts, tries):
        if tries > int(parts[0]):
            return self.send(200, picture(3))
        self.send(200, b"x" * 10, length=1000)
        self.reset()

    def do_short(self, parts, tries):
        self.send(200, picture(4), length=10_000)

    def do_long(self, parts, tries):
        self.send(200, picture(4), length=100)

    def do_more(self, parts, tries):
        return self.send(200, picture(4) + b"more", length=len(picture(4)))

    def do_garbage(self, parts, tries):
        self.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")

    def do_hangs_up(self, parts, tries):
        self.send(200, picture(6))  # kept alive, it says, and is not


def moved_to(server: Hostile, url: str) -> str:
    return f"{server.base}/to/{url.encode().hex()}"


@pytest.fixture(scope="module")
def bodies():
    return {
        "huge": huge_png(50_000),
        "broad": picture(0, size=(1200, 900), format="JPEG", quality=1),
        "half": picture(1, "JPEG", (64, 64))[:-400],
        "half.png": picture(1)[:-40],
        "zeros.gz": gzip.compress(bytes(1 << 26), 1),
        "empty": b"",
        "text": b"not a picture, whatever it is called",
        "scans": b"\xff\xd8" + b"\xff\xda\x00\x00" * 200,
        "segments": b"\xff\xd8" + b"\xff\xe5\x00\x02" * 2000 + picture(1, "JPEG")[2:],
        "avif": picture(1, "AVIF"),
    }


@pytest.fixture
def server(bodies):
    with Hostile() as server:
        server.bodies = dict(bodies)
        yield server
        server.shutdown()


def write_list(path: pathlib.Path, urls: list) -> pathlib.Path:
    rows = [json.dumps({"id": f"item{i}", "url": url}) + "\n" for i, url in enumerate(urls)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def run(tmp_path, urls: list, *flags: str, out: str = "out", private: bool = False) -> list[str]:
    """Fetches; the outcome of each URL, "ok" or its error."""
    listed = write_list(tmp_path / "urls.jsonl", urls)
    allowed = () if private else ("--allow_private", "127.0.0.1/32")
    command = ["--urls", str(listed), "--out", str(tmp_path / out), *QUICK, *allowed, *flags]
    assert fetch.main(command) == 0
    return outcomes(tmp_path / out)


def outcomes(out: pathlib.Path) -> list[str]:
    tables = [pa.parquet.read_table(path) for path in sorted(out.glob("images/*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert all((row["bytes"] is None) == (row["error"] is not None) for row in rows)
    return [row["error"] or "ok" for row in rows]


def contents(out: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# What servers do, the outcome, and how often it is asked for, all others among them.
HOSTILITIES = {
    "ok/1": ("ok", 2),  # where hops/3 ends
    "ok/2": ("ok", 1),
    "chunks": ("ok", 1),
    "hops/3": ("ok", 2),  # where hops/4 passes
    "hops/4": ("redirects: more than 3", 1),
    "loop": ("redirects: more than 3", 4),
    "nowhere": ("protocol: status 302 without Location", 1),
    "slow": ("slow: fewer than 2000 bytes/s", 3),
    "stall": ("timeout: nothing for 2 seconds", 3),
    "silent": ("timeout: nothing for 2 seconds", 3),
    "slow_headers": ("timeout: not done in 12 seconds", 1),
    "endless": (f"bytes: more than {MAX_BYTES}", 1),
    "endless_headers": ("protocol: an answer cut short or not HTTP", 3),
    "endless_chunks": (f"bytes: more than {MAX_BYTES}", 1),
    "continue": ("timeout: not done in 12 seconds", 1),
    "crumbs": ("protocol: pieces of fewer than 64 bytes", 1),
    "announced": (f"bytes: more than {MAX_BYTES}", 1),
    "gzip": ("encoding: a Content-Encoding, which was not asked for", 1),
    "body/huge": ("image: expected at most 1000000 pixels", 1),
    "body/broad": ("image: expected 1 to 1000000 pixels", 1),
    "body/half": ("image: expected a whole image", 1),
    "body/half.png": ("image: expected a whole image", 1),
    "body/empty": ("image: expected one of", 1),
    "body/text": ("image: expected one of", 1),
    "body/scans": ("image: expected what encoders make, got a JPEG of more scans", 1),
    "body/segments": ("image: expected what encoders make, got a JPEG of more segments", 1),
    "body/avif": ("ok", 1),
    "html": ("image: expected one of", 1),
    "status/404/9": ("http_404: status 404", 1),
    "status/410/9": ("http_410: status 410", 1),
    "status/204/9": ("http_204: status 204", 1),
    "status/500/2": ("ok", 3),
    "status/500/9": ("http_500: status 500", 3),
    "status/503/2/0": ("ok", 3),
    "status/429/2": ("ok", 3),
    "status/429/9/0": ("http_429: status 429", 3),
    "reset/2": ("ok", 3),
    "reset/9": ("connect: the connection broke", 3),
    "short": ("protocol: an answer cut short or not HTTP", 3),
    "long": ("image: expected a whole image", 1),
    "garbage": ("protocol: an answer cut short or not HTTP", 3),
}


@pytest.mark.slow
def test_hostile_servers(server, tmp_path):
    urls = [f"{server.base}/{path}" for path in HOSTILITIES]
    start = time.monotonic()
    found = run(tmp_path, urls)
    for (path, (expected, tries)), outcome in zip(HOSTILITIES.items(), found, strict=True):
        assert outcome.startswith(expected), (path, outcome)
        assert len(server.hits[f"/{path}"]) == tries, path
    assert time.monotonic() - start < 30  # the deadline and some; everything at once


def test_the_report_counts_and_the_failures_say_why(server, tmp_path, capsys):
    urls = [f"{server.base}/{path}" for path in ("ok/1", "status/404/9", "html")]
    run(tmp_path, [urls[:2], urls[2], "gopher://x/", None])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["outcomes"] == {"http_404": 1, "image": 1, "ok": 1, "url": 1}
    assert report["hosts"] == {
        "127.0.0.1": {"http_404": 1, "image": 1, "ok": 1},
        "x": {"url": 1},
    }
    lines = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert failures[0] == {
        "id": "item0",
        "k": 1,
        "url": urls[1],
        "outcome": "http_404",
        "reason": "status 404",
    }
    assert [failure["outcome"] for failure in failures] == ["http_404", "image", "url"]
    assert capsys.readouterr().out.splitlines()[0].endswith("1 image of 4 URLs")
    assert not (tmp_path / "out/.partial").exists()


def test_sources_read_what_was_fetched(server, tmp_path):
    urls = [[f"{server.base}/ok/1", f"{server.base}/html", f"{server.base}/ok/2"], None]
    run(tmp_path, [*urls, f"{server.base}/ok/3"], "--shard_images", "2")
    uids = ["item2", "item0", "item1", "other"]
    source = image_sources.open(tmp_path / "out/images", "train", uids)
    found = list(source.read(limit=3))
    assert found == [
        (0, 0, picture(3, "JPEG")),
        (1, 0, picture(1, "JPEG")),
        (1, 1, picture(2)),
    ]


OTHER_SCHEMES = ["file:///etc/passwd", "ftp://h/x", "data:image/png;base64,AA", "http://h:99999/"]


def test_only_http_is_fetched(server, tmp_path):
    urls = [
        *OTHER_SCHEMES,
        "x",
        "//h/x",
        "http://",
        "http:x",
        "http://h\r\nA: b/",
        "\ud800",
        "http://h:0/",
    ]
    assert {found.partition(": ")[0] for found in run(tmp_path, urls)} == {"url"}
    assert not server.connections


def test_redirects_lead_to_http_only(server, tmp_path):
    found = run(tmp_path, [moved_to(server, url) for url in OTHER_SCHEMES])
    assert {outcome.partition(": ")[0] for outcome in found} == {"url"}


@pytest.mark.parametrize("form", ["/ok/{0}", "../../ok/{0}", "//{1}/ok/{0}", "http://{1}/ok/{0}#x"])
def test_redirects_may_be_relative(server, tmp_path, form):
    target = form.format(7, server.base.removeprefix("http://"))
    assert run(tmp_path, [moved_to(server, target)]) == ["ok"]


def test_no_credentials_are_sent(server, tmp_path):
    url = server.base.replace("//", "//user:secret@")
    assert run(tmp_path, [f"{url}/ok/1", moved_to(server, f"{url}/ok/2")]) == ["ok", "ok"]
    names = {name for fields in server.fields for name in fields}
    assert names == {"host", "user-agent", "accept", "accept-encoding"}
    assert {fields["host"] for fields in server.fields} == {server.base.removeprefix("http://")}


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "[::1]", "[::ffff:127.0.0.2]", "canary.test", "2130706434", "0x7f.2", "0.0.0.0"],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_private_addresses_are_not_connected_to(server, tmp_path, monkeypatch, host, redirected):
    """However they are written; the server there sees nothing, not even a connection."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda h, *a, **k: resolve(h.replace("canary.test", "127.0.0.2"), *a)
    )
    with Hostile("127.0.0.2") as canary:
        url = f"http://{host}:{canary.server_address[1]}/ok/1"
        (found,) = run(tmp_path, [moved_to(server, url) if redirected else url])
        assert found.startswith("private: ")
        assert not canary.connections
        canary.shutdown()


def test_private_addresses_when_allowed(server, tmp_path):
    urls = [f"{server.base}/ok/1"]
    assert run(tmp_path, urls, "--allow_private", private=True) == ["ok"]
    assert run(tmp_path, urls, private=True, out="other")[0].startswith("private: ")


def test_a_name_is_resolved_once_and_that_address_connected_to(server, tmp_path, monkeypatch):
    """A name that answers with a public address first and a private one later gains nothing."""
    answers = iter(["127.0.0.1", *["127.0.0.2"] * 9])
    resolve, names = socket.getaddrinfo, []

    def rebind(host, *rest, **named):
        if host == "images.test":
            names.append(host)
            host = next(answers)
        return resolve(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    port = server.server_address[1]
    assert run(tmp_path, [f"http://images.test:{port}/ok/1"]) == ["ok"]
    assert names == ["images.test"]
    assert [fields["host"] for fields in server.fields] == [f"images.test:{port}"]
    found = run(tmp_path, [f"http://images.test:{port}/ok/1"], out="other")
    assert found[0].startswith("private: ")


def test_of_mixed_addresses_only_the_allowed_are_tried(server, tmp_path, monkeypatch):
    entries = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in ("127.0.0.2", "10.0.0.1", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    assert run(tmp_path, [f"http://a.test:{server.server_address[1]}/ok/1"]) == ["ok"]


@pytest.mark.parametrize(
    "code, expected, calls",
    [(socket.EAI_NONAME, "dns: no such host", 1), (socket.EAI_AGAIN, "dns: the host cannot", 3)],
)
def test_unknown_names_fail_at_once_and_mute_name_servers_are_asked_again(
    tmp_path, monkeypatch, code, expected, calls
):
    asked = []

    def fail(*arguments, **_):
        asked.append(arguments)
        raise socket.gaierror(code, "told so")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert run(tmp_path, ["http://nowhere.test/x"])[0].startswith(expected)
    assert len(asked) == calls


@pytest.mark.slow
def test_a_name_server_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30) and [])
    found = run(tmp_path, ["http://slow.test/x"], "--attempts", "1")
    release.set()
    assert found == ["dns: not resolved in 2 seconds"]


PRIVATE = """0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.168.1.1 198.18.0.1
192.0.2.1 203.0.113.9 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 fe80::1 fe80::1%eth0
fc00::1 fd12::1 fec0::1 ff02::1 ff0e::1 2001:db8::1 2001::1 2002:7f00:1:: 2002:808:808:: 4000::1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1
"""
PUBLIC = "1.1.1.1 8.8.8.8 172.32.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"


def test_public_addresses():
    assert not [address for address in PRIVATE.split() if download.is_public(address)]
    assert all(map(download.is_public, PUBLIC.split()))


@pytest.mark.slow
@pytest.mark.parametrize("after, least, most", [("1", 0.95, 9), ("99999999999", 1.15, 9)])
def test_retry_after_is_heeded_and_capped(server, tmp_path, after, least, most):
    path = f"status/503/1/{after}"
    assert run(tmp_path, [f"{server.base}/{path}"], "--max_wait", "1.2") == ["ok"]
    first, second = server.hits[f"/{path}"]
    assert least < second - first < most


@pytest.mark.parametrize("after", ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", ""])
def test_retry_after_in_the_past_or_nonsense_does_not_delay(server, tmp_path, after):
    path = f"status/503/1/{after}".replace(" ", "%20")
    assert run(tmp_path, [f"{server.base}/{path}"]) == ["ok"]
    first, second = server.hits[f"/{path}"]
    assert second - first < 0.95


def test_a_host_that_asks_for_a_pause_gets_one_from_all(server, tmp_path):
    urls = [f"{server.base}/status/503/1/1", *(f"{server.base}/ok/{i}" for i in range(3))]
    assert run(tmp_path, urls, "--per_host", "1", "--max_wait", "0.3") == ["ok"] * 4
    first = server.hits["/status/503/1/1"][0]
    assert all(server.hits[f"/ok/{i}"][0] - first > 0.28 for i in range(3))


def test_a_host_that_only_asks_for_pauses_is_not_waited_for_long(server, tmp_path):
    urls = [f"{server.base}/status/503/999/9?{i}" for i in range(20)]
    start = time.monotonic()
    found = run(tmp_path, urls, "--per_host", "1", "--max_wait", "0.1")
    assert found == ["http_503: status 503"] * 20 and server.requests == 3 * 20
    assert time.monotonic() - start < 3.5  # and not 20 times 0.2 seconds


def test_a_wait_past_the_deadline_is_not_begun(server, tmp_path):
    start = time.monotonic()
    found = run(tmp_path, [f"{server.base}/status/503/1/9"], "--max_wait", "9", "--deadline", "1")
    assert found == ["http_503: status 503"] and time.monotonic() - start < 8


def test_back_off_doubles(server, tmp_path):
    run(tmp_path, [f"{server.base}/status/500/9"], "--backoff", "0.1", "--attempts", "4")
    gaps = np.diff(server.hits["/status/500/9"])
    assert (gaps > [0.099, 0.199, 0.399]).all() and gaps.sum() < 10


def test_concurrency_is_bounded_in_all_and_per_host(server, tmp_path):
    with Hostile() as other:
        urls = [f"{each.base}/ok/{i}" for i in range(20) for each in (server, other)]
        server.gate.clear()
        other.gate.clear()
        # Two names of one address would be two hosts; two ports of one host are one.
        opener = threading.Thread(
            target=lambda: (server.wait_for(3), server.gate.set(), other.gate.set())
        )
        opener.start()
        run(tmp_path, urls, "--concurrency", "8", "--per_host", "6")
        opener.join()
        assert 3 <= server.most + other.most <= 12 and max(server.most, other.most) <= 6
        other.shutdown()


def test_connections_are_kept_and_lost_ones_cost_no_attempt(server, tmp_path):
    urls = [f"{server.base}/ok/{i}" for i in range(30)]
    assert set(run(tmp_path, urls, "--concurrency", "1")) == {"ok"}
    assert server.connections == 1
    urls = [f"{server.base}/hangs_up/{i}" for i in range(30)]
    flags = ("--concurrency", "2", "--attempts", "1")
    assert set(run(tmp_path, urls, *flags, out="other")) == {"ok"}


def test_what_follows_an_answer_is_not_the_next_one(server, tmp_path):
    urls = [f"{server.base}/{path}" for i in range(5) for path in (f"more/{i}", f"ok/{i}")]
    assert set(run(tmp_path, urls, "--concurrency", "1")) == {"ok"}


def test_the_same_bytes_for_any_concurrency(server, tmp_path):
    slow = (
        "slow",
        "stall",
        "silent",
        "slow_headers",
        "endless_headers",
        "continue",
    )  # one after the other
    urls = [
        [f"{server.base}/{path}", f"{server.base}/ok/{i}"]
        for i, path in enumerate(HOSTILITIES)
        if path not in slow
    ]
    for concurrency in ("1", "8"):
        server.hits.clear()  # each starts with the failures again
        flags = ("--concurrency", concurrency, "--shard_images", "7")
        run(tmp_path, urls, *flags, out=concurrency)
    one, eight = contents(tmp_path / "1"), contents(tmp_path / "8")
    assert len(one) == 3 + -(-2 * len(urls) // 7)
    assert one == eight


def command(listed: pathlib.Path, out: pathlib.Path, *flags: str) -> list[str]:
    allowed = ("--allow_private", "127.0.0.1/32")
    module = (sys.executable, "-m", "xmc_jax.images.fetch")
    return [*module, "--urls", str(listed), "--out", str(out), *QUICK, *allowed, *flags]


# Where tests run in the background, SIGINT is ignored, and so it would be by what they start.
STARTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from xmc_jax.images import fetch
sys.exit(fetch.main())
"""


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", STARTED, *command(*arguments)[3:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_finished_folder_is_left_as_it_is(server, tmp_path):
    urls = [f"{server.base}/{path}" for path in ("ok/1", "status/404/1", "status/500/3")]
    found = run(tmp_path, urls)
    before, requests = contents(tmp_path / "out"), server.requests
    assert run(tmp_path, urls) == found == ["ok", "http_404: status 404", "http_500: status 500"]
    assert contents(tmp_path / "out") == before and server.requests == requests


def test_failures_are_retried_when_asked_and_nothing_else_is(server, tmp_path):
    paths = ("ok/1", "status/404/1", "ok/2", "status/500/3", "ok/3", "status/410/9")
    urls = [f"{server.base}/{path}" for path in paths]
    run(tmp_path, urls, "--shard_images", "2")
    found = run(tmp_path, urls, "--shard_images", "2", "--retry_failed")
    assert found == ["ok"] * 5 + ["http_410: status 410"]
    assert [len(server.hits[f"/ok/{i}"]) for i in (1, 2, 3)] == [1, 1, 1]
    server.hits = {f"/{path}": [0.0] * 9 for path in paths[:-1]}  # what failed at first, does not
    assert run(tmp_path, urls, "--shard_images", "2", out="straight") == found
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_failures_are_retried_under_new_limits(server, tmp_path):
    urls = [f"{server.base}/{path}" for path in ("ok/1", "body/broad")]
    before = run(tmp_path, urls)
    listed = tmp_path / "urls.jsonl"
    flags = command(listed, tmp_path / "out", "--max_pixels", "2000000")[3:]
    assert before[1].startswith("image: ") and fetch.main(flags) == 1
    assert fetch.main([*flags, "--retry_failed"]) == 0
    assert outcomes(tmp_path / "out") == ["ok", "ok"]


def test_an_outcome_cut_by_a_kill_is_fetched_again(server, tmp_path):
    """At any byte: of the file of outcomes, any beginning is a good start."""
    urls = [f"{server.base}/{path}" for path in ("ok/1", "status/404/9", "ok/2")]
    run(tmp_path, urls, out="straight")
    straight = contents(tmp_path / "straight")
    partial = tmp_path / "whole"
    with shards.Partial(partial, tmp_path / "none", 3, False) as kept:
        kept.add(1, "http_404: status 404")
        kept.add(0, "", picture(1, "JPEG"))
    whole, first = partial.read_bytes(), len(picture(1, "JPEG"))
    for size in (0, 1, 19, 20, 30, 40, 41, 61, len(whole) - first, len(whole) - 1, len(whole)):
        out = tmp_path / f"cut{size}"
        (out / ".partial").mkdir(parents=True)
        (out / "inputs.json").write_bytes(straight["inputs.json"])
        (out / ".partial/00000").write_bytes(whole[:size])
        server.hits.clear()
        run(tmp_path, urls, out=out.name)
        assert contents(out) == straight
        assert ("/ok/1" in server.hits) == (size < len(whole))
        assert ("/status/404/9" in server.hits) == (size < 40)
    out = tmp_path / "damaged"
    (out / ".partial").mkdir(parents=True)
    (out / "inputs.json").write_bytes(straight["inputs.json"])
    (out / ".partial/00000").write_bytes(whole[:-9] + b"x" + whole[-8:])
    run(tmp_path, urls, out=out.name)
    assert contents(out) == straight


# Runs fetch, killed before the n-th call that changes a file, and then to its end; for every n.
KILLED = """
import itertools, os, pathlib, shutil, signal, sys, threading
from xmc_jax.images import fetch
before, base, *arguments = sys.argv[1:]
CALLS = "open write flush truncate fsync replace unlink rmdir mkdir".split()
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for last in itertools.count(1):
    out, left = f"{base}/{last}", last
    if before:
        shutil.copytree(before, out)
    def profile(frame, event, call):
        global left
        if event == "c_call" and call.__name__ in CALLS:
            owner = call.__self__
            if owner.__name__ in ("posix", "_io") if hasattr(owner, "__name__") else (
                out in str(getattr(owner, "name", ""))
            ):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
    for killed in (True, False):
        child = os.fork()
        if not child:
            if killed:
                threading.setprofile(profile)
                sys.setprofile(profile)
            os._exit(fetch.main([*arguments, "--out", out]))
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), (last, status)
        if killed and not status:
            sys.exit()
        assert killed or not status, last
"""


@pytest.mark.reliability
@pytest.mark.slow
@pytest.mark.parametrize("retry", [False, True])
def test_a_kill_between_any_two_changes_of_files_changes_nothing(server, tmp_path, retry):
    paths = ("ok/1", "status/404/1", "ok/2", "html", "ok/3")
    flags = ["--shard_images", "2", "--concurrency", "1"]
    listed = write_list(tmp_path / "urls.jsonl", [f"{server.base}/{path}" for path in paths])
    before = tmp_path / "before" if retry else ""
    if retry:  # a folder with failures, of which one has gone away since
        assert fetch.main([*command(listed, before)[3:], *flags]) == 0
        flags += ["--retry_failed"]
    server.hits = {"/status/404/1": [0.0]}
    arguments = [str(listed), *QUICK, "--allow_private", "127.0.0.1/32", *flags]
    base = tmp_path / "killed"
    base.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, before, base, "--urls", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    server.hits = {"/status/404/1": [0.0]}
    assert run(tmp_path, [f"{server.base}/{path}" for path in paths], *flags[:4], out="straight")
    straight, runs = contents(tmp_path / "straight"), list(base.iterdir())
    assert len(runs) > 50
    for out in runs:
        assert contents(out) == straight, out.name


@pytest.mark.reliability
@pytest.mark.slow
def test_ten_kills_change_nothing(server, tmp_path):
    generator = np.random.default_rng(0)
    refused = ("status/404/9999", "body/half", "body/huge", "gzip", "loop", "status/429/1", "short")
    paths = [
        refused[generator.integers(len(refused))] if generator.random() < 0.2 else f"ok/{i}"
        for i in range(600)
    ]
    listed = write_list(tmp_path / "urls.jsonl", [f"{server.base}/{path}" for path in paths])
    flags = ("--shard_images", "16", "--concurrency", "8", "--timeout", "20", "--deadline", "60")
    straight = start(listed, tmp_path / "straight", *flags)
    assert straight.wait(60) == 0, straight.stderr.read()
    server.hits.clear()
    counts, first = [], server.requests
    for kill in range(10):
        running = start(listed, tmp_path / "killed", *flags)
        if kill % 5:  # else as it starts
            server.wait_for(server.requests + int(generator.integers(1, 60)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(generator.random() * (0.02 if kill % 5 else 1))
        assert running.poll() is None, "finished before it was killed ten times"
        running.send_signal(signal.SIGKILL)
        running.communicate()
        counts.append(server.requests - first)
    asked = server.requests
    last = start(listed, tmp_path / "killed", *flags)
    assert last.wait(60) == 0, last.stderr.read()
    assert 0 < server.requests - asked < 600  # it went on, where it was
    print(f"killed after {counts} of 600 requests")
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


# Peak of this process alone: that of getrusage begins with what the parent had.
MEASURED = """
import pathlib, re, sys
from xmc_jax.images import fetch
status = fetch.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def heavy_bodies() -> dict[str, bytes]:
    """Files of at most 16 MiB that cost what they can: pixels, scans, segments, comments."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (512, 512, 3), np.uint8))
    large, found, most = noise.resize((8000, 4000)), {}, 1 << 24
    for name, options in (
        ("jpeg", {"format": "JPEG", "quality": 70}),
        ("progressive", {"format": "JPEG", "quality": 70, "progressive": True}),
        ("webp", {"format": "WEBP", "quality": 30, "method": 0}),
    ):
        file = io.BytesIO()
        large.save(file, **options)
        found[name] = file.getvalue()
    file = io.BytesIO()
    Image.new("RGBA", (8000, 4000), (9, 9, 9, 99)).save(file, "PNG", compress_level=1)
    found["alpha"] = file.getvalue()
    found["heavy"] = picture(0, size=(2200, 1900), compress_level=0)
    jpeg, gif, png = picture(1, "JPEG"), picture(1, "GIF"), picture(1)
    found["segments"] = jpeg[:2] + b"\xff\xe0\0\2" * (most // 4 - 999) + jpeg[2:]
    image = gif.index(b",", 13 + 3 * 256)
    comment = b"\x21\xfe" + b"\1x" * (most // 2 - 1999) + b"\0"
    found["comment"] = gif[:image] + comment + gif[image:]
    chunk = struct.pack(">I4sI", 0, b"abCd", zlib.crc32(b"abCd"))
    found["chunks"] = png[:33] + chunk * (most // 12 - 999) + png[33:]
    assert all(len(data) <= most for data in found.values())
    return found


@pytest.mark.reliability
@pytest.mark.slow
def test_memory_and_time_are_bounded_whatever_is_sent(server, tmp_path):
    """Everything a server may do wrong, many of each at a time, and images as large as allowed."""
    server.bodies |= heavy_bodies()
    good = ["jpeg", "progressive", "webp", "alpha", "heavy", "chunks"]
    times = dict.fromkeys(good, 5) | {"chunks": 2, "segments": 5, "comment": 5}
    paths = [*HOSTILITIES] * 5 + [f"body/{name}" for name, n in times.items() for _ in range(n)]
    urls = [f"{server.base}/{path}?{i}" for i, path in enumerate(paths)]
    np.random.default_rng(0).shuffle(urls)
    private = [moved_to(server, f"http://10.0.0.1/{i}") for i in range(9)]
    listed = write_list(tmp_path / "urls.jsonl", urls + private)
    arguments = ["--urls", str(listed), "--out", str(tmp_path / "out")]
    arguments += ["--allow_private", "127.0.0.1/32", "--per_host", "64", "--attempts", "2"]
    arguments += ["--timeout", "5", "--deadline", "120", "--backoff", "0.1", "--max_wait", "1"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = dict(zip(urls + private, outcomes(tmp_path / "out"), strict=True))
    peak = int(done.stdout.splitlines()[-1]) / 1024
    print(f"{len(found)} URLs, {seconds:.0f} s, peak of {peak:.0f} MiB")
    assert peak < 1024 and seconds < 400
    heavy = [url for url in urls if re.search(rf"/body/({'|'.join(good)})\?", url)]
    assert {found[url] for url in heavy} == {"ok"} and len(heavy) == 27
    assert {found[url].partition(": ")[0] for url in private} == {"private"}


def test_ctrl_c_is_one_line_and_130(server, tmp_path):
    server.gate.clear()
    listed = write_list(tmp_path / "urls.jsonl", [f"{server.base}/ok/{i}" for i in range(40)])
    running = start(listed, tmp_path / "out", "--timeout", "30", "--deadline", "60")
    server.wait_for(5)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=20)
    assert running.returncode == 130
    assert error == "fetch: interrupted; run the same command again\n"
    server.gate.set()
    urls = [f"{server.base}/ok/{i}" for i in range(40)]
    assert run(tmp_path, urls) == ["ok"] * 40


def test_two_processes_do_not_share_a_folder(server, tmp_path, capsys):
    server.gate.clear()
    listed = write_list(tmp_path / "urls.jsonl", [f"{server.base}/ok/1"])
    running = start(listed, tmp_path / "out", "--timeout", "30", "--deadline", "60")
    server.wait_for(1)
    assert fetch.main(command(listed, tmp_path / "out")[3:]) == 1
    assert "expected no other process, found process" in capsys.readouterr().err
    server.gate.set()
    assert running.wait(20) == 0


def parquet(path: pathlib.Path, columns: dict) -> pathlib.Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def images_of(path: pathlib.Path, **fields) -> list[tuple[str, int, str]]:
    return list(map(tuple, fetch._images(fetch.FetchConfig(path, "out", **fields))))


def test_lists_of_urls_are_read_alike(tmp_path):
    expected = [("7", 0, "http://a/0"), ("7", 1, "http://a/1"), ("8", 0, "http://b")]
    lines = ['{"id": 7, "url": ["http://a/0", "", "http://a/1"]}', "", '{"id": "9", "url": null}']
    path = tmp_path / "urls.jsonl"
    path.write_text("\n".join([*lines, '{"id": "8", "url": "http://b", "more": 1}']))
    assert images_of(path) == expected
    assert images_of(path, max_images=1) == [expected[0], expected[2]]
    path = tmp_path / "urls.csv"
    path.write_text("url,id\nhttp://a/0,7\nhttp://a/1,7\n,9\nhttp://b,8\n")
    assert images_of(path) == expected
    path = tmp_path / "URLS.TSV.gz"
    table = 'id\turl\n 7 \t["http://a/0", "http://a/1"]\n\t\n9\t\n8\thttp://b\n'
    path.write_bytes(gzip.compress(table.encode("utf-16")))
    assert images_of(path) == expected
    path = tmp_path / "urls.parquet"
    lists = [["http://a/0", "http://a/1"], None, ["http://b"]]
    assert images_of(parquet(path, {"id": ["7", "9", "8"], "url": lists})) == expected
    flat = {"asin": [7, 7, 9, 8], "image": ["http://a/0", "http://a/1", None, "http://b"]}
    assert images_of(parquet(path, flat), id_column="asin", url_column="image") == expected


@pytest.mark.parametrize(
    "name, text, expected",
    [
        (
            "urls.jsonl",
            '{"id": 1, "url": "http://a"}\n{"id": 1',
            "urls.jsonl:2: expected a JSON object",
        ),
        ("urls.jsonl", "[1]", "urls.jsonl:1: expected '{' of a list of objects, found"),
        ("urls.jsonl", '{"id": 1}', "urls.jsonl: expected a column 'url', found id"),
        ("urls.jsonl", '{"id": null, "url": "http://a"}', "urls.jsonl:1: column id: expected "),
        ("urls.jsonl", '{"id": true, "url": "http://a"}', "urls.jsonl:1: column id: expected "),
        (
            "urls.jsonl",
            '{"id": "\\ud800", "url": "http://a"}',
            "urls.jsonl:1: column id: expected ",
        ),
        ("urls.jsonl", '{"id": 1, "url": [3]}', "urls.jsonl:1: column url: expected a URL"),
        ("urls.jsonl", '{"id": 1, "url": {"a": 1}}', "urls.jsonl:1: column url: expected a URL"),
        ("urls.jsonl", b"\xff\xff", "urls.jsonl:1: expected UTF-8, found byte 0xff"),
        ("urls.jsonl", '{"id":' + "[" * 99999, "urls.jsonl:1: expected a JSON object"),
        ("urls.csv", "id\n1\n", "urls.csv: expected a column 'url', found id"),
        ("urls.csv", 'id,url\n1,"x', "urls.csv:2: expected CSV, found a quote"),
        ("urls.csv", "id,url\n1,http://a\n2,http://b\n1,http://c\n", "rows of one id to follow"),
        ("urls.csv", "", "urls.csv: expected a column 'id', found none"),
        ("urls.parquet", "PAR1 not really PAR1", "urls.parquet: expected a Parquet file"),
        ("urls.xlsx", "", "urls.xlsx: expected a name ending in"),
        ("absent.csv", None, "no such file"),
        ("absent.parquet", None, "no such file"),
    ],
)
def test_bad_lists_get_one_line(tmp_path, capsys, name, text, expected):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert fetch.main(["--urls", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fetch: ") and expected in error


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--concurrency", "0"], "concurrency: expected at least 1, got 0"),
        (["--timeout", "nan"], "timeout: expected a finite number"),
        (["--attempts", "0"], "attempts: expected at least 1"),
        (["--allow_private", "lan"], "not a valid IPv4 or IPv6 network"),
        (["--max_pixels", "999999999"], "max_pixels: expected at least 1 and at most"),
        (["--user_agent", "a\r\nb: c"], "user_agent: String should match"),
        (["--max_byte", "1"], "unrecognized arguments"),
        (["--max_bytes", "many"], "expected a whole number, such as 1000"),
    ],
)
def test_bad_flags_get_one_line(tmp_path, capsys, flags, expected):
    assert fetch.main(["--urls", "u.csv", "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fetch: ") and expected in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_list_is_refused(server, tmp_path, capsys):
    urls = [f"{server.base}/ok/1"]
    run(tmp_path, urls)
    listed = write_list(tmp_path / "other.jsonl", urls * 2)
    assert fetch.main(command(listed, tmp_path / "out")[3:]) == 1
    assert "expected to have been fetched with urls" in capsys.readouterr().err
    listed = tmp_path / "urls.jsonl"
    for flags in (("--shard_images", "3"), ("--max_bytes", "1000"), ("--max_images", "1")):
        assert fetch.main(command(listed, tmp_path / "out", *flags)[3:]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "out/inputs.json").unlink()
    assert fetch.main(command(listed, tmp_path / "out")[3:]) == 1
    assert "images without inputs.json" in capsys.readouterr().err


def test_an_empty_list_makes_an_empty_report(tmp_path):
    assert run(tmp_path, [None, []]) == []
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["images"] == 0 and report["outcomes"] == {}


def test_a_full_disk_is_one_line(server, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    listed = write_list(tmp_path / "urls.jsonl", [f"{server.base}/ok/{i}" for i in range(5)])
    assert fetch.main(command(listed, tmp_path / "out")[3:]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("fetch: no space left on device")
    monkeypatch.undo()
    assert fetch.main(command(listed, tmp_path / "out")[3:]) == 0
    assert server.requests == 5  # nothing was lost
