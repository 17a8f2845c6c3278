"""Exact maximum-inner-product search on device: the judge of every index."""

import dataclasses
import functools
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xmc_jax.config import MeshConfig
from xmc_jax.data.csr import Csr
from xmc_jax.runtime import sharding, stopping

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would else multiply in bfloat16 or TF32
# Rows that share a maximum. The k groups of highest maxima hold the k best rows, so that what is
# sorted is few numbers; a sort of all scores would take half as long as the products.
_GROUP = 32
# By default, 268 MB of scores at a time.
QUERY_BLOCK, BLOCK = 256, 262_144
_ROWS = 32_768  # that the host hands over at a time
# Rows excluded of a query are padded to 256, 4,096, ..., so that few programs are compiled.
_EXCLUDED, _GROWTH = 256, 16
_AT_A_TIME = 3  # blocks of queries: one core looks for the best, and the others multiply meanwhile


@dataclasses.dataclass(frozen=True, eq=False)
class Database:
    """What is searched, on the devices, split by rows over the batch axes of the mesh.

    Of S shards, each has the same number of blocks. Shard s holds at its position p the row
    `s * blocks * block + p` of the database: the rows lie in order, and what is past `count` is
    padding, of any finite values.

    Attributes:
        rows: [S * blocks * block, D], float32 or bfloat16, with the sharding of `layout`.
        count: L, rows that are searched.
        block: rows scored at a time on a device.
    """

    rows: jax.Array
    count: int
    block: int

    def __len__(self) -> int:
        return self.count


def layout(
    count: int, width: int, mesh: Mesh, limit: int
) -> tuple[tuple[int, int], int, NamedSharding]:
    """How a database lies on the devices.

    Args:
        count: L.
        width: D.
        mesh: see `sharding.make_mesh`.
        limit: at most this many rows are scored at a time on a device.

    Returns:
        Shape and sharding of `Database.rows`, and between them its `block`.
    """
    shards = sharding.num_shards("batch", mesh)
    rows = -(-count // shards)
    blocks = -(-rows // limit)
    block = -(-rows // blocks)
    whole = -(-block // _GROUP) * _GROUP
    block = whole if whole <= limit else block
    by_rows = NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"]))
    return (shards * blocks * block, width), block, by_rows


def place(database: np.ndarray, mesh: Mesh, limit: int = BLOCK, dtype: str = "float32") -> Database:
    """Hands a database over to the devices, `_ROWS` at a time, which is what the host copies.

    Each process reads the rows of its own devices.

    Args:
        database: [L, D] on the host, perhaps memory-mapped; of any float type.
        mesh: see `sharding.make_mesh`.
        limit: see `layout`.
        dtype: of the rows on the devices, "float32" or "bfloat16".
    """
    count, width = database.shape
    shape, block, by_rows = layout(count, width, mesh, limit)
    parts = []
    # Not make_array_from_callback: its transfers count as implicit ones.
    for device, index in by_rows.addressable_devices_indices_map(shape).items():
        first, end, _ = index[0].indices(shape[0])
        on_device = jax.sharding.SingleDeviceSharding(device)
        part = _zeros((end - first, width), dtype, on_device)
        size = min(_ROWS, end - first)
        for start in range(first, min(end, count), size):
            start = min(start, end - size)  # the last write repeats rows rather than pass the end
            rows = np.zeros((size, width), part.dtype)
            block_rows = database[start : min(start + size, count)]
            rows[: len(block_rows)] = block_rows
            part = _write(part, *jax.device_put((rows, np.int32(start - first)), device))
            part.block_until_ready()  # else the host would hold all blocks
        parts.append(part)
    rows = jax.make_array_from_single_device_arrays(shape, by_rows, parts)
    return Database(rows, count, block)


def from_table(table: jax.Array, mesh: Mesh, limit: int = BLOCK) -> Database:
    """A database of the rows of a table, which is split by width; nothing passes a host.

    Args:
        table: [L, D].
        mesh: of the table; see `sharding.make_mesh`.
        limit: see `layout`.
    """
    count = len(table)
    shape, block, by_rows = layout(count, table.shape[1], mesh, limit)
    pad = jax.jit(_padded, static_argnums=1, out_shardings=by_rows)
    return Database(pad(table, shape[0]), count, block)


def to_host(database: np.ndarray | Database) -> np.ndarray:
    """f32[L, D], the rows of a database, in every process; all processes must call it."""
    if isinstance(database, Database):
        database = sharding.fetch(database.rows)[: database.count]
    return np.asarray(database, np.float32)


def take(database: np.ndarray | Database, rows: np.ndarray) -> np.ndarray | Database:
    """Some rows of a database, i[m], as one; by way of the host. All processes must call it."""
    if not isinstance(database, Database):
        return database[rows]
    mesh = database.rows.sharding.mesh
    return place(to_host(database)[rows], mesh, database.block, str(database.rows.dtype))


def search(
    queries: np.ndarray,
    database: np.ndarray | Database,
    k: int,
    query_block: int = QUERY_BLOCK,
    database_block: int = BLOCK,
    mesh: Mesh | None = None,
    recall_target: float = 1.0,
    excluded: Csr | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the database with the highest inner product, for each query.

    Each device scans its rows in blocks, keeping its best k; one merge ends it. No more than a
    block of scores exists at a time, on a single device three. All processes call it with the same
    queries, and get the same.

    Args:
        queries: f32[Q, D].
        database: [L, D] on the host, which is placed as float32; or on the devices already.
        k: how many, in [1, L].
        query_block: queries per call; one program is compiled for this many, the last is padded.
        database_block: at most this many rows of the database are scored at a time on a device.
        mesh: see `sharding.make_mesh`; the first device alone by default. Like `database_block`,
            not for a database that is on the devices.
        recall_target: below 1, TPUs look for the best of a block by `jax.lax.approx_max_k`, which
            finds this share of them in the mean. Other devices have no such instruction: all is
            found.
        excluded: [Q, L], rows of the database that each query must not find; None for none.

    Returns:
        f32[Q, k] inner products, descending, and i32[Q, k] row numbers; ties go to the lower one.
        -inf and -1 where fewer than k rows are not excluded.

    Raises:
        ValueError: k is not in [1, L], widths differ, or an embedding is not finite.
    """
    queries = np.asarray(queries, np.float32)
    placed = isinstance(database, Database)
    count, width = (database.count, database.rows.shape[1]) if placed else database.shape
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"search: expected queries [Q, {width}], got shape {queries.shape}")
    if not 1 <= k <= count:
        raise ValueError(f"search: expected k in [1, {count}], the rows to search, got {k}")
    if not placed:
        if mesh is None:
            mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
        database = place(database, mesh, database_block)
    mesh = database.rows.sharding.mesh
    bad = [("queries", row) for row in np.flatnonzero(~np.isfinite(queries).all(axis=1))]
    row = int(jax.device_get(_first_not_finite(database.rows)))
    bad += [("database", row)] if row < count else []
    if bad:
        name, row = bad[0]
        raise ValueError(f"search: expected finite embeddings, got row {row} of {name} not so")
    searched = depth(database, k)

    def block(start: int) -> tuple[np.ndarray, np.ndarray]:
        stopping.check()
        rows = np.zeros((query_block, width), np.float32)
        part = queries[start : start + query_block]
        rows[: len(part)] = part
        without = None
        if excluded is not None:
            numbers = np.arange(start, start + len(part))
            without = excluded_rows(excluded.take(numbers), query_block)
        rows, without, valid = sharding.put_whole((rows, without, np.int32(count)), mesh)
        best = search_block(
            rows,
            database.rows,
            valid,
            without,
            k=searched,
            block=database.block,
            mesh=mesh,
            recall_target=recall_target,
        )
        return tuple(x[: len(part), :k] for x in jax.device_get(best))

    scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    starts = range(0, len(queries), query_block)
    # Several devices must be given their programs in one order, so one after the other.
    with futures.ThreadPoolExecutor(_AT_A_TIME if mesh.size == 1 else 1) as pool:
        for start, best in zip(starts, pool.map(block, starts)):
            for out, values in zip((scores, ids), best):
                out[start : start + query_block] = values
    return scores, ids


def depth(database: Database, k: int) -> int:
    """How many rows `search_block` looks for where k are wanted, so that few programs differ.

    Where all rows are wanted it looks for padding, too: databases that lie alike share a program.
    """
    return k if k < database.count else len(database.rows)


def excluded_counts(most: int) -> list[int]:
    """Numbers of excluded rows, one for each program that searches without up to `most` need."""
    counts, width = [0], 0
    while width < most:
        counts.append(width + 1)
        width = max(_EXCLUDED, width * _GROWTH)
    return counts


def excluded_rows(excluded: Csr, size: int) -> np.ndarray | None:
    """i32[size, X], what `search_block` takes of at most `size` queries; None if none has any."""
    counts = excluded.counts()
    most, width = int(counts.max(initial=0)), _EXCLUDED
    if not most:
        return None
    while width < most:
        width *= _GROWTH
    out = np.full((size, width), -1, np.int32)
    place = np.arange(len(excluded.indices)) - np.repeat(excluded.indptr[:-1], counts)
    out[excluded.row_ids(), place] = excluded.indices
    return out


def _padded(table: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(table, ((0, rows - len(table)), (0, 0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, device):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), device)


@functools.partial(jax.jit, donate_argnums=0)
def _write(rows, block, start):
    return jax.lax.dynamic_update_slice(rows, block, (start, jnp.zeros_like(start)))


@jax.jit
def _first_not_finite(rows: jax.Array) -> jax.Array:
    """i32[]: the first row that has a NaN or an infinity; as many as there are rows if none has."""
    finite = jnp.isfinite(rows).all(axis=1)
    number = jnp.arange(len(rows), dtype=jnp.int32)
    return jnp.min(jnp.where(finite, len(rows), number))


@functools.partial(jax.jit, static_argnames=("k", "block", "mesh", "recall_target"))
def search_block(
    queries,
    database,
    count,
    excluded=None,
    *,
    k: int,
    block: int,
    mesh: Mesh,
    recall_target: float = 1.0,
):
    """The k best rows of each query of a block, see `search`.

    Args:
        queries: f32[q, D].
        database: `Database.rows`.
        count: i32[], rows past it are padding.
        excluded: i32[q, X] row numbers that each query must not find, -1 for none; or None.
        k: see `search`; padding counts.
        block: see `Database`.
        mesh: of the database.
        recall_target: see `search`.

    Returns:
        f32[q, k] and i32[q, k]; -inf and -1 where there are no more.
    """
    axes = sharding.RULES["batch"]

    def local(queries, rows, count, excluded):
        first, width = jax.lax.axis_index(axes) * len(rows), rows.shape[1]

        def search(part):
            number, vectors = part
            vectors = vectors.astype(queries.dtype)
            scores = jnp.einsum("qd,ld->ql", queries, vectors, precision=_HIGHEST)
            start = first + number * block
            if excluded is not None:
                columns = excluded - start
                columns = jnp.where(columns < 0, block, columns)  # which is past the end
                query = jnp.arange(len(queries))[:, None]
                scores = scores.at[query, columns].set(-jnp.inf, mode="drop")
            best, columns = _best(scores, min(k, block), count - start, recall_target)
            return best, start + columns

        blocks = len(rows) // block
        parts = jnp.arange(blocks, dtype=jnp.int32), rows.reshape(-1, block, width)
        merged = (jnp.concatenate(list(x), axis=1) for x in jax.lax.map(search, parts))
        return _merged(k, blocks, *merged)

    per_device = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(None, axes),
    )
    shards = sharding.num_shards("batch", mesh)
    scores, ids = _merged(k, shards, *per_device(queries, database, count, excluded))
    best = scores, jnp.where(scores > -jnp.inf, ids, -1)
    return jax.lax.with_sharding_constraint(best, sharding.replicated(mesh))


def _merged(k: int, parts: int, scores: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The k best of sorted parts side by side; earlier parts have lower ids, and so win ties."""
    return (scores, ids) if parts == 1 else _top(min(k, scores.shape[1]), scores, ids)


def _best(
    scores: jax.Array, k: int, count: jax.Array, recall_target: float
) -> tuple[jax.Array, jax.Array]:
    """`top_k` of the first `count` (i32[]) columns of f32[q, n]; of equal ones the first."""
    n = scores.shape[1]

    def exact(scores):
        if n % _GROUP or n < 4 * k * _GROUP:
            return tuple(jax.lax.top_k(_masked(scores, jnp.arange(n), count), k))
        return _by_groups(scores, k, count)

    def approximate(scores):
        scores = _masked(scores, jnp.arange(n), count)
        return tuple(jax.lax.approx_max_k(scores, k, recall_target=recall_target))

    if recall_target == 1:
        return exact(scores)
    return jax.lax.platform_dependent(scores, tpu=approximate, default=exact)


def _by_groups(scores: jax.Array, k: int, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_best` by the maxima of groups of columns; n is a multiple of `_GROUP`.

    Of groups with equal maxima the first are taken, so the groups that are left out hold nothing
    that comes before any of k columns of the others.
    """
    q, n = scores.shape
    groups, member = scores.reshape(q, -1, _GROUP), jnp.arange(_GROUP)
    # The mask is left out of the maximum of all, which on CPU would take ten times as long: the
    # group that `count` is in is looked at once more.
    cut = jnp.clip(count // _GROUP, 0, n // _GROUP - 1)
    ragged = jax.lax.dynamic_index_in_dim(groups, cut, axis=1, keepdims=False)
    maxima = groups.max(axis=2)
    maxima = maxima.at[:, cut].set(_masked(ragged, cut * _GROUP + member, count).max(axis=1))
    maxima = _masked(maxima, _GROUP * jnp.arange(n // _GROUP), count)
    chosen = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=1)[..., None]
    columns = (chosen * _GROUP + member).reshape(q, -1)  # ascending: of equal ones the first
    values = jnp.take_along_axis(groups, chosen, axis=1, mode="clip").reshape(q, -1)
    return _top(k, _masked(values, columns, count), columns)


def _masked(scores: jax.Array, columns: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(columns < count, scores, -jnp.inf)


def _top(k: int, scores: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    scores, position = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, position, axis=1)
