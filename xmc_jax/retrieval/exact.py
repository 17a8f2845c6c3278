"""Exact maximum-inner-product search on device: the judge of every index."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xmc_jax import sharding

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would else multiply in bfloat16 or TF32


def search(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    query_block: int = 512,
    database_block: int = 32_768,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the database with the highest inner product, for each query.

    The database is split by rows over the batch axes of the mesh. Each device scans its rows in
    blocks, keeping its best k; one merge ends it. No more than a block of scores exists at a time.

    Args:
        queries: f32[Q, D].
        database: f32[L, D].
        k: how many, in [1, L].
        query_block: queries per call; one program is compiled for this many, the last is padded.
        database_block: at most this many rows of the database are scored at a time on a device.
        mesh: see `sharding.make_mesh`; the first device alone by default.

    Returns:
        f32[Q, k] inner products, descending, and i32[Q, k] row numbers; ties go to the lower one.

    Raises:
        ValueError: k is not in [1, L], widths differ, or an embedding is not finite.
    """
    queries, database = np.asarray(queries, np.float32), np.asarray(database, np.float32)
    count, width = database.shape
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"search: expected queries [Q, {width}], got shape {queries.shape}")
    if not 1 <= k <= count:
        raise ValueError(f"search: expected k in [1, {count}], the rows to search, got {k}")
    for name, x in (("queries", queries), ("database", database)):
        if not np.isfinite(x).all():
            row = int(np.argmin(np.isfinite(x).all(axis=1)))
            raise ValueError(f"search: expected finite embeddings, got row {row} of {name} not so")
    if mesh is None:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
    placed, block = _place(database, database_block, mesh)
    replicated = sharding.replicated(mesh)
    scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    for start in range(0, len(queries), query_block):
        rows = np.zeros((query_block, width), np.float32)
        part = queries[start : start + query_block]
        rows[: len(part)] = part
        best = _search_block(
            jax.device_put(rows, replicated), placed, k=k, count=count, block=block, mesh=mesh
        )
        for out, values in zip((scores, ids), jax.device_get(best)):
            out[start : start + len(part)] = values[: len(part)]
    return scores, ids


def _place(database: np.ndarray, limit: int, mesh: Mesh) -> tuple[jax.Array, int]:
    """The database on the devices, padded to `shards * blocks * block` rows; and `block`."""
    count, width = database.shape
    shards = int(np.prod([mesh.shape[axis] for axis in sharding.RULES["batch"]]))
    rows = -(-count // shards)
    blocks = -(-rows // limit)
    block = -(-rows // blocks)
    shape = (shards * blocks * block, width)

    def put(device, index):
        start, stop, _ = index[0].indices(shape[0])
        part = database[start:stop]
        return jax.device_put(np.pad(part, ((0, stop - start - len(part)), (0, 0))), device)

    placed = NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"]))
    # Not make_array_from_callback: its transfers count as implicit ones.
    parts = [put(*item) for item in placed.addressable_devices_indices_map(shape).items()]
    return jax.make_array_from_single_device_arrays(shape, placed, parts), block


@functools.partial(jax.jit, static_argnames=("k", "count", "block", "mesh"))
def _search_block(queries, database, *, k: int, count: int, block: int, mesh: Mesh):
    """(f32[q, k], i32[q, k]) of a block of queries; database rows past `count` are padding."""
    axes = sharding.RULES["batch"]

    def local(queries, rows):
        first = jax.lax.axis_index(axes) * len(rows)

        def step(best, part):
            number, vectors = part
            scores = jnp.einsum("qd,ld->ql", queries, vectors, precision=_HIGHEST)
            ids = first + number * block + jnp.arange(block)
            scores = jnp.where(ids < count, scores, -jnp.inf)
            scores, position = jax.lax.top_k(scores, min(k, block))
            merged = zip(best, (scores, ids[position]))
            return _top(k, *(jnp.concatenate(pair, axis=1) for pair in merged)), None

        # Earlier blocks come first in the merge, and top_k takes the first of equals: lower ids.
        shape = (len(queries), k)
        start = jnp.full(shape, -jnp.inf), jnp.full(shape, count, jnp.int32)
        start = jax.lax.pcast(start, axes, to="varying")
        parts = jnp.arange(len(rows) // block), rows.reshape(-1, block, rows.shape[1])
        return jax.lax.scan(step, start, parts)[0]

    per_device = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes)),
        out_specs=PartitionSpec(None, axes),
    )
    best = _top(k, *per_device(queries, database))
    return jax.lax.with_sharding_constraint(best, sharding.replicated(mesh))


def _top(k: int, scores: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores, position = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, position, axis=1)
