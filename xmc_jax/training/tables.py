"""Tables kept across steps: the document bank, label centroids, and which free vector a label uses.

Everything here is deterministic on CPU. `centroids_of` adds rows by scatter, whose order on GPUs is
fixed only under XLA's `--xla_gpu_deterministic_ops=true`; the other writes are to distinct rows.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from xmc_jax.config import TablesConfig
from xmc_jax.runtime import sharding
from xmc_jax.runtime.wording import counted
from xmc_jax.training import curriculum
from xmc_jax.training.state import Tables

PAIRS = 16384  # of a document and a label, that are added to the centroids at a time
_IN_FLIGHT = 32  # blocks of pairs on the devices, or on their way


@flax.struct.dataclass
class PairBlocks:
    """The (document, label) pairs of the training set, by label, in blocks of one size.

    They stay on the host: 8 bytes per pair.

    Attributes:
        documents: i32[blocks, size], ascending within a label.
        labels: i32[blocks, size], ascending; L in the padding of the last block.
        counts: f32[L], documents of each label, 1 for a label without any.
    """

    documents: np.ndarray
    labels: np.ndarray
    counts: np.ndarray


def label_pairs(
    indptr: np.ndarray, indices: np.ndarray, num_labels: int, block: int = PAIRS
) -> PairBlocks:
    """The pairs of a CSR of positives.

    50M pairs take seconds, and for that time 1.2 GB.

    Args:
        indptr: i64[N + 1].
        indices: i32[nnz], labels of each document, all different.
        num_labels: L.
        block: pairs per block, which bounds what `centroids_of` holds at a time.
    """
    # Sorted as one number, label before document: several times as fast as an argsort of labels.
    keys = np.asarray(indices).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.repeat(np.arange(len(indptr) - 1, dtype=np.uint32), np.diff(indptr))
    keys.sort()
    block = max(min(block, len(keys)), 1)
    blocks = -(-len(keys) // block)
    documents, labels = np.zeros((2, blocks * block), np.int32)
    documents[: len(keys)] = keys & np.uint64(0xFFFFFFFF)
    labels[: len(keys)] = keys >> np.uint64(32)
    labels[len(keys) :] = num_labels
    counts = np.bincount(indices, minlength=num_labels).astype(np.float32)
    return PairBlocks(
        documents=documents.reshape(blocks, block),
        labels=labels.reshape(blocks, block),
        counts=np.maximum(counts, 1),
    )


def centroids_of(bank: jax.Array, pairs: PairBlocks) -> jax.Array:
    """The mean embedding of each label's training documents, not normalised again.

    The pairs are handed over block by block; sums and bank stay split by width, so that adding a
    block is local to each device. Beside the bank, a device holds its part of the sums in float32.

    Args:
        bank: [N, D], unit embeddings of the training documents.
        pairs: of `label_pairs`, on the host; the same on all processes.

    Returns:
        [L, D] of the bank's dtype, split as the bank, summed in float32; 0 for a label without
        training documents.

    Source: PRIME; ViXML reference, utils.py, train (pyxclib, compute_centroid).
    """
    return _means(bank, pairs).astype(bank.dtype)


def _means(bank: jax.Array, pairs: PairBlocks) -> jax.Array:
    """`centroids_of`, float32 (or more, as the bank)."""
    mesh = sharding.mesh_of(bank)
    dtype = jnp.promote_types(bank.dtype, jnp.float32)
    sums = _zeros((len(pairs.counts), bank.shape[1]), dtype, mesh)
    for i, (documents, labels) in enumerate(zip(pairs.documents, pairs.labels)):
        if i % _IN_FLIGHT == 0:
            sums.block_until_ready()  # else all blocks would wait on the devices
        sums = add_pairs(sums, bank, documents, labels, mesh=mesh)
    return _divide(sums, pairs.counts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, int], dtype: jnp.dtype, mesh: Mesh) -> jax.Array:
    by_width = sharding.named((None, "table_width"), shape, mesh, "sums")
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), by_width)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="mesh")
def add_pairs(
    sums: jax.Array, bank: jax.Array, documents: jax.Array, labels: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """Adds rows of the bank to the sums of their labels, which ascend; L and more is dropped."""

    def local(sums, bank, documents, labels):
        rows = bank.at[documents].get(mode="promise_in_bounds").astype(sums.dtype)
        return sums.at[labels].add(rows, mode="drop", indices_are_sorted=True)

    table = sharding.spec((None, "table_width"), bank.shape, mesh, "bank")
    whole = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(table, table, whole, whole), out_specs=table)(
        sums, bank, documents, labels
    )


@functools.partial(jax.jit, donate_argnums=0)
def _divide(sums: jax.Array, counts: jax.Array) -> jax.Array:
    return sums / counts[:, None]


@jax.named_scope("tables")
def leave_one_out(
    centroids: jax.Array, frequency: jax.Array, document_unit: jax.Array
) -> jax.Array:
    """The centroids of documents' labels, each without that document.

    Args:
        centroids: [m, D], rows of the centroids, for m pairs of a document and a label.
        frequency: f32[m], training documents of each of these labels.
        document_unit: [m, D], the documents' rows of the bank that the centroids are means of.

    Returns:
        f32[m, D], or more as the centroids; 0 for a label without another document.
    """
    n, dtype = frequency[..., None], jnp.promote_types(centroids.dtype, jnp.float32)
    rest = n * centroids.astype(dtype) - document_unit.astype(dtype)
    return jnp.where(n > 1, rest / jnp.maximum(n - 1, 1), 0)


def write_rows(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
    """`table` with `rows` written at `ids`; of several writes to one row the last, by position.

    Args:
        table: [n, D].
        ids: i32[m]; those outside the table are dropped.
        rows: [m, D], cast to the table's dtype.
    """
    num_rows, num_writes = table.shape[0], len(ids)
    by_id = jnp.argsort(ids)  # stable: the writes to one row stay in order
    last = jnp.append(ids[by_id][1:] != ids[by_id][:-1], True)
    last = jnp.zeros(num_writes, bool).at[by_id].set(last, unique_indices=True)
    # Indices past the table are dropped; all different, they keep the promise of unique_indices.
    targets = jnp.where(last, ids, num_rows + jnp.arange(num_writes))
    return table.at[targets].set(rows.astype(table.dtype), mode="drop", unique_indices=True)


def ema_update(
    centroids: jax.Array, label_ids: jax.Array, document_unit: jax.Array, decay: float
) -> jax.Array:
    """Moves the centroid of each label of a batch towards the document it was sampled for.

    Args:
        centroids: [L, D].
        label_ids: i32[U], column `i * (U / B) + p` sampled for document i; of a repeated label the
            last counts.
        document_unit: f32[B, D].
        decay: what a centroid keeps of itself.

    Source: ViXML reference, utils.py, train. PRIME's published code moves a centroid towards
        itself.
    """
    rows = jnp.repeat(document_unit, len(label_ids) // len(document_unit), axis=0)
    old = centroids[label_ids].astype(rows.dtype)
    return write_rows(centroids, label_ids, decay * old + (1 - decay) * rows)


@jax.named_scope("tables")
def after_step(
    tables: Tables,
    document_ids: jax.Array,
    document_unit: jax.Array,
    label_ids: jax.Array,
    cfg: TablesConfig,
) -> Tables:
    """The tables after a training step: the documents' rows, and with "ema" the labels' centroids.

    Args:
        tables: before it.
        document_ids: i32[B].
        document_unit: f32[B, D].
        label_ids: i32[U], as in `ema_update`.
        cfg: see `TablesConfig`.
    """
    tables = tables.replace(
        document_bank=write_rows(tables.document_bank, document_ids, document_unit)
    )
    if cfg.centroids == "ema" and tables.centroids is not None:
        moved = ema_update(tables.centroids, label_ids, document_unit, cfg.ema_decay)
        tables = tables.replace(centroids=moved)
    return tables


def num_free_vectors(num_labels: int, shared: int, private: int) -> int:
    """C: the private free vectors, and as many shared ones as can be used.

    Args:
        num_labels: L.
        shared: free vectors shared by clusters of labels; more than there are labels are not made.
        private: free vectors of the most frequent labels, one each.

    Raises:
        ValueError: no free vector, more private ones than labels, or a number of shared ones that
            balanced halving cannot make.
    """
    clustered = num_labels - private
    if not 0 <= private <= num_labels:
        most = counted(num_labels, "label")
        raise ValueError(f"prime.private_vectors: expected 0 to {most}, got {private}")
    if shared < 1:
        raise ValueError(f"prime.free_vectors: expected at least 1, got {shared}")
    if shared >= clustered:
        return num_labels
    if shared & (shared - 1):
        below = 1 << (shared.bit_length() - 1)
        raise ValueError(
            f"prime.free_vectors: expected a power of two, or at least {clustered}, the labels "
            f"without a private vector, got {shared}; nearest: {below}, {min(2 * below, clustered)}"
        )
    return private + shared


def free_vector_map(
    label_unit: jax.Array, frequency: np.ndarray, shared: int, private: int, key: jax.Array
) -> np.ndarray:
    """Which free vector each label uses, for the whole run.

    Rows 0 to `private` - 1 belong to the most frequent labels, one each, in order of falling
    frequency (ties to the lower label). The other labels share the rows that follow by balanced
    clusters of their embeddings; where there are as many rows as labels, each has its own.

    Args:
        label_unit: [L, D], embeddings of the label texts by the untrained model, float32 or
            bfloat16; a table, whole or split by width.
        frequency: i64[L] on the host, training documents of each label.
        shared: see `num_free_vectors`.
        private: see `num_free_vectors`.
        key: device key, of the KMEANS stream.

    Returns:
        i32[L] on the host, the same on all processes, in
        [0, num_free_vectors(L, shared, private)).

    Raises:
        ValueError: see `num_free_vectors`.

    Source: PRIME; DEXA; ViXML reference, utils.py, update_clusters.
    """
    # Departs: the reference rounds `shared` up to a power of two, past its own table of vectors,
    # and never ends where that exceeds the labels; here the one is refused and the other gives own
    # vectors.
    num_labels = len(label_unit)
    rows = num_free_vectors(num_labels, shared, private)
    by_frequency = np.argsort(-np.asarray(frequency, np.int64), kind="stable")
    head, tail = by_frequency[:private], np.sort(by_frequency[private:])
    if rows == num_labels:
        of_tail = np.arange(len(tail))
    else:
        _, leaf_of = curriculum.balanced_kmeans(label_unit, shared, key, rows=tail)
        of_tail = jax.device_get(leaf_of)[tail]
    vector_of = np.empty(num_labels, np.int32)
    vector_of[head] = np.arange(private)
    vector_of[tail] = private + of_tail
    return vector_of


def cluster_means(label_unit: jax.Array, free_vector_of: np.ndarray, num_rows: int) -> jax.Array:
    """Initial free vectors: the mean embedding of the labels that use each.

    Args:
        label_unit: [L, D], as in `free_vector_map`.
        free_vector_of: i32[L], of `free_vector_map`.
        num_rows: C.

    Returns:
        f32[C, D], split by width as `label_unit`; 0 for a vector that no label uses.

    Source: ViXML reference, utils.py, initialize_clusters (`--init_fv_w_embeddings`).
    """
    one_each = np.arange(len(free_vector_of) + 1)
    return _means(label_unit, label_pairs(one_each, np.asarray(free_vector_of), num_rows))
