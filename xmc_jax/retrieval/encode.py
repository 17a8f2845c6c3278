"""Encode a split: fixed shapes, one block in flight; to the host, a file, a table or a database.

Each process reads the rows of a block that its devices hold. Tables and databases never leave the
devices, so nothing of the size of a split is on a host unless it is asked for.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xmc_jax import distributed, sharding
from xmc_jax.data.store import Split
from xmc_jax.retrieval import exact
from xmc_jax.types import Inputs

Encode = Callable[[Inputs, jax.Array], jax.Array]
"""Jitted (inputs, ids i32[b]) -> [b, D]; ids are for what a model keeps per item."""


def to_host(
    encode: Encode, split: Split, batch_size: int, mesh: Mesh, ids: np.ndarray | None = None
) -> np.ndarray:
    """f32[n, D] in every process: embeddings of a split's items, in the order of `ids`.

    Args:
        encode: see `Encode`.
        split: the items.
        batch_size: rows per call; the last one is completed with the first item and cut.
        mesh: see `sharding.make_mesh`.
        ids: i32[n] item numbers; all of them by default.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(split, batch_size)
    ids = np.arange(len(split), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    rows = None
    for start, block in _on_host(encode, split, batch_size, mesh, ids):
        if rows is None:
            rows = np.empty((len(ids), block.shape[1]), np.float32)
        rows[start : start + len(block)] = block
    return rows


def to_file(encode: Encode, split: Split, batch_size: int, mesh: Mesh, out: epath.PathLike) -> None:
    """Writes f32[n, D], the embeddings of all items, as .npy; the first process does.

    Args:
        encode: see `Encode`.
        split: the items.
        batch_size: rows per call.
        mesh: see `sharding.make_mesh`.
        out: local or remote. The rows go through a file in the folder for temporary files.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(split, batch_size)
    ids = np.arange(len(split), dtype=np.int32)
    blocks = _on_host(encode, split, batch_size, mesh, ids)
    if not distributed.is_first():
        for _ in blocks:  # all processes encode
            pass
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "rows.npy")
        rows = None
        for start, block in blocks:
            if rows is None:
                shape = (len(ids), block.shape[1])
                rows = np.lib.format.open_memmap(local, "w+", np.float32, shape)
            rows[start : start + len(block)] = block
        rows.flush()
        epath.Path(local).copy(epath.Path(out), overwrite=True)


def to_table(
    encode: Encode, split: Split, batch_size: int, mesh: Mesh, table: jax.ShapeDtypeStruct
) -> jax.Array:
    """The embeddings of all items as a table that stays on the devices.

    Args:
        encode: see `Encode`.
        split: the n items.
        batch_size: rows per call.
        mesh: see `sharding.make_mesh`.
        table: [n, D] with its sharding; rows are cast to its dtype.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(split, batch_size)
    count = len(split)
    starts = _starts(count, batch_size)
    ids = (np.minimum(s + np.arange(batch_size), count - 1) for s in starts)
    rows = jax.numpy.zeros(table.shape, table.dtype, device=table.sharding)
    for start, block in zip(starts, _blocks(encode, split, ids, batch_size, mesh)):
        rows = _write(rows, block, sharding.put_whole(np.int32(start), mesh), split=table.sharding)
    return rows


def to_database(
    encode: Encode, split: Split, batch_size: int, mesh: Mesh, limit: int
) -> exact.Database:
    """The embeddings of all items as a database for `exact.search`, float32.

    Each device encodes its own rows of the database, so that none moves.

    Args:
        encode: see `Encode`.
        split: the n items.
        batch_size: rows per call, over all devices.
        mesh: see `sharding.make_mesh`.
        limit: rows that a search scores at a time on a device, at most.

    Raises:
        ValueError: there is nothing to encode.
    """
    _check(split, batch_size)
    count = len(split)
    shards = sharding.num_shards("batch", mesh)
    (total, _), searched, by_rows = exact.layout(count, 1, mesh, limit)
    per_shard, rows_per_shard = batch_size // shards, total // shards
    starts = _starts(rows_per_shard, per_shard)
    first = rows_per_shard * np.arange(shards)[:, None]
    # What stands past the rows of a shard or of the database is written over, or never searched.
    ids = (
        np.minimum(first + np.minimum(s + np.arange(per_shard), rows_per_shard - 1), count - 1)
        .astype(np.int32)
        .ravel()
        for s in starts
    )
    rows = None
    for start, block in zip(starts, _blocks(encode, split, ids, batch_size, mesh)):
        if rows is None:
            rows = jax.numpy.zeros((total, block.shape[1]), np.float32, device=by_rows)
        rows = _write_shards(rows, block, sharding.put_whole(np.int32(start), mesh), split=by_rows)
    return exact.Database(rows, count, searched)


def _check(split: Split, batch_size: int) -> None:
    if not len(split) or batch_size < 1:
        raise ValueError(
            f"encode: expected at least one item and one row per call, got {len(split)} items and "
            f"batch_size {batch_size}"
        )


def _starts(count: int, size: int) -> list[int]:
    """Where blocks of `size` rows begin that cover `count`; the last may overlap the one before."""
    last = max(count - size, 0)
    return [min(start, last) for start in range(0, count, max(size, 1))]


@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def _write(table: jax.Array, block: jax.Array, start: jax.Array, split: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(_written(table, block, start), split)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="split")
def _write_shards(
    rows: jax.Array, block: jax.Array, start: jax.Array, split: NamedSharding
) -> jax.Array:
    """Writes the rows of a block that each device has at the same place of its own shard."""
    spec = split.spec
    local = jax.shard_map(
        _written, mesh=split.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec
    )
    return local(rows, block, start)


def _written(table: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    rows = block[: len(table)].astype(table.dtype)
    return jax.lax.dynamic_update_slice(table, rows, (start, jax.numpy.zeros_like(start)))


def _on_host(encode, split, batch_size, mesh, ids) -> Iterator[tuple[int, np.ndarray]]:
    """(start, f[m, D]) block by block; one is fetched while the next is computed."""
    starts = range(0, len(ids), batch_size)
    padded = np.concatenate([ids, np.full(-len(ids) % batch_size, ids[0], np.int32)])
    blocks = _blocks(encode, split, (padded[s : s + batch_size] for s in starts), batch_size, mesh)
    for start, block in zip(starts, blocks):
        yield start, sharding.fetch(block)[: len(ids) - start]


def _blocks(
    encode: Encode, split: Split, ids: Iterable[np.ndarray], batch_size: int, mesh: Mesh
) -> Iterator[jax.Array]:
    """`encode` of one block of ids after another, the next one under way when one is given."""
    mine, pending = sharding.local_rows(batch_size, mesh), None
    for block in ids:
        rows = block[mine].astype(np.int32)
        inputs = sharding.put_batch((split.inputs(rows), rows), batch_size, mesh)
        encoded = encode(*inputs)
        if pending is not None:
            yield pending.block_until_ready()
        pending = encoded
    yield pending
