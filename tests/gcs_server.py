"""A Cloud Storage bucket on 127.0.0.1, for gcsfs, TensorStore and google-cloud-storage as they are.

Objects are written whole and read whole or by range. What an object store cannot do, or does by
copying, is refused with 501 and noted in `refused`: appending (compose), renaming and copying.
"""

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

BUCKET = "bucket"
_PAGE = 50  # entries of a listing; few, so that clients have to turn pages


class Object(NamedTuple):
    """An object as it is stored."""

    data: bytes
    generation: int


class Server(http.server.ThreadingHTTPServer):
    """Serves one bucket from a thread of this process; a context manager.

    Attributes:
        objects: name -> what is stored.
        written: names of all objects written up to now, in order, replaced ones again.
        read: name -> bytes of it sent up to now.
        refused: requests for what object stores cannot do.
        before_write: called with an object's name before it is stored, in the request's thread.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Object] = {}
        self.written: list[str] = []
        self.read: dict[str, int] = {}
        self.refused: list[str] = []
        self.before_write: Callable[[str], None] = lambda name: None
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """Environment variables that lead every client here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore: look for no other
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for a bucket's kind over gRPC
            "NO_GCE_CHECK": "true",
            "CLOUDSDK_CONFIG": "/nonexistent",
            "GOOGLE_CLOUD_PROJECT": "project",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Names of the objects that begin so, sorted."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one write
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._request()
        if path == f"/storage/v1/b/{BUCKET}":
            self._json(200, {"kind": "storage#bucket", "id": BUCKET, "name": BUCKET})
        elif path == f"/storage/v1/b/{BUCKET}/o":
            self._list(query)
        elif name := self._object(path):
            self._get(name, query, media=query.get("alt") == "media")
        else:
            self._error(404, f"No such bucket or path: {path}")

    def do_DELETE(self) -> None:
        path, query = self._request()
        if "upload_id" in query:
            self.server.uploads.pop(query["upload_id"], None)
            self._respond(499)
        elif name := self._object(path):
            with self.server.lock:
                found = self.server.objects.get(name)
                if found is not None and self._matches(found, query):
                    del self.server.objects[name]
                    found = True
            if found is None:
                self._error(404, f"No such object: {BUCKET}/{name}")
            elif found is True:
                self._respond(204)
            else:
                self._error(412, "conditionNotMet")
        else:
            self._refuse(path)

    def do_POST(self) -> None:
        path, query = self._request()
        if path != f"/upload/storage/v1/b/{BUCKET}/o":
            self._refuse(path)
        elif "upload_id" in query:
            self._continue_upload(query)
        elif query["uploadType"] == "media":
            self._store(query["name"], self.body, query)
        elif query["uploadType"] == "multipart":
            named = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            boundary = b"--" + named[1].encode()
            _, first, second = self.body.split(boundary, 2)
            metadata = json.loads(first.strip().split(b"\n\n", 1)[1])
            # A line break stands before the boundary that closes the data.
            second = second[: second.rindex(boundary + b"--") - 1]
            self._store(metadata["name"], second.lstrip().split(b"\n\n", 1)[1], query)
        else:
            identity = str(next(self.server.numbers))
            self.server.uploads[identity] = (query["name"], bytearray())
            there = urllib.parse.urlencode({"uploadType": "resumable", "upload_id": identity})
            self._respond(200, b"", Location=f"{self.server.url}{path}?{there}")

    def do_PUT(self) -> None:
        path, query = self._request()
        if "upload_id" in query:
            self._continue_upload(query)
        else:
            self._refuse(path)

    def do_PATCH(self) -> None:
        self._refuse(self._request()[0])

    def _request(self) -> tuple[str, dict[str, str]]:
        """Path, still quoted, and query; reads the body."""
        parts = urllib.parse.urlsplit(self.path)
        self.body = self._body()
        return parts.path, dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _object(self, path: str) -> str | None:
        found = re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)", path)
        return found and urllib.parse.unquote(found[1])

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries: dict[str, dict | None] = {}  # name or prefix -> metadata of an object
        with self.server.lock:
            for name in sorted(self.server.objects):
                rest = name.removeprefix(prefix)
                if (
                    not name.startswith(prefix)
                    or name < query.get("startOffset", "")
                    or ("endOffset" in query and name >= query["endOffset"])
                ):
                    continue
                if delimiter and delimiter in rest:
                    entries[prefix + rest[: rest.index(delimiter) + 1]] = None
                else:
                    entries[name] = self._metadata(name)
        after = [name for name in sorted(entries) if name > query.get("pageToken", "")]
        page = after[: min(int(query.get("maxResults", _PAGE)), _PAGE)]
        content = {
            "kind": "storage#objects",
            "items": [entries[name] for name in page if entries[name]],
            "prefixes": [name for name in page if not entries[name]],
        }
        if len(page) < len(after):
            content["nextPageToken"] = page[-1]
        self._json(200, {key: value for key, value in content.items() if value})

    def _get(self, name: str, query: dict[str, str], media: bool) -> None:
        with self.server.lock:
            found = self.server.objects.get(name)
            metadata = found and self._metadata(name)
        if found is None:
            self._error(404, f"No such object: {BUCKET}/{name}")
        elif not self._matches(found, query):
            self._error(412, "conditionNotMet")
        elif query.get("ifGenerationNotMatch") == str(found.generation):
            self._respond(304)
        elif not media:
            self._json(200, metadata)
        else:
            self._send(name, found)

    def _send(self, name: str, found: Object) -> None:
        data, status, headers = found.data, 200, {"X-Goog-Generation": str(found.generation)}
        if asked := self.headers.get("Range"):
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                self._error(416, "Requested range not satisfiable")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        with self.server.lock:
            self.server.read[name] = self.server.read.get(name, 0) + len(data)
        self._respond(status, data, **headers)

    def _continue_upload(self, query: dict[str, str]) -> None:
        name, data = self.server.uploads[query["upload_id"]]
        start, total = re.fullmatch(
            r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]
        ).groups()
        if start is not None and int(start) != len(data):
            self._error(400, "a chunk does not follow the one before")
            return
        data += self.body
        if total == str(len(data)):
            del self.server.uploads[query["upload_id"]]
            self._store(name, bytes(data), query)
        else:
            self._respond(308, b"", Range=f"bytes=0-{len(data) - 1}")

    def _store(self, name: str, data: bytes, query: dict[str, str]) -> None:
        self.server.before_write(name)
        with self.server.lock:
            if not self._matches(self.server.objects.get(name), query):
                self._error(412, "conditionNotMet")
                return
            self.server.objects[name] = Object(data, next(self.server.numbers))
            self.server.written.append(name)
            metadata = self._metadata(name)
        self._json(200, metadata)

    def _matches(self, found: Object | None, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted) == (found.generation if found else 0)

    def _metadata(self, name: str) -> dict[str, str]:
        found = self.server.objects[name]
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{found.generation}",
            "name": name,
            "bucket": BUCKET,
            "generation": str(found.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "size": str(len(found.data)),
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "timeCreated": time,
            "updated": time,
        }

    def _refuse(self, path: str) -> None:
        self.server.refused.append(f"{self.command} {path}")
        self._error(501, f"{self.command} {path}: refused")

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"code": status, "message": message}})

    def _json(self, status: int, content: dict) -> None:
        self._respond(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _respond(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
