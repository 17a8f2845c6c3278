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
import hashlib
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
from xmc_jax.images.download import Downloader, Failure
from xmc_jax.images.settings import FetchConfig, add_flags, from_flags
from xmc_jax.runtime import command
from xmc_jax.runtime.wording import counted

FORMAT = 1
_OPEN_SHARDS = 16  # the slowest URL holds up no others until this many are waiting for theirs
_HOSTS = 100  # listed in the report
_THREADS = 4  # that decode what was downloaded
# Images up to here are decoded side by side, larger ones singly. Bytes count too: of some formats'
# headers Pillow makes objects fifty times as large.
_SMALL_PIXELS, _SMALL_BYTES = 1 << 21, 1 << 20


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
    add_flags(parser, FetchConfig)
    return from_flags(FetchConfig, vars(parser.parse_args(arguments)))


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
            "allow_private": [str(network) for network in config.limits.allow_private],
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
            _count_done(bar, len(partial.outcomes))
            async with asyncio.TaskGroup() as group:
                for row, image in enumerate(rows):
                    if row not in partial.outcomes:
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
        self._full = decoding.DecodeLimits(most, config.max_pixels)
        self._small = decoding.DecodeLimits(
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
