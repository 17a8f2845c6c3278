"""Images to an image folder, one vector each: `python -m xmc_jax.images.embed --help`.

What lies at the source says what is done: embeddings that others have published are imported,
unless another encoder than the default is named; a table of URLs is fetched first (into
`<data_dir>/<dataset>/fetched-<name>/`); and whatever else `sources` reads is decoded and encoded.
The result is `<data_dir>/<dataset>/images-<name>/`, see `xmc_jax.data.image_vectors`, and beside
its arrays

    failures.jsonl    split, item, uid, k and reason of each image that could not be read

Restartable: killed at any moment, the same command goes on where it was, and the result is the same
byte for byte. A finished folder is left as it is while the images are the same; see `changes`.
"""

import collections
import dataclasses
import ipaddress
import itertools
import json
import operator
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from xmc_jax.data import bundled, image_import, image_writer, raw_folder
from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data.known import KNOWN
from xmc_jax.data.store import SPLITS
from xmc_jax.data.tables import table_files
from xmc_jax.files import atomic, json_files
from xmc_jax.files.digests import sha256
from xmc_jax.images import changes, decoding, descriptor, download, encoders, fetch, image_sources
from xmc_jax.images.changes import Changes
from xmc_jax.images.encoders import Encoder
from xmc_jax.images.image_sources import Place, Source
from xmc_jax.runtime import command
from xmc_jax.runtime.wording import counted

BUNDLED = "bundled"
"""What --raw calls the raw files that come with the package."""

ENCODER = "google/siglip2-so400m-patch14-384"
"""What encodes, unless told otherwise; and what published embeddings stand for."""

_THREADS = 32  # that decode, at most; Pillow lets go of the interpreter meanwhile
_SMALL_PIXELS = 1 << 22  # images up to here are decoded side by side, larger ones singly
_AHEAD_BATCHES = 2  # images read before they are due
_AHEAD_BYTES = 256 << 20  # of those, encoded
_BATCH_ITEMS = 1 << 12  # most items of a batch; those without images take no room in it


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how they become vectors.

    Attributes:
        dataset: its name.
        data_dir: where dataset folders go.
        name: of the image folder; the result is `<data_dir>/<dataset>/images-<name>`.
        source: what `sources.open` reads, a table of URLs, or a folder of published embeddings.
        encoder: ENCODER, in whose place published embeddings are taken where the source has some;
            `descriptor.NAME`, a folder, or another name on the hub.
        revision: of the encoder on the hub.
        processor: another preprocessor_config.json than the encoder's, or its folder.
        per_item: K, the first so many images of an item are encoded.
        layout: "pad" or "stretch"; see `encoders`.
        alpha: "white" or "drop"; see `images.decode`.
        batch_size: images per call, over all devices.
        dtype: of the encoder's products, "bfloat16" or "float32".
        by: what image files are named by, "uid" or "index".
        allow_paths: whether paths in a table of images may lead out of the table's folder.
        allow_private: networks that are fetched from although they are not public.
        overwrite: replace a folder that was made from other inputs or is damaged.

    Source: ViXML supp. A and reference code: siglip2-so400m-patch14-384, three images, padded.
    """

    dataset: str
    data_dir: str | pathlib.Path
    name: str
    source: str | pathlib.Path
    encoder: str = ENCODER
    revision: str | None = None
    processor: str | None = None
    per_item: int = 3
    layout: str = "pad"
    alpha: str = "white"
    batch_size: int = 64
    dtype: str = "bfloat16"
    by: str = "uid"
    allow_paths: bool = False
    allow_private: tuple[str, ...] = ()
    overwrite: bool = False

    def __post_init__(self):
        for field, fits, expected in (
            ("per_item", self.per_item >= 1, "1 or more"),
            ("batch_size", self.batch_size >= self.per_item, f"at least {self.per_item} images"),
            ("layout", self.layout in encoders.LAYOUTS, f"one of {encoders.LAYOUTS}"),
            ("alpha", self.alpha in decoding.ALPHA, f"one of {decoding.ALPHA}"),
            ("dtype", self.dtype in encoders.DTYPES, f"one of {encoders.DTYPES}"),
            ("by", self.by in ("uid", "index"), "uid or index"),
        ):
            if not fits:
                raise ValueError(f"{field}: expected {expected}, got {getattr(self, field)!r}")
        for network in self.allow_private:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allow_private: expected networks: {error}") from None
        image_folders.path(self.data_dir, self.dataset, self.name)

    @property
    def folder(self) -> pathlib.Path:
        """The image folder."""
        return image_folders.path(self.data_dir, self.dataset, self.name)

    @property
    def fetched(self) -> pathlib.Path:
        """Where images go that are fetched."""
        return self.folder.with_name(f"fetched-{self.name}")


def make(config: ImagesConfig, uids: Mapping[str, Sequence[str]]) -> pathlib.Path:
    """Makes the image folder, or what is left of it to make.

    Args:
        config: see `ImagesConfig`.
        uids: "train", "test", "label" -> identifiers of the items, in order.

    Returns:
        The folder, for `xmc_jax.data.image_vectors.open`.

    Raises:
        ValueError: no images of these items, an encoder that cannot be read, or a folder that was
            made from other inputs or is damaged.
        OSError: a file that cannot be read or written.
    """
    source = pathlib.Path(config.source).expanduser()
    published = image_import.published(source)
    if published.get(config.encoder, 0) >= config.per_item:
        return image_import.import_published(
            config.dataset,
            config.data_dir,
            config.name,
            source,
            config.encoder,
            uids,
            config.overwrite,
        )
    opened = {split: place.open(split, uids[split]) for split, place in _places(config).items()}
    if not any(found.items_with_images for found in opened.values()):
        first = next((uid for split in SPLITS for uid in uids[split]), None)
        remedy = "files named by an item's number in its split need --by=index"
        if example := next(_files_below(source), None):
            remedy = (
                f"there are files such as {example!r:.100}, where <id>.png, <id>_1.png or "
                f"<id>/1.png are looked for; {remedy}"
            )
        remedy = image_sources.without_images(source) or remedy
        if published:
            there = (
                f"{name} with {counted(k, 'image')} per item"
                for name, k in sorted(published.items())
            )
            remedy = f"the embeddings there are of {', '.join(there)}"
        raise ValueError(
            f"{source}: expected images of items such as {first!r}, found none of any item; "
            f"{remedy}"
        )
    encoder = encoders.build(
        config.encoder,
        config.batch_size,
        config.revision,
        config.processor,
        config.layout,
        config.dtype,
    )
    counts = {split: len(found) for split, found in opened.items()}
    inputs = {
        "uids": image_folders.digests(uids),
        "per_item": config.per_item,
        "alpha": config.alpha,
        "processing": encoder.processing,
    }
    with image_writer.ImageWriter(
        config.folder,
        counts,
        encoder.width,
        config.dataset,
        encoder.identity,
        inputs,
        config.overwrite,
        compared=True,
    ) as writer:
        kept = None
        while not writer.finished or (kept := _changes(config, opened)) is not None:
            if writer.finished:
                writer.renew()
            begun = any(writer.written.values())
            _embed(writer, encoder, opened, uids, config, kept)
            writer.finish(_origin(config))
            if not begun:  # what is there is as it was a moment ago
                break
        return config.folder


def as_made(config: ImagesConfig) -> ImagesConfig:
    """The config with what a finished folder was made with, of options that `data.images` lacks."""
    return dataclasses.replace(
        config, **image_folders.read_origin(config.folder).get("options", {})
    )


def _files_below(folder: pathlib.Path) -> Iterator[str]:
    """The paths of files below a folder, without hidden ones and tables."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not name.startswith(".") and not name.lower().endswith(table_files.IN_FOLDERS):
                yield os.path.relpath(os.path.join(parent, name), folder)


def is_current(config: ImagesConfig, uids: Mapping[str, Sequence[str]]) -> bool:
    """Whether a finished folder has the images that its source has; encodes and downloads nothing.

    Images that are not there any more, or that a folder has no digests of, are no change; a warning
    says so.

    Args:
        config: see `ImagesConfig`.
        uids: identifiers of the items of the splits that are to be compared.

    Raises:
        ValueError: the folder is damaged, or its images are others, of another source.
    """
    source = pathlib.Path(config.source).expanduser()
    opened = image_folders.open(config.folder)
    if "published" in opened.manifest["source"]:
        return image_import.is_current(opened, source)
    places = _places(config, fetch_missing=False)
    if not all(place.path.exists() for place in places.values()):
        logging.warning(
            "%s: the images that it was made from are not there any more (%s); whether they have "
            "changed cannot be known",
            config.folder,
            source,
        )
        return True
    return _changes(config, {s: places[s].open(s, uids[s]) for s in uids}) is None


def read_uids(
    dataset: str, raw: str | pathlib.Path | None, encoding: str = "utf-8"
) -> dict[str, list[str]]:
    """The identifiers of a dataset's items, for `make`, from the raw files that `prepare` reads.

    Args:
        dataset: its name; counts of known ones are checked.
        raw: folder of the raw files; None for a bundled dataset's own.
        encoding: of the raw texts, "utf-8" or "latin-1".

    Returns:
        "train", "test", "label" -> identifiers, in order.

    Raises:
        ValueError: a file is missing, bad, or does not fit what is published.
    """
    folder = bundled.path(dataset) if raw is None else pathlib.Path(raw)
    files = raw_folder.find(folder)
    for role in ("validation", "train filter"):  # of the training documents, all
        files.pop(role, None)
    uids: dict[str, list[str]] = {split: [] for split in SPLITS}
    keep = lambda split, items: uids[split].extend(items.uids)  # noqa: E731
    raw_folder.read(files, dataset, encoding, keep=keep)
    return uids


def report(config: ImagesConfig) -> str:
    """A few lines on a finished folder: items, images, shares of items with one, and failures."""
    lines = [image_folders.report(config.folder)]
    for fetched in (config.fetched, *(config.fetched / split for split in SPLITS)):
        if (fetched / "report.json").is_file():
            result = json.loads((fetched / "report.json").read_bytes())
            lines.append(fetch.summary(fetched, result))
    failures = config.folder / changes.FAILURES
    if failures.is_file():
        with failures.open("rb") as file:
            count = sum(1 for _ in file)
        where = f": {failures}" if count else ""
        lines.append(f"  could not be read  {counted(count, 'image')}{where}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, see `command.run`."""
    return command.run("embed", lambda: _parse(arguments), _embed_and_check)


def _embed_and_check(asked: tuple[ImagesConfig, str, str]) -> None:
    config, raw, encoding = asked
    uids = read_uids(config.dataset, None if raw == BUNDLED else raw, encoding)
    folder = make(config, uids)
    print(report(config))
    image_import.check_shares(config.dataset, image_folders.open(folder).shares)


# What lies where


def _places(config: ImagesConfig, fetch_missing: bool = True) -> dict[str, Place]:
    """Where the images of each split are; those that are named by URLs are fetched before.

    Raises:
        ValueError: other URLs were fetched before.
    """
    source = pathlib.Path(config.source).expanduser()
    where = dict.fromkeys(SPLITS, source)
    for splits, table in _url_tables(source):
        fetched = config.fetched if len(splits) > 1 else config.fetched / splits[0]
        recorded = json_files.read(fetched / "inputs.json", optional=True).get("urls")
        if recorded not in (None, here := sha256(table[0])):
            raise ValueError(
                f"{table[0]}: expected the URLs that {fetched} was fetched from (sha256 "
                f"{recorded:.12}...), found others (sha256 {here:.12}...); remove that folder, or "
                "choose another name (--name, --config.data.images.name)"
            )
        if fetch_missing:
            _fetch(config, fetched, *table)
        where |= dict.fromkeys(splits, fetched)
    return {split: Place(path, config.by, config.allow_paths) for split, path in where.items()}


def _url_tables(
    path: pathlib.Path,
) -> list[tuple[tuple[str, ...], tuple[pathlib.Path, str, str]]]:
    """Splits, and a table that holds URLs of their images with its columns of ids and URLs.

    All splits of a file, or of a folder's only table; in a folder with tables of each split, those
    splits whose table holds URLs.
    """
    tables_of = {path: tuple(SPLITS)}
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if _is_table(file))
        tables_of = {file: tuple(SPLITS) for file in found}
        if len(found) > 1:
            tables_of = {
                file: (split,)
                for split in SPLITS
                if (file := image_sources.table_of_split(found, split)) is not None
            }
    urls = ((splits, _url_table(file)) for file, splits in tables_of.items())
    return [(splits, table) for splits, table in urls if table is not None]


def _url_table(path: pathlib.Path) -> tuple[pathlib.Path, str, str] | None:
    """A table of URLs, not of images; its columns of ids and URLs."""
    if not (path.is_file() and path.name.lower().endswith(table_files.SUFFIXES)):
        return None
    table = table_files.open_table(path, limit=image_sources.MAX_RECORD)
    columns = table.columns
    held = [name for name, kind in table.types.items() if kind.endswith("binary")]
    held += [name for name in ("bytes", "image", "base64", "path") if name in columns]
    key = next((name for name in ("uid", "id") if name in columns), None)
    url = next((name for name in ("url", "urls") if name in columns), None)
    return (path, key, url) if key and url and not held else None


def _is_table(path: pathlib.Path) -> bool:
    return path.name.lower().endswith(table_files.IN_FOLDERS) and path.is_file()


def _fetch(
    config: ImagesConfig, out: pathlib.Path, urls: pathlib.Path, key: str, url: str
) -> pathlib.Path:
    networks = tuple(ipaddress.ip_network(network) for network in config.allow_private)
    fetch.fetch(
        fetch.FetchConfig(
            urls=urls,
            out=out,
            limits=download.Limits(allowed=networks),
            id_column=key,
            url_column=url,
            max_images=config.per_item,
        )
    )
    return out


def _origin(config: ImagesConfig) -> dict[str, Any]:
    """Where the images are; see `image_folders.read_origin`."""
    options = {name: getattr(config, name) for name in ("alpha", "by", "allow_paths")}
    if config.processor is not None:
        options["processor"] = str(pathlib.Path(config.processor).expanduser().absolute())
    return {
        "source": str(pathlib.Path(config.source).expanduser().absolute()),
        "revision": config.revision,
        "options": options,
    }


def _changes(config: ImagesConfig, opened: Mapping[str, Source]) -> Changes | None:
    return changes.find(
        image_folders.open(config.folder),
        opened,
        config.per_item,
        _origin(config),
        config.overwrite,
    )


# From files to vectors: read here, decoded in threads, encoded a batch behind, written in order


@dataclasses.dataclass(eq=False)
class _Batch:
    """Items in a row whose images are encoded at a time.

    Attributes:
        first: number of the first item.
        counts: images of each item that could be read.
        contents: digests of each item's images, see `changes.of_item`.
        prepared: those images.
        failures: item, k and reason of the others.
    """

    first: int
    counts: list[int] = dataclasses.field(default_factory=list)
    contents: list[np.ndarray] = dataclasses.field(default_factory=list)
    prepared: list[np.ndarray] = dataclasses.field(default_factory=list)
    failures: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.counts)

    def add_empty(self, count: int) -> None:
        """Adds items without images."""
        self.counts += [0] * count
        self.contents += [changes.of_item([])] * count


def _embed(
    writer: image_writer.ImageWriter,
    encoder: Encoder,
    opened: Mapping[str, Source],
    uids: Mapping[str, Sequence[str]],
    config: ImagesConfig,
    kept: Changes | None,
) -> None:
    """Appends all items that are missing, with the vectors of those that have not changed."""
    done = writer.written
    total = sum(len(found) for found in opened.values())
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    prepare = _preparation(encoder, config.alpha)
    try:
        with (
            _Failures(writer.partial / changes.FAILURES, done) as failures,
            _Progress(total, sum(done.values())) as progress,
        ):
            for split, found in opened.items():
                stamps = found.stamps() if kept is None else kept.stamps[split]
                items = np.arange(len(found))
                if kept is not None:
                    items = np.flatnonzero(~kept.kept[split])
                items = items[items >= done[split]]

                def write(split: str, stamps: np.ndarray, batch: _Batch, vectors: Any) -> None:
                    rows = np.empty((0, encoder.width), np.float32)
                    if vectors is not None:
                        rows = jax.device_get(vectors)[: len(batch.prepared)]
                    count = len(batch.prepared)
                    if kept is not None:
                        rows = _with_kept(kept, split, batch, rows)
                    failures.add(split, uids[split], batch.failures)  # before they count as done
                    part = stamps[batch.first : batch.end]
                    contents = np.stack(batch.contents)
                    writer.extend(split, batch.first, batch.counts, rows, contents, part)
                    progress.add(len(batch.counts), count)

                pending = None
                read = found.read(config.per_item, items)
                ready = _in_threads(read, prepare, pool, _AHEAD_BATCHES * config.batch_size)
                for batch in _batches(ready, done[split], len(found), config.batch_size):
                    vectors = encoder.embed(batch.prepared) if batch.prepared else None
                    if pending is not None:
                        write(split, stamps, *pending)
                    pending = batch, vectors
                if pending is not None:
                    write(split, stamps, *pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _with_kept(kept: Changes, split: str, batch: _Batch, rows: np.ndarray) -> np.ndarray:
    """f[m, E], the vectors of a batch with those of its items that stay, which it gets, too."""
    stays = kept.kept[split][batch.first : batch.end]
    before = getattr(kept.opened, split)
    bounds = before.indptr[batch.first : batch.end + 1]
    contents = image_folders.read_contents(kept.opened, split)
    counts = np.where(stays, np.diff(bounds), batch.counts)
    merged = np.empty((counts.sum(), before.rows.shape[1]), np.float32)
    there = np.repeat(stays, np.diff(bounds))
    merged[np.repeat(stays, counts)] = before.rows[bounds[0] : bounds[-1]][there]
    merged[np.repeat(~stays, counts)] = rows
    batch.counts = counts.tolist()
    for place in np.flatnonzero(stays).tolist():
        item = batch.first + place
        batch.contents[place] = contents[item]
        batch.failures += [(item, *why) for why in kept.failures.get((split, item), ())]
    batch.failures.sort()
    return merged


_Prepared = tuple[bytes, np.ndarray | str]  # digest of an image; what encoders take, or a reason


def _preparation(encoder: Encoder, alpha: str) -> Callable[[bytes | str], _Prepared]:
    """What threads do with an image: decode and prepare it, or say why not; bounded in memory."""
    small, alone = decoding.Limits(max_pixels=_SMALL_PIXELS), threading.Lock()

    def prepare(data: bytes | str) -> _Prepared:
        digest = changes.of_image(data)
        if isinstance(data, str):
            return digest, data
        try:
            try:
                return digest, encoder.prepare(decoding.decode(data, small, alpha))
            except decoding.TooLarge:
                with alone:
                    return digest, encoder.prepare(decoding.decode(data, alpha=alpha))
        except ValueError as error:
            return digest, str(error).removeprefix("image: ")

    return prepare


def _in_threads(
    found: Iterable[tuple[int, int, bytes | str]],
    prepare: Callable[[bytes | str], _Prepared],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[int, int, _Prepared]]:
    """Images prepared, in the order they come in; at most `ahead` are read before they are due."""
    waiting: collections.deque = collections.deque()
    held = 0
    for item, k, data in found:
        waiting.append((item, k, len(data), pool.submit(prepare, data)))
        held += len(data)
        while len(waiting) > ahead or held > _AHEAD_BYTES:
            item, k, size, future = waiting.popleft()
            held -= size
            yield item, k, future.result()
    for item, k, _, future in waiting:
        yield item, k, future.result()


def _batches(
    ready: Iterable[tuple[int, int, _Prepared]], first: int, end: int, size: int
) -> Iterator[_Batch]:
    """Batches of whole items, from the first item to the end.

    Where a batch ends follows from where it begins. So one that is begun again after a kill is the
    same, and so are its vectors to the last bit.
    """
    batch = _Batch(first)
    grouped = itertools.groupby(ready, key=operator.itemgetter(0))
    for item, group in itertools.chain(grouped, [(end, ())]):
        group = list(group)
        good = [image for *_, (_, image) in group if not isinstance(image, str)]
        while item - batch.first >= _BATCH_ITEMS:
            batch.add_empty(_BATCH_ITEMS - len(batch.counts))
            yield batch
            batch = _Batch(batch.end)
        batch.add_empty(item - batch.end)
        if len(batch.prepared) + len(good) > size:
            yield batch
            batch = _Batch(item)
        if item < end:
            batch.counts.append(len(good))
            batch.contents.append(changes.of_item([digest for *_, (digest, _) in group]))
            batch.prepared += good
            batch.failures += [(i, k, why) for i, k, (_, why) in group if isinstance(why, str)]
    if batch.counts:
        yield batch


class _Failures:
    """failures.jsonl: lines of items that are done are kept, those behind them are cut.

    Args:
        path: the file.
        done: split -> items that are done.
    """

    def __init__(self, path: pathlib.Path, done: Mapping[str, int]):
        self._file = path.open("a+b")
        self._file.seek(0)
        kept = 0
        for line in self._file:
            try:
                failure = json.loads(line)
                if not line.endswith(b"\n") or failure["item"] >= done[failure["split"]]:
                    break
            except (ValueError, KeyError, TypeError):  # torn by a kill
                break
            kept += len(line)
        self._file.truncate(kept)

    def __enter__(self) -> "_Failures":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, split: str, uids: Sequence[str], failures: list[tuple[int, int, str]]) -> None:
        """Makes the failures of a split's items durable."""
        if not failures:
            return
        for item, k, reason in failures:
            line = {"split": split, "item": item, "uid": uids[item], "k": k, "reason": reason}
            self._file.write(json.dumps(line).encode() + b"\n")
        atomic.to_disk(self._file)


class _Progress:
    """A bar of items, with the images per second of this run.

    Args:
        total: items.
        done: items that are there already.
    """

    def __init__(self, total: int, done: int):
        self._bar = tqdm.tqdm(
            total=total, initial=done, desc="embedding", unit="item", disable=None
        )
        self._start, self._images = time.monotonic(), 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add(self, items: int, count: int) -> None:
        """Counts items and images that are written."""
        self._images += count
        rate = self._images / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.1f} images/s", refresh=False)
        self._bar.update(items)


def _parse(arguments: list[str] | None) -> tuple[ImagesConfig, str, str]:
    """The config, the folder of the raw files, and their encoding."""
    parser = command.Parser(prog="python -m xmc_jax.images.embed", allow_abbrev=False)
    add, defaults = parser.add_argument, ImagesConfig
    add("--dataset", required=True, help=f"its name; known: {', '.join(KNOWN)}")
    add("--raw", default=BUNDLED, help=f"folder of the raw files, or {BUNDLED} (default)")
    add("--encoding", default="utf-8", help="of the raw texts, utf-8 (default) or latin-1")
    add(
        "--images",
        dest="source",
        required=True,
        help="a folder of images or of published embeddings; or a .parquet, .jsonl or .csv of "
        "images or URLs; or a .bin of ViXML",
    )
    add("--name", required=True, help="the result is OUT/DATASET/images-NAME")
    add("--out", dest="data_dir", default="data", help="where dataset folders go (default data)")
    add(
        "--encoder",
        default=defaults.encoder,
        help=f"a folder, a hub name, or {descriptor.NAME} (default {defaults.encoder})",
    )
    add("--revision", help="the encoder's revision on the hub")
    add("--processor", help=f"another {encoders.PROCESSOR} than the encoder's, or its folder")
    add(
        "--max_images",
        dest="per_item",
        type=int,
        default=defaults.per_item,
        help=f"the first so many of an item (default {defaults.per_item})",
    )
    for flag, text in (
        ("layout", "pad on a white square, as the reference does, or stretch"),
        ("alpha", "what is transparent: white, or drop, for the colours beneath"),
        ("batch_size", "images per call, over all devices"),
        ("dtype", "of products: bfloat16 or float32"),
        ("by", "what image files are named by: uid or index"),
    ):
        default = getattr(defaults, flag)
        add(f"--{flag}", type=type(default), default=default, help=f"{text} (default {default})")
    add(
        "--allow_paths",
        action="store_true",
        help="read images by paths that lead out of the folder of the table that names them",
    )
    add(
        "--allow_private",
        nargs="*",
        metavar="NETWORK",
        help="fetch from these networks too, such as 10.0.0.0/8; none named: from any address",
    )
    add("--overwrite", action="store_true", help="replace a folder that differs")
    fields = vars(parser.parse_args(arguments))
    raw, encoding = fields.pop("raw"), fields.pop("encoding")
    networks = fields.pop("allow_private")
    if networks == []:
        networks = ["0.0.0.0/0", "::/0"]
    if encoding not in ("utf-8", "latin-1"):
        raise ValueError(f"--encoding: expected utf-8 or latin-1, got {encoding!r}")
    return ImagesConfig(**fields, allow_private=tuple(networks or ())), raw, encoding


if __name__ == "__main__":
    sys.exit(main())
