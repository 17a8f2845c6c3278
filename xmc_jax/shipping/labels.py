"""Adds labels to an exported model, changes and removes some, without training.

A changed label keeps what training taught of it, its free vector and centroid, and gets a new text
embedding. A new label has its text, and borrows the rest from trained labels with texts like its
own, see `retrieval.new_labels`. The folder is changed in one move: the new parts are written beside
the old ones, and artifact.json, written last, names them; killed before that, nothing has changed.
"""

import dataclasses
import datetime
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.core import meta

from xmc_jax.config import NewLabelsConfig, ScannConfig
from xmc_jax.data import texts
from xmc_jax.data.csr import Csr
from xmc_jax.data.tables import cell_values
from xmc_jax.files import array_files, atomic, json_files, locks
from xmc_jax.models import dual, hf_weights
from xmc_jax.retrieval import new_labels, scann
from xmc_jax.runtime import rng
from xmc_jax.shipping import artifact, contents
from xmc_jax.shipping.artifact import Artifact, Prototypes
from xmc_jax.shipping.query_encoder import Item, QueryEncoder

_CARD, _TITLE = "README.md", b"\n\n## Labels changed since training"
_BLOCK = 4_096  # labels encoded at a time
_ROWS = 65_536  # rows copied at a time
_EXPECTED = {
    False: ("is not yet in", "update this label instead"),
    True: ("is in", "leave it out, or correct the id"),
}
_QUERIES = 2_000  # documents that tune and measure an index


@dataclasses.dataclass(frozen=True)
class Label(Item):
    """A label as its owner has it; `at` says where it was read, for errors."""

    id: str = ""
    at: str = ""


@dataclasses.dataclass(frozen=True)
class LabelChanges:
    """Labels to add, to give other words or pictures, and identifiers of labels to remove.

    `remove_at` says where an identifier was read, for errors.
    """

    add: Sequence[Label] = ()
    update: Sequence[Label] = ()
    remove: Sequence[str] = ()
    remove_at: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Changed:
    """Numbers of changed labels, of labels afterwards, and the index's recall (None without one).

    `borrowing` counts the added labels that found trained labels like them.
    """

    added: int
    borrowing: int
    updated: int
    removed: int
    labels: int
    recall: float | None


@dataclasses.dataclass(eq=False)
class _Table:
    """Per-label arrays as they will be; the first rows are old ones, kept in order."""

    ids: list[str]
    texts: list[str]
    embeddings: np.ndarray
    frequency: np.ndarray
    prior: np.ndarray | None = None
    text: np.ndarray | None = None
    centroids: np.ndarray | None = None
    free_vector_of: np.ndarray | None = None
    free_vectors: np.ndarray | None = None


def change(folder, changes: LabelChanges, config: NewLabelsConfig, out=None) -> Changed:
    """Changes the labels of an artifact.

    Args:
        folder: the artifact, local.
        config: how new labels get their prototypes.
        out: a folder that is not there yet, for the changed artifact; None changes `folder` itself.

    Raises:
        ValueError: an identifier that is there and should not be, or the other way round; an
            artifact without what prototypes are made of; a picture that cannot be read.
    """
    folder = pathlib.Path(folder)
    if out is None:
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected an exported model, found no folder")
        with contents.locked(folder):
            opened = artifact.open(folder)
            return _change(folder, opened, changes, _check(opened, changes), config)
    out = pathlib.Path(out)
    if out.exists() or out.resolve().is_relative_to(folder.resolve()):
        there = "one" if out.exists() else f"a part of {folder}"
        raise ValueError(f"{out}: expected no such folder, found {there}; choose another for --out")
    opened = artifact.open(folder)
    rows = _check(opened, changes)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = locks.locked(out.with_name(f".{out.name}.lock"), str(out), remove=True)
    with lock, atomic.replaced_folder(out) as copy:
        _copy(opened, copy)
        return _change(copy, opened, changes, rows, config)


def _change(
    folder: pathlib.Path,
    opened: Artifact,
    changes: LabelChanges,
    rows: Mapping[str, int],
    config: NewLabelsConfig,
) -> Changed:
    """Writes new parts beside the old ones, then the manifest; then the old parts go."""
    try:
        changed, content, note = _write_parts(folder, opened, changes, rows, config)
        for name in contents.folders(content) - contents.folders(opened.manifest):
            atomic.tree_to_disk(folder / name)
        atomic.folder_to_disk(folder)
        # The model card is on the disk before, and gets its name when the labels have changed.
        with atomic.replaced(folder / _CARD) as card:
            card.write(note)
            atomic.to_disk(card)
            contents.write_manifest(folder, content)
    finally:
        _remove_unused(folder)
    return changed


def _write_parts(
    folder: pathlib.Path,
    opened: Artifact,
    changes: LabelChanges,
    rows: Mapping[str, int],
    config: NewLabelsConfig,
) -> tuple[Changed, dict[str, Any], bytes]:
    """What has changed, the content of the manifest that names the new parts, the model card."""
    gone = np.zeros(len(opened.labels), bool)
    gone[[rows[cell_values.normal(name)] for name in changes.remove]] = True
    kept, made_of = np.flatnonzero(~gone), opened.prototypes()
    table = _kept(opened, made_of, kept, len(changes.add))
    place = {old: new for new, old in enumerate(kept.tolist())}
    updated = [place[rows[cell_values.normal(label.id)]] for label in changes.update]
    updated = np.array(updated, np.int64)
    added = np.arange(len(kept), len(table.ids))
    for row, label in zip([*updated, *added], [*changes.update, *changes.add]):
        table.ids[row], table.texts[row] = label.id, label.text
    borrowing = 0
    if len(updated) or len(added):
        pooled = _encode(QueryEncoder(opened), [*changes.update, *changes.add])
        borrowing = _embed(table, pooled, updated, added, made_of, config)
    number = _next_number(folder)
    content = {k: v for k, v in opened.manifest.items() if k not in ("format", "files")}
    content |= {"labels": _section(content, "labels", number, len(table.ids))}
    _write_labels(folder / content["labels"]["folder"], table)
    if made_of is not None:
        content["prototypes"] = _section(content, "prototypes", number, len(table.ids))
        _write_prototypes(folder / content["prototypes"]["folder"], table, made_of)
    if opened.documents is not None and len(changes.remove):
        content["documents"] = _section(content, "documents", number, len(opened.documents))
        target = folder / content["documents"]["folder"]
        _write_documents(target, folder / opened.manifest["documents"]["folder"], opened, kept)
    recall = None
    if opened.index is not None:
        content["index"], recall = _index(folder, number, opened, table.embeddings)
    entry = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "added": len(added),
        "updated": len(updated),
        "removed": int(gone.sum()),
        "new_labels": dataclasses.asdict(config),
    }
    content["changes"] = [*content.get("changes", []), entry]
    count = len(table.ids)
    changed = Changed(len(added), borrowing, len(updated), int(gone.sum()), count, recall)
    return changed, content, _noted(folder / _CARD, content, entry, count)


def _check(opened: Artifact, changes: LabelChanges) -> dict[str, int]:
    """Identifier, see `record_cells.normal`, -> row, after the changes are found to fit."""
    rows = {cell_values.normal(name): row for row, name in enumerate(opened.labels.ids)}
    prime = _setting(opened, "prime", "enabled", bool)
    if opened.manifest.get("prototypes") is None and prime:
        raise ValueError(
            f"{opened.folder}: expected what prototypes are made of, found an artifact without; "
            "export with --config.export.prototypes=True"
        )
    seen: set[str] = set()
    for what, named, there in (
        ("add", [(label.id, label.at) for label in changes.add], False),
        ("update", [(label.id, label.at) for label in changes.update], True),
        ("remove", [(name, changes.remove_at.get(name, "")) for name in changes.remove], True),
    ):
        for written, at in named:
            name, where = cell_values.normal(written), f"{at}: {what}" if at else what
            if not name:
                raise ValueError(f"{where}: expected labels with an id, got one without")
            if name in seen:
                raise ValueError(f"{where}: label {name!r}: expected each label once, got it again")
            seen.add(name)
            if (name in rows) is not there:
                expected, remedy = _EXPECTED[there]
                raise ValueError(
                    f"{where}: label {name!r}: expected an id that {expected} {opened.folder}; "
                    f"{remedy}"
                )
    if len(rows) + len(changes.add) == len(changes.remove):
        raise ValueError("remove: expected labels to be left, got all of them")
    return rows


def _setting(opened: Artifact, section: str, name: str, kind: type) -> Any:
    """A setting of the config that the model was trained with."""
    fields = opened.manifest["config"].get(section)
    value = fields.get(name) if isinstance(fields, dict) else None
    if type(value) is not kind:
        raise ValueError(
            f"{opened.folder / contents.MANIFEST}: config: {section}.{name}: expected "
            f"{kind.__name__}, found {value!r:.60}"
        )
    return value


def _kept(opened: Artifact, made_of: Prototypes | None, kept: np.ndarray, more: int) -> _Table:
    """The rows that stay, with room behind them."""

    def grown(array: np.ndarray) -> np.ndarray:
        out = np.zeros((len(kept) + more, *array.shape[1:]), array.dtype)
        for start in range(0, len(kept), _ROWS):
            part = kept[start : start + _ROWS]
            out[start : start + len(part)] = array[part]
        return out

    labels = opened.labels
    table = _Table(
        ids=[labels.ids[row] for row in kept] + [""] * more,
        texts=[labels.texts[row] for row in kept] + [""] * more,
        embeddings=grown(labels.embeddings),
        frequency=grown(labels.frequency),
    )
    if labels.prior is not None:
        table.prior = grown(labels.prior)
        table.prior[len(kept) :] = labels.prior[labels.prior > 0].min(initial=1)
    if made_of is None:
        return table
    return dataclasses.replace(
        table,
        text=grown(made_of.text),
        centroids=grown(made_of.centroids),
        free_vector_of=grown(made_of.free_vector_of),
        free_vectors=made_of.free_vectors,
    )


def _encode(tower: QueryEncoder, labels: Sequence[Label]) -> np.ndarray:
    """f32[n, D], pooled."""
    parts = []
    for start in range(0, len(labels), _BLOCK):
        block, problems = labels[start : start + _BLOCK], {}
        parts.append(tower.encode(block, pooled=True, problems=problems, kind="label"))
        if problems:
            number = min(problems)
            where = block[number].at or f"label {block[number].id!r}"
            raise ValueError(f"{where}: {problems[number]}")
    return np.concatenate(parts)


def _embed(
    table: _Table,
    pooled: np.ndarray,
    updated: np.ndarray,
    added: np.ndarray,
    made_of: Prototypes | None,
    config: NewLabelsConfig,
) -> int:
    """Fills the rows of changed and new labels; returns how many of the new ones borrow."""
    rows = np.concatenate([updated, added])
    if made_of is None:
        table.embeddings[rows] = new_labels.unit(pooled)
        return 0
    combine = _combiner(made_of)
    trained = np.flatnonzero(table.frequency > 0)  # those added before have nothing to lend
    known = table.frequency[rows] > 0  # keep what training taught of them
    table.text[rows] = pooled
    for start in range(0, int(known.sum()), _BLOCK):
        part = np.flatnonzero(known)[start : start + _BLOCK]
        changed = rows[part]
        free = table.free_vectors[table.free_vector_of[changed]]
        table.embeddings[changed] = combine(pooled[part], free, table.centroids[changed])
    new, vectors = rows[~known], pooled[~known]
    neighbours = new_labels.nearest(vectors, new_labels.unit(table.text[trained]), config)
    free = new_labels.borrowed(neighbours, table.free_vectors, table.free_vector_of[trained])
    centroids = new_labels.borrowed(neighbours, table.centroids[trained])
    table.embeddings[new] = new_labels.prototypes(
        vectors, free, centroids, neighbours, combine, config
    )
    table.centroids[new] = centroids
    table.free_vector_of[new] = len(table.free_vectors) + np.arange(len(new))
    table.free_vectors = np.concatenate([table.free_vectors, free])
    return int(neighbours.has_neighbour[np.isin(new, added)].sum())


def _combiner(made_of: Prototypes) -> Callable[..., np.ndarray]:
    module = dual.combiner(made_of.config)
    one = jnp.zeros((1, made_of.free_vectors.shape[1]))
    key = rng.key(0, rng.Stream.INIT, 0)
    abstract = meta.unbox(jax.eval_shape(module.init, key, one, one, one)).get("params", {})
    params = hf_weights.load_tree(made_of.combiner, abstract)
    run = jax.jit(lambda *vectors: module.apply({"params": params}, *vectors))
    return lambda *vectors: np.asarray(run(*vectors))


def _index(
    folder: pathlib.Path, number: int, opened: Artifact, embeddings: np.ndarray
) -> tuple[dict[str, Any] | None, float | None]:
    """Writes the index anew, tuned and measured on training documents; its section and recall."""
    if not scann.available():
        logging.warning(
            "%s: the ScaNN index is left out, since scann is not installed; search is exact", folder
        )
        return None, None
    before = opened.manifest["index"]
    try:
        config = ScannConfig(**_setting(opened, "eval", "scann", dict))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{opened.folder}: eval.scann: {error}") from error
    some = embeddings if opened.documents is None else opened.documents.embeddings
    some = np.asarray(some[:: -(-len(some) // _QUERIES)], np.float32)
    k = min(before["k"], len(embeddings))
    index, measured = scann.build_measured(embeddings, config, some, k)
    section = _section({"index": before}, "index", number, len(embeddings))
    index.save(folder / section["folder"])
    return section | measured, measured["recall"]


def _write_labels(folder: pathlib.Path, table: _Table) -> None:
    folder.mkdir()
    array_files.save(folder / "embeddings.npy", table.embeddings)
    array_files.save(folder / "frequency.npy", table.frequency)
    if table.prior is not None:
        array_files.save(folder / "prior.npy", table.prior)
    texts.save(folder, "ids", table.ids)
    texts.save(folder, "texts", table.texts)


def _write_prototypes(folder: pathlib.Path, table: _Table, before: Prototypes) -> None:
    folder.mkdir()
    for name in ("text", "centroids", "free_vector_of", "free_vectors"):
        array_files.save(folder / f"{name}.npy", getattr(table, name))
    _link(before.combiner, folder / before.combiner.name)


def _write_documents(
    folder: pathlib.Path, before: pathlib.Path, opened: Artifact, kept: np.ndarray
) -> None:
    """The same documents without the labels that are gone."""
    folder.mkdir()
    for path in before.iterdir():
        if not path.name.startswith("positives."):
            _link(path, folder / path.name)
    positives = _renumbered(opened.documents.positives, kept)
    array_files.save(folder / "positives.indptr.npy", positives.indptr)
    array_files.save(folder / "positives.indices.npy", positives.indices)


def _renumbered(whole: Csr, kept: np.ndarray) -> Csr:
    """Positives [N, L] of the kept labels, as their new numbers."""
    place = np.full(whole.columns, -1, np.int32)
    place[kept] = np.arange(len(kept))
    indices = place[whole.indices]
    ends = np.concatenate([[0], np.cumsum(indices >= 0)])
    return Csr(ends[whole.indptr].astype(np.int64), indices[indices >= 0], None, len(kept))


def _section(content: Mapping[str, Any], name: str, number: int, count: int) -> dict[str, Any]:
    return {**content[name], "folder": f"{name}-{number}", "count": count}


def _next_number(folder: pathlib.Path) -> int:
    """Above that of any part, whether artifact.json names it or a killed process left it."""
    numbers = [path.name.rpartition("-")[2] for path in folder.iterdir() if path.is_dir()]
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=1)


def _remove_unused(folder: pathlib.Path) -> None:
    """Removes the parts that artifact.json does not name: replaced ones, or unfinished ones."""
    used = contents.folders(json_files.read(folder / contents.MANIFEST))
    for path in folder.iterdir():
        is_part = path.name.partition("-")[0] in contents.PARTS and path.is_dir()
        if is_part and path.name not in used:
            shutil.rmtree(path)


def _noted(card: pathlib.Path, content: dict[str, Any], entry: Mapping[str, Any], n: int) -> bytes:
    """The model card with a line about this change; its metrics are those of the labels before."""
    text = card.read_bytes() if card.is_file() else b""
    is_unedited = content.get("cards", {}).get(_CARD) == hashlib.sha256(text).hexdigest()
    if _TITLE not in text:
        text = text.rstrip() + _TITLE + b"\n\nThe metrics above are of the labels before.\n\n"
    line = ", ".join(f"{entry[what]:,} {what}" for what in ("added", "updated", "removed"))
    text += f"- {entry['at']}: {line}; {n:,} now\n".encode()
    if is_unedited:
        content["cards"] = content["cards"] | {_CARD: hashlib.sha256(text).hexdigest()}
    return text


def _copy(opened: Artifact, out: pathlib.Path) -> None:
    """Copies an artifact with all that people put into it."""
    recorded = opened.manifest["files"]
    for name in [
        *recorded,
        contents.MANIFEST,
        *contents.others(opened.folder, opened.manifest),
    ]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        take = _link if name in recorded else shutil.copy2
        take(opened.folder / name, out / name)


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links between or on these file systems
        shutil.copyfile(source, target)
