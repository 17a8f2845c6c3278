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

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from xmc_jax.data import bundled, image_import, image_writer, raw_folder
from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data.store import SPLITS
from xmc_jax.data.tables import table_files
from xmc_jax.files import json_files
from xmc_jax.files.digests import sha256
from xmc_jax.images import changes, encoders, fetch, image_sources, item_vectors
from xmc_jax.images.changes import ChangedImages
from xmc_jax.images.image_sources import ImageSource, Place
from xmc_jax.images.images_config import ImagesConfig
from xmc_jax.images.settings import (
    DownloadLimits,
    FetchConfig,
    add_flags,
    from_flags,
)
from xmc_jax.runtime import command
from xmc_jax.runtime.wording import counted

BUNDLED = "bundled"
"""What --raw calls the raw files that come with the package."""


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
    if not any(images.items_with_images for images in opened.values()):
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
    counts = {split: len(images) for split, images in opened.items()}
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
            item_vectors.append(writer, encoder, opened, uids, config, kept)
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


def _embed_and_check(parsed: tuple[ImagesConfig, str, str]) -> None:
    config, raw, encoding = parsed
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
            urls, id_column, url_column = table
            fetch.fetch(
                FetchConfig(
                    urls=urls,
                    out=fetched,
                    limits=DownloadLimits(allow_private=config.allow_private),
                    id_column=id_column,
                    url_column=url_column,
                    max_images=config.per_item,
                )
            )
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
        tables = sorted(file for file in path.iterdir() if _is_table(file))
        tables_of = {file: tuple(SPLITS) for file in tables}
        if len(tables) > 1:
            tables_of = {
                file: (split,)
                for split in SPLITS
                if (file := image_sources.table_of_split(tables, split)) is not None
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


def _changes(config: ImagesConfig, opened: Mapping[str, ImageSource]) -> ChangedImages | None:
    return changes.find(
        image_folders.open(config.folder),
        opened,
        config.per_item,
        _origin(config),
        config.overwrite,
    )


def _parse(arguments: list[str] | None) -> tuple[ImagesConfig, str, str]:
    """The config, the folder of the raw files, and their encoding."""
    parser = command.Parser(prog="python -m xmc_jax.images.embed", allow_abbrev=False)
    parser.set_defaults(data_dir="data")
    parser.add_argument("--raw", default=BUNDLED, help="Folder of the raw files. Default: bundled.")
    parser.add_argument("--encoding", default="utf-8", help="Of raw texts, utf-8 or latin-1.")
    names = {"data_dir": "out", "source": "images", "per_item": "max_images"}
    add_flags(parser, ImagesConfig, **names)
    flags = vars(parser.parse_args(arguments))
    if flags["encoding"] not in ("utf-8", "latin-1"):
        raise ValueError(f"--encoding: expected utf-8 or latin-1, got {flags['encoding']!r}")
    return from_flags(ImagesConfig, flags), flags["raw"], flags["encoding"]


if __name__ == "__main__":
    sys.exit(main())
