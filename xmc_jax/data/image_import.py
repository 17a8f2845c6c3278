"""Embeddings that others have published, in the files of ViXML, to an image folder."""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import logging

from xmc_jax.data import image_maps, image_vectors, image_writer
from xmc_jax.data.known import KNOWN
from xmc_jax.data.store import SPLITS
from xmc_jax.files.digests import sha256

# Percent of train, test and label items that have an image. Source: ViXML Table 8.
SHARES = {
    "LF-AmazonTitles-131K": (79.45, 78.50, 95.72),
    "LF-Amazon-131K": (79.45, 78.50, 95.72),
    "MM-AmazonTitles-300K": (99.58, 99.92, 99.59),
    "LF-AmazonTitles-1.3M": (99.01, 99.00, 99.65),
}
_SHARE_TOLERANCE = 0.05  # points

# What the published files call (tag, E). Source: ViXML reference, extract_img_embed.py.
_ENCODERS = {("siglip2", 1152): "google/siglip2-so400m-patch14-384"}
_PUBLISHED_SPLITS = {
    "train": ("trn", "train"),
    "test": ("tst", "test"),
    "label": ("lbl", "labels", "label"),
}
_ROWS_NAME = re.compile(r"(?:([a-z]+)_)?embs_imgs_(\d+)_(\d+)_(.+)\.npy")
_MAP_NAME = re.compile(r"([a-z]+)_imgs_(\d+)_(\d+)_map\.npy")
_BLOCK = 1 << 12  # items imported at a time


def check_shares(dataset: str, shares: Mapping[str, float]) -> None:
    """Compares the items that have images with what is published; unknown datasets pass.

    Args:
        shares: split -> percent of its items that have an image.

    Raises:
        ValueError: a share differs by more than 0.05 points; names both.
    """
    for split, published in zip(SPLITS, SHARES.get(dataset, ())):
        if abs(shares[split] - published) > _SHARE_TOLERANCE:
            raise ValueError(
                f"{dataset}: expected the published {published:.2f} % of {split} items with an "
                f"image, found {shares[split]:.2f} %; other data needs another --dataset name"
            )


def published(folder) -> dict[str, int]:
    """Encoder -> images per item, of all embeddings that a folder holds; maps may be missing."""
    folder = pathlib.Path(folder)
    names = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
    listed = filter(None, map(_ROWS_NAME.fullmatch, names))
    return {_encoder(match): int(match[2]) for match in listed}


def _encoder(match: re.Match) -> str:
    """What made a file of embeddings: the known maker of its tag, else the tag."""
    return _ENCODERS.get((match[4], int(match[3])), match[4])


def import_published(
    dataset: str,
    data_dir,
    name: str,
    embeddings,
    encoder: str,
    uids: Mapping[str, Sequence[str]],
    overwrite: bool = False,
) -> pathlib.Path:
    """Makes an image folder of published embeddings; goes on after a kill, and once done is done.

    Args:
        dataset: its name; counts and shares of known names are checked before anything is written.
        embeddings: folder of `{trn,tst,lbl}_embs_imgs_<K>_<E>_<tag>.npy`, or one such file without
            a split for all, and of `{train,test,labels}_imgs_<size>_<K>_map.npy`.
        encoder: what made them, one of `published(embeddings)`.
        uids: split -> identifiers of the dataset's items, in the order of the maps.
        overwrite: discard what the folder holds if it is of other inputs or damaged.

    Returns:
        The folder, for `images.open`.

    Raises:
        ValueError: files are missing, damaged, or other than published; or see `images.Writer`.
    """
    folder = image_vectors.path(data_dir, dataset, name)
    files = _find(pathlib.Path(embeddings), encoder)
    per_item = published(embeddings)[encoder]
    rows = {split: _load_rows(file) for split, (file, _) in files.items()}
    widths = sorted({array.shape[1] for array in rows.values()})
    if len(widths) > 1:
        raise ValueError(f"{embeddings}: expected vectors of one width, found {widths}")
    maps = {split: image_maps.read(file, len(rows[split])) for split, (_, file) in files.items()}
    items = {split: maps[split].rows for split in SPLITS}
    counts = {split: len(uids[split]) for split in SPLITS}
    if items != counts:
        raise ValueError(
            f"{embeddings}: expected maps of {counts} items, as the dataset has, found {items}"
        )
    known = KNOWN.get(dataset)
    if known is not None:
        known_counts = dict(zip(SPLITS, (known.train, known.test, known.labels)))
        if items != known_counts:
            raise ValueError(
                f"{dataset}: expected maps of the published counts {known_counts}, found {items}; "
                "other data needs another --dataset name"
            )
    with_image = {split: int((maps[split].counts() > 0).sum()) for split in SPLITS}
    check_shares(dataset, {s: 100 * with_image[s] / max(items[s], 1) for s in SPLITS})
    digests = {file.name: sha256(file) for pair in files.values() for file in pair}
    vectors = sorted({file.name for file, _ in files.values()})
    identity = {
        "name": encoder,
        "revision": None,
        # The weights are not at hand; their vectors are.
        "digest": hashlib.sha256("".join(digests[n] for n in vectors).encode()).hexdigest(),
    }
    source = {"uids": image_vectors.digests(uids), "per_item": per_item, "published": digests}
    origin = _origin(pathlib.Path(embeddings), digests)
    with image_writer.ImageWriter(
        folder, items, widths[0], dataset, identity, source, overwrite
    ) as writer:
        total, begun = sum(items.values()), sum(writer.written.values())
        with tqdm.tqdm(
            total=total, initial=begun, desc="importing", unit="item", disable=None
        ) as bar:
            for split in SPLITS:
                for start in range(writer.written[split], items[split], _BLOCK):
                    block = maps[split].take(np.arange(start, min(start + _BLOCK, items[split])))
                    writer.extend(split, start, block.counts(), rows[split][block.indices])
                    bar.update(block.rows)
        return writer.finish(origin)


def is_current(opened: image_vectors.ImageStore, embeddings) -> bool:
    """Whether published embeddings are those that a folder was made of.

    Files of the same sizes and times are not read. Files that are not there any more are no change.

    Raises:
        ValueError: a file has changed; names it and both digests.
    """
    folder, recorded = pathlib.Path(embeddings), opened.manifest["source"]["published"]
    before = image_vectors.read_origin(opened.folder).get("files", {})
    now = {name: image_vectors.stamp_of(folder / name) for name in recorded}
    if None in now.values():
        logging.warning(
            "%s: the embeddings that it was made of are not in %s any more; whether they have "
            "changed cannot be known",
            opened.folder,
            folder,
        )
        return True
    for name, digest in recorded.items():
        if now[name] != before.get(name) and (listed := sha256(folder / name)) != digest:
            raise ValueError(
                f"{folder / name}: expected the embeddings that {opened.folder} was made of "
                f"(sha256 {digest:.12}...), found others (sha256 {listed:.12}...); "
                f"{image_vectors.REMEDY}"
            )
    if now != before:
        image_vectors.write_origin(opened.folder, _origin(folder, recorded))
    return True


def _origin(folder: pathlib.Path, names: Iterable[str]) -> dict[str, Any]:
    files = {name: image_vectors.stamp_of(folder / name) for name in names}
    return {"source": str(folder.expanduser().absolute()), "files": files}


def _find(folder: pathlib.Path, encoder: str) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """Split -> its embeddings and its map."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of embeddings, found none")
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    kinds: dict[tuple[str, ...], dict[str, str]] = {}  # (K, E, tag) -> split's prefix -> file
    for match in filter(None, map(_ROWS_NAME.fullmatch, names)):
        if _encoder(match) == encoder:
            kinds.setdefault(match.groups()[1:], {})[match[1] or ""] = match[0]
    if len(kinds) != 1:
        listed = ", ".join(n for n in names if _ROWS_NAME.fullmatch(n)) or "none"
        raise ValueError(
            f"{folder}: expected one set of {{trn,tst,lbl}}_embs_imgs_<K>_<E>_<tag>.npy of "
            f"{encoder}, found {listed}"
        )
    [((per_item, *_), rows)] = kinds.items()
    files = {}
    for split, prefixes in _PUBLISHED_SPLITS.items():
        listed = [rows[prefix] for prefix in (*prefixes, "") if prefix in rows]
        maps = [m for m in map(_MAP_NAME.fullmatch, names) if m and m[1] in prefixes]
        if len(maps) > 1:
            maps = [m for m in maps if m[3] == per_item]
        if not listed or len(maps) != 1:
            raise ValueError(
                f"{folder}: expected embeddings of {split} and one "
                f"{{{','.join(prefixes)}}}_imgs_<size>_{per_item}_map.npy, found "
                f"{', '.join([*listed, *(m[0] for m in maps)]) or 'neither'}"
            )
        files[split] = (folder / listed[0], folder / maps[0][0])
    return files


def _load_rows(file: pathlib.Path) -> np.ndarray:
    """f[images, E], memory-mapped; its width is the one in its name."""
    try:
        rows = np.lib.format.open_memmap(file, mode="r")  # neither pickles nor archives
    except OSError:
        raise
    except Exception as error:  # a damaged header raises a dozen types; all mean the same here
        raise ValueError(
            f"{file}: expected a NumPy array of numbers, found another file"
        ) from error
    width = int(_ROWS_NAME.fullmatch(file.name)[3])
    if rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(
            f"{file}: expected floats of shape [images, {width}], found {rows.dtype} "
            f"{list(rows.shape)}"
        )
    return rows
