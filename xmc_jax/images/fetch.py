"""Image URLs to a folder of images: `python -m xmc_jax.images.fetch --help`.

Bounded in memory, time, bytes, pixels and connections, whatever the servers do (`download.py`), and
restartable: killed at any moment, the same command goes on after the last image it had. What it
writes follows from the list of URLs and what the servers answer, not from the order of the answers:

    images/00000.parquet, ...   id, k, bytes, error; one row per URL, in the list's order: the k-th
                                image of an item, or null and "<kind>: <reason>". `sources` reads
                                this folder
    failures.jsonl              what failed and why, likewise in order
    report.json                 counts by outcome and host; written last
    inputs.json                 what all this follows from

Outcomes wait in `.partial/`, one file per open shard, until the shard is whole. A URL that failed
after its retries is recorded and not asked for again, except with --retry_failed.
"""

import array
import asyncio
import collections
import dataclasses
import hashlib
import ipaddress
import json
import os
import pathlib
import shutil
import sys
import urllib.parse
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import tqdm

from xmc_jax.data.tables import cell_values, table_files
from xmc_jax.files import atomic, json_files, locks
from xmc_jax.images import decoding, shards
from xmc_jax.images.download import Downloader, Failure, Limits
from xmc_jax.runtime import command
from xmc_jax.runtime.wording import counted

FORMAT = 1
_USER_AGENT = "xmc_jax.images.fetch"
_OPEN_SHARDS = 16  # the slowest URL holds up no others until this many are waiting for theirs
_HOSTS = 100  # listed in the report
_THREADS = 4  # that decode what was downloaded
# Images up to here are decoded side by side, larger ones singly. Bytes count too: of some formats'
# headers Pillow makes objects fifty times as large.
_SMALL_PIXELS, _SMALL_BYTES = 1 << 21, 1 << 20


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """What to fetch, and how.

    Attributes:
        urls: a file, see `record_files`; a row has an id and a URL, none, or a list of them. Rows
            of one id that follow each other are one item.
        out: the folder to write.
        limits: of each URL.
        max_pixels: of an image; see `images.Limits`.
        concurrency: downloads at a time.
        per_host: of those, from one host.
        id_column: name of the ids' column.
        url_column: name of the URLs' column.
        max_images: the first so many of an item are fetched; 0 for all.
        shard_images: rows per Parquet file.
        user_agent: what the servers are told.
        retry_failed: ask again for what failed in an earlier run.
    """

    urls: str | pathlib.Path
    out: str | pathlib.Path
    limits: Limits = dataclasses.field(default_factory=Limits)
    max_pixels: int = decoding.Limits.max_pixels
    concurrency: int = 64
    per_host: int = 32
    id_column: str = "id"
    url_column: str = "url"
    max_images: int = 0
    shard_images: int = 1024
    user_agent: str = _USER_AGENT
    retry_failed: bool = False

    def __post_init__(self):
        agent = self.user_agent
        for field, fits, expected in (
            ("concurrency", 1 <= self.concurrency <= 1024, "1 to 1024"),
            ("per_host", self.per_host >= 1, "1 or more"),
            ("max_images", self.max_images >= 0, "0 or more"),
            ("shard_images", 1 <= self.shard_images <= 1 << 16, "1 to 65536"),
            ("user_agent", agent.isascii() and agent.isprintable(), "printable ASCII"),
        ):
            if not fits:
                raise ValueError(f"{field}: expected {expected}, got {getattr(self, field)!r}")
        if self.limits.max_bytes > 1 << 28:
            raise ValueError(f"max_bytes: expected at most 2^28, got {self.limits.max_bytes}")
        decoding.Limits(self.limits.max_bytes, self.max_pixels)


def fetch(config: FetchConfig) -> dict[str, Any]:
    """Fetches what is not there yet.

    Returns:
        The report: report.json, parsed.

    Raises:
        ValueError: a bad list of URLs, a folder made from another one or with other limits, or
            another process at work in the folder.
        OSError: a file that cannot be read or written.
    """
    inputs = _inputs(config)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with locks.locked(out / ".lock", str(out), remove=True):
        _check_same(out, inputs, config)
        if (out / "report.json").exists():
            if not config.retry_failed:
                return json.loads((out / "report.json").read_text())
            (out / "report.json").unlink()
        atomic.write(out / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        partial = out / ".partial"
        for folder in (partial, out / "images"):
            folder.mkdir(exist_ok=True)
        with (
            tqdm.tqdm(total=inputs["images"], desc="fetching", unit="image", disable=None) as bar,
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd images; they may be many
            try:
                asyncio.run(_fetch(config, out, bar))
            except BaseExceptionGroup as group:
                raise _first(group) from None
        result = _report(config, out, inputs)
        shutil.rmtree(partial)
        atomic.write(out / "report.json", json.dumps(result, indent=1) + "\n")
    return result


def summary(out: str | pathlib.Path, result: dict[str, Any]) -> str:
    """A few lines on a report: how many images there are, how many URLs failed and of what."""
    fetched = counted(result["outcomes"].get("ok", 0), "image")
    lines = [f"{out}: {fetched} of {counted(result['images'], 'URL')}"]
    failed = {kind: count for kind, count in result["outcomes"].items() if kind != "ok"}
    if failed:
        lines.append("  failed  " + "  ".join(f"{k} {v:,}" for k, v in failed.items()))
        lines.append(f"  why: {pathlib.Path(out) / 'failures.jsonl'}; again: --retry_failed")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run(
        "fetch",
        lambda: _parse(arguments),
        lambda config: print(summary(config.out, fetch(config))),
    )


def _parse(arguments: list[str] | None) -> FetchConfig:
    parser = command.Parser(prog="python -m xmc_jax.images.fetch", allow_abbrev=False)
    add = parser.add_argument
    add("--urls", required=True, help="a .parquet, .jsonl or .csv file of ids and image URLs")
    add("--out", required=True, help="the folder to write, or to go on with")
    for flag, kind, default, text in (
        ("concurrency", int, FetchConfig.concurrency, "downloads at a time"),
        ("per_host", int, FetchConfig.per_host, "of those, from one host"),
        ("id_column", str, "id", "name of the ids' column"),
        ("url_column", str, "url", "name of the URLs' column"),
        ("max_images", int, 0, "the first so many of an item; 0 for all"),
        ("shard_images", int, FetchConfig.shard_images, "rows per Parquet file"),
        ("user_agent", str, _USER_AGENT, "what the servers are told"),
        ("max_pixels", int, FetchConfig.max_pixels, "of an image; no larger one is decoded"),
    ):
        add(f"--{flag}", type=kind, default=default, help=f"{text} (default {default})")
    limits = (
        ("max_bytes", int, "of an image file"),
        ("max_redirects", int, "per attempt"),
        ("timeout", float, "seconds to connect, and between two pieces of an answer"),
        ("deadline", float, "seconds for one URL, retries and their waits included"),
        ("min_rate", float, "bytes per second of an answer, after the first timeout"),
        ("attempts", int, "per URL; network errors, 408, 425, 429 and 5xx are retried"),
        ("backoff", float, "seconds before the second attempt; then doubled"),
        ("max_wait", float, "seconds; longer waits, Retry-After's too, are cut to it"),
    )
    for flag, kind, text in limits:
        default = getattr(Limits, flag)
        add(f"--{flag}", type=kind, default=default, help=f"{text} (default {default})")
    add(
        "--allow_private",
        nargs="*",
        metavar="NETWORK",
        help="connect to these networks too, such as 10.0.0.0/8; none named: to any address",
    )
    add("--retry_failed", action="store_true", help="ask again for what failed before")
    fields = vars(parser.parse_args(arguments))
    networks = fields.pop("allow_private")
    if networks == []:
        networks = ["0.0.0.0/0", "::/0"]
    allowed = tuple(ipaddress.ip_network(network) for network in networks or ())
    rules = {flag: fields.pop(flag) for flag, *_ in limits}
    return FetchConfig(**fields, limits=Limits(**rules, allowed=allowed))


def _inputs(config: FetchConfig) -> dict[str, Any]:
    """All that the folder's contents follow from, but for the servers; reads the whole list."""
    digest = hashlib.sha256()
    with open(config.urls, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    count, previous, hashes = 0, None, array.array("q")
    for image in _images(config):
        count += 1
        if image.id != previous:
            previous = image.id
            hashes.append(hash(image.id))
    if len(np.unique(np.frombuffer(hashes, np.int64))) < len(hashes):
        raise ValueError(
            f"{config.urls}: expected the rows of one id to follow each other, found an id again "
            f"after others; sort the file by {config.id_column}"
        )
    return {
        "format": FORMAT,
        "urls": digest.hexdigest(),
        "images": count,
        "id_column": config.id_column,
        "url_column": config.url_column,
        "max_images": config.max_images,
        "shard_images": config.shard_images,
        "limits": {
            "max_bytes": config.limits.max_bytes,
            "max_pixels": config.max_pixels,
            "max_redirects": config.limits.max_redirects,
            "allow_private": [str(network) for network in config.limits.allowed],
        },
    }


def _check_same(out: pathlib.Path, inputs: dict[str, Any], config: FetchConfig) -> None:
    path = out / "inputs.json"
    if not path.exists():
        if any(out.glob("images/*.parquet")):
            raise ValueError(f"{out}: images without {path.name}; choose another --out")
        return
    try:
        recorded = json_files.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; choose another --out") from None
    for field, value in inputs.items():
        if recorded.get(field) == value or (field == "limits" and config.retry_failed):
            continue
        remedy = ", or add --retry_failed" if field == "limits" else ""
        raise ValueError(
            f"{out}: expected to have been fetched with {field} {value}, found "
            f"{recorded.get(field)}; choose another --out{remedy}"
        )


def _images(config: FetchConfig) -> Iterator[shards.Image]:
    """The list of URLs, one by one, in order.

    Raises:
        ValueError: in one line, with the place in the file.
    """
    path, names = pathlib.Path(config.urls), [config.id_column, config.url_column]
    table = table_files.open_table(path)
    for name in names:
        if name not in table.columns:
            raise ValueError(
                f"{path}: expected a column {name!r}, found {', '.join(table.columns) or 'none'}; "
                "name it with --id_column and --url_column"
            )
    previous, k = None, 0
    for place, (key, cell) in table.rows(names):
        column = config.id_column
        try:
            identity = cell_values.identifier(key)
            column = config.url_column
            urls = cell_values.listed(cell, "")
            if bad := [url for url in urls if not (url is None or isinstance(url, str))]:
                raise ValueError(f"expected a URL or a list of them, found {bad[0]!r:.80}")
        except ValueError as error:
            raise ValueError(f"{table.at(place)}: column {column}: {error}") from None
        k = k if identity == previous else 0
        previous = identity
        for url in urls:
            if url and url.strip() and (k < config.max_images or not config.max_images):
                yield shards.Image(identity, k, url)
                k += 1


async def _fetch(config: FetchConfig, out: pathlib.Path, bar: tqdm.tqdm) -> None:
    """Fetches and writes every shard that is missing; with retry_failed, those with failures."""
    open_shards, writing = asyncio.Semaphore(_OPEN_SHARDS), asyncio.Lock()
    check = _Check(config)
    executor = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))

    async def fill(path: pathlib.Path, rows: list[shards.Image]) -> None:
        partial_path = out / ".partial" / path.stem
        with shards.Partial(partial_path, path, len(rows), config.retry_failed) as partial:
            _count_done(bar, len(partial.done))
            async with asyncio.TaskGroup() as group:
                for row, image in enumerate(rows):
                    if row not in partial.done:
                        group.create_task(one(partial, row, image.url))
            async with writing:  # one at a time, for the memory it takes
                await asyncio.to_thread(shards.write, path, rows, partial)
        partial_path.unlink()
        open_shards.release()

    async def one(partial: shards.Partial, row: int, url: str) -> None:
        def keep(body: BinaryIO) -> None:
            data = body.read()
            check(data)
            partial.add(row, "", data)

        try:
            await downloader.download(url, keep)
        except Failure as failure:
            partial.add(row, str(failure))
        bar.update()

    agent, folder = config.user_agent, str(out / ".partial")
    try:
        async with (
            Downloader(
                config.limits, config.concurrency, config.per_host, agent, executor, folder
            ) as downloader,
            asyncio.TaskGroup() as group,
        ):
            for number, rows in enumerate(_blocks(config)):
                path = _shard(out, number)
                if path.exists() and not (config.retry_failed and shards.has_failures(path)):
                    _count_done(bar, len(rows))
                    continue
                await open_shards.acquire()
                group.create_task(fill(path, rows))
    finally:
        executor.shutdown(cancel_futures=True)


def _shard(out: pathlib.Path, number: int) -> pathlib.Path:
    return out / "images" / f"{number:05}.parquet"


def _blocks(config: FetchConfig) -> Iterator[list[shards.Image]]:
    rows = []
    for image in _images(config):
        rows.append(image)
        if len(rows) == config.shard_images:
            yield rows
            rows = []
    if rows:
        yield rows


def _count_done(bar: tqdm.tqdm, count: int) -> None:
    """Moves the bar by what was there before, without a claim that it was fast."""
    if not bar.disable:
        bar.initial += count
        bar.update(count)


class _Check:
    """Decodes images and forgets them: what passes here is whole, and within the limits."""

    def __init__(self, config: FetchConfig):
        most = config.limits.max_bytes
        self._full = decoding.Limits(most, config.max_pixels)
        self._small = decoding.Limits(
            min(most, _SMALL_BYTES), min(config.max_pixels, _SMALL_PIXELS)
        )
        self._large = ThreadPoolExecutor(1)  # one thread: allocators keep memory for each

    def __call__(self, data: bytes) -> None:
        try:
            try:
                decoding.decode(data, self._small)
            except decoding.TooLarge:
                self._large.submit(decoding.decode, data, self._full).result().close()
        except ValueError as error:
            raise Failure("image", str(error).removeprefix("image: ")) from None


def _report(config: FetchConfig, out: pathlib.Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Writes failures.jsonl; both it and the report are made from the list and the shards alone."""
    outcomes, hosts = collections.Counter(), collections.Counter()
    with atomic.replaced(out / "failures.jsonl") as failures:
        for number, rows in enumerate(_blocks(config)):
            path = _shard(out, number)
            keys, errors = shards.read(path)
            if keys != [(image.id, image.k) for image in rows]:
                raise ValueError(f"{path}: not of {config.urls}; remove it and run again")
            for image, error in zip(rows, errors):
                kind, _, reason = (error or "ok").partition(": ")
                outcomes[kind] += 1
                hosts[_host(image.url), kind] += 1
                if error:
                    line = image._asdict() | {"outcome": kind, "reason": reason}
                    failures.write(json.dumps(line).encode() + b"\n")
    totals = collections.Counter()
    for (host, _), count in hosts.items():
        totals[host] += count
    listed = sorted(totals, key=lambda host: (-totals[host], host))[:_HOSTS]
    by_host = {host: collections.Counter() for host in listed}
    others = collections.Counter()
    for (host, kind), count in hosts.items():
        by_host.get(host, others)[kind] += count
    return {
        "inputs": inputs,
        "images": inputs["images"],
        "outcomes": dict(sorted(outcomes.items())),
        "hosts": {host: dict(sorted(counts.items())) for host, counts in by_host.items()},
        "other_hosts": {"hosts": len(totals) - len(listed), **dict(sorted(others.items()))},
    }


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url.strip()).hostname or ""
    except ValueError:
        return ""


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
