"""Encode a split: fixed shapes, one block in flight; to the host, a file, a table or a database.

All items of a split are laid out in rows at once, see `data.rows`. Rows of few long items and rows
of many short ones are dealt to the blocks in turn, so that these have about as many items, and one
program serves all. Each process reads the items of the rows that its devices hold. Tables and
databases never leave the devices, so nothing of the size of a split is on a host unless it is asked
for.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding

from xmc_jax.data import rows as row_layout
from xmc_jax.data.store import Split
from xmc_jax.data.types import Rows
from xmc_jax.files import array_files, atomic
from xmc_jax.retrieval import exact
from xmc_jax.runtime import distributed, metrics_log, sharding, stopping

Encode = Callable[[Rows, jax.Array], jax.Array]
"""Jitted (rows of b slots, ids i32[b]) -> [b, D]; ids are for what a model keeps per item."""


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What is encoded, and how.

    Attributes:
        split: the n items.
        batch_size: about as many per call, over all devices.
        mesh: see `sharding.make_mesh`.
        layout: how they become rows.
        name: what the items are, for the progress that is shown.
    """

    split: Split
    batch_size: int
    mesh: Mesh
    layout: row_layout.Layout
    name: str = "items"

    def __len__(self) -> int:
        return len(self.split)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """i64[n], own tokens of some items."""
        return self.split.own_tokens(ids, self.layout.prompts)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What each call encodes.

    Attributes:
        order: i32[blocks, shards, m], the item in each slot; n for none.
        fitted: where the n items lie in the rows of their block and shard.
        rows: of each shard of a block.
    """

    order: np.ndarray
    fitted: row_layout.Fit
    rows: int


def to_host(encode: Encode, items: Items, ids: np.ndarray | None = None) -> np.ndarray:
    """f32[n, D] in every process: embeddings of items, in the order of `ids`.

    Args:
        encode: see `Encode`.
        items: see `Items`.
        ids: i32[n] item numbers; all of them by default.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(items)
    ids = np.arange(len(items), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    rows = None
    for places, block in _on_host(encode, items, ids):
        if rows is None:
            rows = np.empty((len(ids), block.shape[1]), np.float32)
        rows[places] = block
    return rows


def to_file(encode: Encode, items: Items, out: epath.PathLike) -> None:
    """Writes f32[n, D], the embeddings of all items, as .npy; the first process does.

    Args:
        encode: see `Encode`.
        items: see `Items`.
        out: local or remote; replaced when all rows are there.

    Raises:
        ValueError: there is nothing to encode.
        OSError: the disk is too small.
    """
    _check(items)
    blocks = _on_host(encode, items, np.arange(len(items), dtype=np.int32))
    if not distributed.is_first():
        for _ in blocks:  # all processes encode
            pass
        return
    with atomic.replaced(out) as file:
        rows = None
        for places, block in blocks:
            if rows is None:
                shape = (len(items), block.shape[1])
                rows = array_files.create(file, np.float32, shape)
            rows[places] = block
        rows.flush()


def to_table(encode: Encode, items: Items, table: jax.ShapeDtypeStruct) -> jax.Array:
    """The embeddings of all items as a table that stays on the devices.

    Args:
        encode: see `Encode`.
        items: see `Items`.
        table: [n, D] with its sharding; rows are cast to its dtype.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(items)
    ids = np.arange(len(items), dtype=np.int32)
    blocks = _blocks_of(items, ids)
    rows = jax.numpy.zeros(table.shape, table.dtype, device=table.sharding)
    for places, block in zip(blocks.order, _encoded(encode, items, ids, blocks)):
        places = sharding.put_whole(places.reshape(-1), items.mesh)
        rows = _write(rows, block, places, split=table.sharding)
    return rows


def to_database(encode: Encode, items: Items, limit: int) -> exact.Database:
    """The embeddings of all items as a database for `exact.search`, float32.

    Each device encodes its own rows of the database, so that none moves.

    Args:
        encode: see `Encode`.
        items: see `Items`.
        limit: rows that a search scores at a time on a device, at most.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(items)
    count, mesh = len(items), items.mesh
    shards = sharding.num_shards("batch", mesh)
    (total, _), searched, by_rows = exact.layout(count, 1, mesh, limit)
    of_shard, ids = total // shards, np.arange(count, dtype=np.int32)
    blocks = _blocks_of(items, ids, shards, of_shard)
    first = of_shard * np.arange(shards)[:, None]
    local = np.where(blocks.order < count, blocks.order - first, of_shard).astype(np.int32)
    rows = None
    for places, block in zip(local, _encoded(encode, items, ids, blocks)):
        if rows is None:
            rows = jax.numpy.zeros((total, block.shape[1]), np.float32, device=by_rows)
        places = sharding.put(places.reshape(-1), by_rows)
        rows = _write_shards(rows, block, places, split=by_rows)
    return exact.Database(rows, count, searched)


def _blocks_of(items: Items, ids: np.ndarray, parts: int = 1, size: int | None = None) -> _Blocks:
    """Divides items into blocks of as many rows.

    Args:
        items: see `Items`.
        ids: i32[n], which items.
        parts: of the n that stay on devices of their own; of one, rows go to all devices.
        size: of the n in each part; the last parts may have fewer.
    """
    n, shards = len(ids), sharding.num_shards("batch", items.mesh)
    part = np.arange(n) // (size or n)
    fitted = row_layout.fit(items.layout, items.lengths(ids), part)
    most, devices = fitted.rows, shards // parts  # rows of a part, and what they are divided over
    rows = -(-most * items.batch_size // (n * devices))  # so that as many items are in a block
    blocks = -(-most // (rows * devices))
    rows = -(-most // (blocks * devices))
    block, number = fitted.row % blocks, fitted.row // blocks
    shard = part * devices + number % devices
    where = block * shards + shard
    by_block = np.argsort(where, kind="stable")
    counts = np.bincount(where, minlength=blocks * shards)
    turn = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.full((blocks * shards, counts.max()), n, np.int32)
    order[where[by_block], turn] = by_block
    fitted = dataclasses.replace(fitted, group=shard, row=number // devices)
    return _Blocks(order.reshape(blocks, shards, -1), fitted, rows)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def _write(
    table: jax.Array, block: jax.Array, places: jax.Array, split: NamedSharding
) -> jax.Array:
    return jax.lax.with_sharding_constraint(_written(table, block, places), split)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def _write_shards(
    rows: jax.Array, block: jax.Array, places: jax.Array, split: NamedSharding
) -> jax.Array:
    """Writes the rows of a block that each device has into its own shard."""
    spec = split.spec
    local = jax.shard_map(_written, mesh=split.mesh, in_specs=(spec, spec, spec), out_specs=spec)
    return local(rows, block, places)


def _written(table: jax.Array, block: jax.Array, places: jax.Array) -> jax.Array:
    return table.at[places].set(block.astype(table.dtype), mode="drop")


def _on_host(encode, items: Items, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places i[m] in `ids`, f[m, D]) by block; one is fetched while the next is computed."""
    blocks = _blocks_of(items, ids)
    for places, block in zip(blocks.order, _encoded(encode, items, ids, blocks)):
        there = places.reshape(-1) < len(ids)
        yield places.reshape(-1)[there], sharding.fetch(block)[there]


def _encoded(encode, items: Items, ids: np.ndarray, blocks: _Blocks) -> Iterator[jax.Array]:
    """`encode` of one block of ids after another, the next one under way when one is given."""
    shards, mesh, pending = sharding.num_shards("batch", items.mesh), items.mesh, None
    mine = sharding.local_rows(shards, mesh)
    with metrics_log.Progress(f"encoding {items.name}", len(blocks.order), "block") as progress:
        for order in blocks.order:
            stopping.check()
            slots = order[mine].reshape(-1)
            at = np.flatnonzero(slots < len(ids))
            chosen, of_slots = slots[at], np.zeros(len(slots), np.int32)
            of_slots[at] = ids[chosen]
            group = np.searchsorted(mine, blocks.fitted.group[chosen])
            rows = row_layout.compose(
                items.layout,
                items.split.inputs(ids[chosen]),
                blocks.fitted.take(chosen, group),
                *(blocks.rows, at, slots.shape, len(mine)),
            )
            encoded = encode(*sharding.put_batch((rows, of_slots), shards, mesh))
            if pending is not None:
                yield pending.block_until_ready()
                progress.update(1)
            pending = encoded
        stopping.check()
        yield pending


def _check(items: Items) -> None:
    if not len(items) or items.batch_size < 1:
        raise ValueError(
            f"encode: expected at least one item and one per call, got {len(items)} items and "
            f"batch_size {items.batch_size}"
        )
