"""Encode a split: fixed shapes, one block in flight; to the host, a file, a table or a database.

Items are encoded by length, so that a block has little padding; there are a few shapes, whatever
the number of items. Each process reads the rows of a block that its devices hold. Tables and
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

from xmc_jax import distributed, report, sharding, stopping
from xmc_jax.data import packing
from xmc_jax.data.store import Split
from xmc_jax.files import array_files, atomic
from xmc_jax.models.fusion import NO_PROMPTS
from xmc_jax.retrieval import exact
from xmc_jax.types import Inputs, Packing, Prompts

Encode = Callable[[Inputs, jax.Array], jax.Array]
"""Jitted (inputs, ids i32[b]) -> [b, D]; ids are for what a model keeps per item."""


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What is encoded, and how.

    Attributes:
        split: the n items.
        batch_size: rows per call, over all devices.
        mesh: see `sharding.make_mesh`.
        prompts: around each text, without what all begin with.
        widths: ascending, of which a block gets the smallest that fits; see `packing.widths`. None
            encodes items in their order and with their padding.
        name: what the items are, for the progress that is shown.
    """

    split: Split
    batch_size: int
    mesh: Mesh
    prompts: Prompts = NO_PROMPTS
    widths: tuple[int, ...] | None = None
    name: str = "items"

    def __len__(self) -> int:
        return len(self.split)

    def lengths(self) -> np.ndarray | None:
        """i64[n], tokens of each item; None if they are not looked at."""
        if self.widths is None:
            return None
        return self.split.own_tokens(np.arange(len(self.split)), self.prompts)


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
    count, lengths = len(items), items.lengths()
    lengths = None if lengths is None else lengths[None]
    order, ids, rooms = _blocks_of(items, lengths, count, items.batch_size)
    order, ids = (x.reshape(len(order), -1) for x in (order, ids))
    rows = jax.numpy.zeros(table.shape, table.dtype, device=table.sharding)
    for places, block in zip(order, _blocks(encode, items, ids, rooms)):
        places = sharding.put_whole(places, items.mesh)
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
    of_shard, per_shard = total // shards, items.batch_size // shards
    lengths = items.lengths()
    if lengths is not None:  # what stands past the last item is that again, and never searched
        lengths = np.pad(lengths, (0, total - count), mode="edge").reshape(shards, of_shard)
    order, rows_of, rooms = _blocks_of(items, lengths, of_shard, per_shard)
    order = np.broadcast_to(order, (len(order), shards, per_shard))
    ids = np.minimum(rows_of + of_shard * np.arange(shards)[:, None], count - 1)
    ids = ids.reshape(len(order), -1)
    rows = None
    for places, block in zip(order, _blocks(encode, items, ids, rooms)):
        if rows is None:
            rows = jax.numpy.zeros((total, block.shape[1]), np.float32, device=by_rows)
        places = sharding.put(places.reshape(-1), by_rows)
        rows = _write_shards(rows, block, places, split=by_rows)
    return exact.Database(rows, count, searched)


def _blocks_of(
    items: Items, lengths: np.ndarray | None, count: int, size: int
) -> tuple[np.ndarray, np.ndarray, list[Packing | None]]:
    """Blocks of numbers below `count`, and their rooms; shortest items first, if packed.

    Args:
        items: see `Items`.
        lengths: i[parts, count]; a block has `size` of each part. None if not packed.
        count: of numbers.
        size: see above.

    Returns:
        i32[blocks, parts, size], `count` for none; the same with a number in its place that the
        block has room for; and the room of each block.
    """
    missing = -count % size
    if lengths is None:
        order = np.arange(count + missing, dtype=np.int32).clip(max=count).reshape(-1, 1, size)
        return order, np.minimum(order, count - 1), [None] * len(order)
    order = np.argsort(lengths, axis=1, kind="stable").astype(np.int32)
    longest = np.take_along_axis(lengths, order, axis=1).max(axis=0)[size - 1 - missing :: size]
    ahead = ((0, 0), (missing, 0))
    blocks = [
        x.reshape(len(lengths), -1, size).swapaxes(0, 1)
        for x in (np.pad(order, ahead, constant_values=count), np.pad(order, ahead, mode="edge"))
    ]
    fitting = np.searchsorted(items.widths, longest)
    rows = items.batch_size // sharding.num_shards("batch", items.mesh)
    return *blocks, [packing.whole(rows, items.widths[i]) for i in fitting]


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
    lengths = items.lengths()
    lengths = None if lengths is None else lengths[None, ids]
    order, chosen, rooms = _blocks_of(items, lengths, len(ids), items.batch_size)
    order, chosen = (x.reshape(len(order), -1) for x in (order, chosen))
    for places, block in zip(order, _blocks(encode, items, ids[chosen], rooms)):
        there = places < len(ids)
        yield places[there], sharding.fetch(block)[there]


def _blocks(
    encode: Encode, items: Items, ids: np.ndarray, rooms: list[Packing | None]
) -> Iterator[jax.Array]:
    """`encode` of one block of ids after another, the next one under way when one is given."""
    size, mesh, pending = items.batch_size, items.mesh, None
    mine = sharding.local_rows(size, mesh)
    with report.Progress(f"encoding {items.name}", len(ids), "block") as progress:
        for block, room in zip(ids, rooms):
            stopping.check()
            rows = block[mine].astype(np.int32)
            inputs, rows = sharding.put_batch((items.split.inputs(rows), rows), size, mesh)
            encoded = encode(inputs.replace(packing=room), rows)
            if pending is not None:
                yield pending.block_until_ready()
                progress.update(1)
            pending = encoded
        yield pending


def _check(items: Items) -> None:
    if not len(items) or items.batch_size < 1:
        raise ValueError(
            f"encode: expected at least one item and one row per call, got {len(items)} items and "
            f"batch_size {items.batch_size}"
        )
