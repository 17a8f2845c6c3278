"""A small exported model, and a server in a thread: `import served` in any test."""

import asyncio
import contextlib
import dataclasses
import gzip
import http.client
import json
import pathlib
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from xmc_jax.config import AugmentedConfig, ServeConfig
from xmc_jax.data import texts
from xmc_jax.data.types import Prompts
from xmc_jax.files.digests import sha256
from xmc_jax.shipping import artifact, contents, packed_thumbnails, query_encoder

CONFIG = ServeConfig(
    port=0, max_batch=8, max_k=10, max_queries=4, max_exclude=40, max_only=20, max_text=200,
    max_body=100_000, max_held=1_000_000, queue=64, show_documents=True,
)  # fmt: skip


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The items of a raw file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def described(
    files: Mapping[str, str],
    width: int,
    max_length: int,
    images: contents.ImageInput | None = None,
) -> contents.ModelInput:
    """What a small encoder takes; `files` are its own, by digest."""
    return contents.ModelInput(
        digest=contents.digest_of_model(files),
        width=width,
        max_length=max_length,
        special_tokens=True,
        prompts=Prompts(),
        pooling="mean",
        compute_dtype="float32",
        order="image_text",
        positions="contiguous",
        text="title",
        images=images,
    )


def write(
    folder: pathlib.Path,
    labels: list[dict[str, Any]],
    documents: list[dict[str, Any]],
    name: str = "topics",
    images: contents.ImageInput | None = None,
    pictures: Mapping[str, Mapping[str, bytes]] | None = None,
) -> None:
    """Makes an encoder's folder an artifact.

    Args:
        folder: has the encoder.
        labels: "uid" and "title" of each.
        documents: likewise, and "target_ind".
        name: of the run.
        images: what the encoder takes.
        pictures: files of "labels" and "documents" by their ids.
    """
    files = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    model = described(files, 32, 16, images)
    content = {
        "name": name,
        "step": 0,
        "config": {"data": {"data_dir": "/home/somebody/data"}},  # as folders had it once
        "created": "2026-11-27T00:00:00+00:00",
        "dataset": {"name": name.title()},
        "model": dataclasses.asdict(model),
        "metrics": {"plain": {"P@1": 0.25}, "augmented": {"P@1": 0.5}},
        "prototypes": None,
        "index": None,
        "thumbnails": None,
        "ranking": dataclasses.asdict(AugmentedConfig(labels=20, documents=20)),
    }
    items_of = {"labels": labels, "documents": documents}
    for kind, items in items_of.items():
        (folder / kind).mkdir()
        texts.save(folder / kind, "ids", [item["uid"] for item in items])
        texts.save(folder / kind, "texts", [item["title"] for item in items])
        np.save(folder / kind / "embeddings.npy", np.zeros((len(items), 32), np.float32))
        content[kind] = {"folder": kind, "count": len(items), "model": model.digest}
    pairs = [item["target_ind"] for item in documents]
    flat = np.concatenate(pairs).astype(np.int32)
    np.save(folder / "labels" / "frequency.npy", np.bincount(flat, minlength=len(labels)))
    indptr = np.cumsum([0, *map(len, pairs)]).astype(np.int64)
    np.save(folder / "documents" / "positives.indptr.npy", indptr)
    np.save(folder / "documents" / "positives.indices.npy", flat)
    pictures = pictures or {"labels": {}, "documents": {}}
    if any(pictures.values()):
        (folder / "thumbnails").mkdir()
        counts = {
            kind: packed_thumbnails.save(folder / "thumbnails", kind, _small(pictures[kind]))
            for kind in pictures
        }
        content["thumbnails"] = {"folder": "thumbnails"} | counts
    contents.write_manifest(folder, content)
    encoder = query_encoder.QueryEncoder(artifact.open(folder, verify=False))
    for kind, items in items_of.items():
        files = [pictures[kind].get(item["uid"]) for item in items]
        asked = [
            query_encoder.Item(item["title"], [file] if file and images else [])
            for item, file in zip(items, files)
        ]
        np.save(folder / kind / "embeddings.npy", encoder.encode(asked, rows=(8,)))
    contents.write_manifest(folder, content)


def _small(files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    from xmc_jax.images import decoding

    for uid, file in files.items():
        yield uid, decoding.thumbnail(decoding.decode(file), 96)


class Served:
    """A server in a thread of this process.

    Attributes:
        service: see `Service`.
        predictor: that answers.
        port: where it listens.
    """

    def __init__(self, predictor: Any, config: ServeConfig):
        import uvicorn

        from xmc_jax.shipping.serve import server
        from xmc_jax.shipping.serve.service import Service

        self.predictor = predictor
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.service = Service(config)
        self._server = uvicorn.Server(server.settings(self.service))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(120)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.service.serve(self.predictor)
        self._ready.set()
        await self._server.serve([self._socket])
        await self.service.close()

    def call(self, coroutine: Any) -> Any:
        """What a coroutine returns, in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def close(self) -> None:
        """Ends it."""
        self._server.should_exit = True
        self._thread.join(60)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; a body that is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers = {"content-type": "application/json"} | headers
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 60)) as client:
            client.request(method, path, body, headers)
            answer = client.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, names, answer.read()

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        status, _, answer = self.ask("POST", path, body)
        return status, json.loads(answer)
