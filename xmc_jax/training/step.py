"""The pure functions of training: the step, encoding, and the prototypes of labels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xmc_jax.config import LossConfig, TablesConfig
from xmc_jax.data.types import Batch, Rows
from xmc_jax.models import layers
from xmc_jax.models.dual import DualEncoder, EncoderOutput
from xmc_jax.runtime import rng, sharding
from xmc_jax.training import objective, optimizer, tables
from xmc_jax.training.state import Health, Pairs, Tables, TrainState


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step needs besides arrays; all static.

    Attributes:
        model: the Siamese tower with its label prototype network.
        transform: from `optimizer.build`.
        loss: which objective.
        tables: how centroids are kept.
        n_chunks: parts in which a batch is encoded; with more than one, activations are
            recomputed in the backward pass, so that memory is that of one part (gradient caching).
        seed: of the run.
    """

    model: DualEncoder
    transform: optimizer.AdamW
    loss: LossConfig
    tables: TablesConfig
    n_chunks: int
    seed: int

    def train(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        """One optimizer step; of numbers that are not finite, none reaches parameters or tables.

        Args:
            state: donated by the caller.
            frozen: parameters that get no gradient.
            batch: of B documents, B divisible by `n_chunks`, with sampled labels or with positives.

        Returns:
            The next state, and f32[] metrics: those of `objective.objective`, `grad_norm`,
            `update_norm`, `learning_rate` (the largest of the groups') and `tokens` (of the
            items encoded, see `_tokens`); with them, as "health", a `Health`.

        Source: ViXML sec. 3.1, supp. A; reference utils.py, train.
        """
        key = rng.key(self.seed, rng.Stream.DROPOUT, state.step)
        positive = rng.key(self.seed, rng.Stream.POSITIVE, state.step)
        compare = self._with_sampled if batch.positives is None else self._with_all

        def loss_of(params):
            params = optimizer.merge(params, frozen)
            pairs = compare(params, state.tables, batch, key)
            loss, metrics = objective.objective(pairs, positive, self.loss)
            return loss, (metrics, jax.lax.stop_gradient(pairs))

        grads, (metrics, pairs) = jax.grad(loss_of, has_aux=True)(state.params)
        label_ids = None if batch.columns is None else batch.label_ids[batch.columns]
        metrics["grad_norm"] = optax.tree.norm(grads)
        health = _health(pairs, label_ids, grads, metrics)
        moved = label_ids
        if self.tables.centroids == "ema" and batch.relevance is not None:
            # A document without labels has random ones, whose centroids stay.
            labelled = jnp.repeat(
                batch.relevance.any(axis=1), len(label_ids) // len(batch.relevance)
            )
            moved = _where(labelled, label_ids, state.tables.centroids)
        updates, opt_state = self.transform.update(grads, state.opt_state, state.params)
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["learning_rate"] = self.transform.learning_rate(state.opt_state)
        metrics["tokens"] = _tokens(batch).astype(jnp.float32)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(health.finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            tables=tables.after_step(
                state.tables,
                _where(health.finite, batch.document_ids, state.tables.document_bank),
                sharding.batch_to_width(pairs.document),
                _where(health.finite, moved, state.tables.centroids),
                self.tables,
            ),
        )
        return state, metrics | {"health": health}

    def encode(self, params: Any, frozen: Any, rows: Rows) -> EncoderOutput:
        """Embeddings without dropout. `params` and `frozen` as in `train`."""
        return self.model.apply({"params": optimizer.merge(params, frozen)}, rows, method="encode")

    def prototype(
        self, params: Any, frozen: Any, t: Tables, label_ids: jax.Array, pooled: jax.Array
    ) -> jax.Array:
        """What the index holds: f32[n, D] unit prototypes with PRIME, label embeddings without.

        Args:
            params: see `train`.
            frozen: see `train`.
            t: the tables.
            label_ids: i32[n].
            pooled: f32[n, D], of the texts of these labels.
        """
        return self._prototype(optimizer.merge(params, frozen), t, label_ids, pooled, None)

    def _prototype(self, params, t, label_ids, pooled, key, centroids=None) -> jax.Array:
        if self.model.prime is None:
            return layers.normalize(pooled)
        if centroids is None:
            centroids = layers.wide(sharding.rows(t.centroids, label_ids))
        return self.model.apply(
            {"params": params},
            pooled,
            t.free_vector_of[label_ids],
            centroids,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
            method="prototype",
        )

    def _with_sampled(self, params: Any, t: Tables, batch: Batch, key: jax.Array) -> Pairs:
        """Documents and the labels sampled for them, which are encoded, with gradient.

        Each document goes through the tower next to slots of labels: the first axis stays that of
        the batch's sharding, and taking every n-th row for a chunk gives each device its share of
        it, so nothing moves.
        """
        encode_key, prototype_key = jax.random.split(key)
        output = in_chunks(self._encode, params, batch.items, encode_key, self.n_chunks)
        document_unit = output.unit[:, 0]
        label = jax.tree.map(lambda x: x[:, 1:].reshape(-1, x.shape[-1]), output)

        def by_column(unit: jax.Array) -> jax.Array:
            # Every document sees all labels, so that they meet here.
            return sharding.constrain(unit)[sharding.constrain(batch.columns)]

        prototype = None
        if self.model.prime is not None:
            prototype = by_column(
                self._prototype(params, t, batch.label_ids, label.pooled, prototype_key)
            )
        return Pairs(document_unit, by_column(label.unit), prototype, relevance=batch.relevance)

    def _with_all(self, params: Any, t: Tables, batch: Batch, key: jax.Array) -> Pairs:
        """Documents and all labels, U = L, whose texts are as encoded at the last boundary.

        A document's own embedding is left out of the centroids of its positives: it would find
        itself there, most of all for the labels that few documents have. (Not so for the documents
        that complete an epoch's last batch: their rows of the bank are newer than the centroids.)
        """
        encode_key, prototype_key = jax.random.split(key)
        output = in_chunks(self._encode, params, batch.items, encode_key, self.n_chunks)
        document_unit = output.unit[:, 0]
        # Labels are split over the devices like a batch: a device's share of the table moves.
        pooled = layers.wide(sharding.width_to_batch(t.label_bank))
        label, prototype, positive_cosines = layers.normalize(pooled), None, None
        if self.model.prime is not None:
            num_labels = len(pooled)
            prototype = self._prototype(params, t, jnp.arange(num_labels), pooled, prototype_key)
            ids = jnp.minimum(batch.positives, num_labels - 1)  # what padding gives is dropped
            others = tables.leave_one_out(
                sharding.rows(t.centroids, ids),
                batch.frequency,
                sharding.rows(t.document_bank, batch.document_ids[batch.owners]),
            )
            texts = layers.wide(sharding.rows(t.label_bank, ids))
            unit = self._prototype(params, t, ids, texts, prototype_key, others)
            # A product with all documents: the gradient of rows taken of them would be a scatter.
            cosines = objective.cosines(unit, sharding.constrain(document_unit))
            positive_cosines = jnp.take_along_axis(cosines, batch.owners[:, None], axis=1)[:, 0]
        return Pairs(
            document_unit,
            label,
            prototype,
            positives=batch.positives,
            owners=batch.owners,
            positive_cosines=positive_cosines,
        )

    def _encode(self, params: Any, rows: Rows, key: jax.Array) -> EncoderOutput:
        return self.model.apply(
            {"params": params}, rows, deterministic=False, rngs={"dropout": key}, method="encode"
        )


def _health(
    pairs: Pairs, label_ids: jax.Array | None, grads: Any, metrics: dict[str, jax.Array]
) -> Health:
    """See `Health`; the sums of squares are those of the gradient's norm."""

    def rows(*embeddings: jax.Array | None) -> jax.Array:
        finite = [jnp.isfinite(x).all(axis=1) for x in embeddings if x is not None]
        return jnp.stack(finite).all(axis=0)

    documents, label = rows(pairs.document), jnp.full((), -1, jnp.int32)
    if pairs.positives is None:
        labels = rows(pairs.label, pairs.prototype)
        label = jnp.where(labels.all(), label, label_ids[jnp.argmin(labels)])
    squares = jax.tree.map(lambda x: optax.tree.norm(x, squared=True), grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    return Health(
        finite=finite & documents.all() & (label < 0),
        documents=documents,
        label=label,
        gradients=jax.tree.map(jnp.isfinite, squares),
    )


def _tokens(batch: Batch) -> jax.Array:
    """i32[], tokens of the batch's items, images included, the head of rows not."""
    return (batch.items.segments >= 0).sum()


def _where(written: jax.Array, ids: jax.Array | None, table: jax.Array | None) -> jax.Array | None:
    """`ids` where they are to be written, else ids past the table, where nothing is."""
    if ids is None or table is None:
        return ids
    return jnp.where(written, ids, len(table) + jnp.arange(len(ids), dtype=ids.dtype))


def in_chunks(
    encode: Callable[[Any, Any, jax.Array], Any], params: Any, items: Any, key: jax.Array, n: int
) -> Any:
    """`encode(params, items, key)` in n strided parts, each recomputed in the backward pass.

    Args:
        encode: a function of parameters, items and a dropout key.
        params: pytree of arrays.
        items: pytree of arrays, each of some multiple of n rows.
        key: part i of copy c of the parameters gets this key with c n + i folded in.
        n: number of parts; 1 keeps activations instead of recomputing them.

    Returns:
        What `encode` gives, a pytree of arrays, rows in the order of `items`.

    Raises:
        ValueError: n and the mesh do not divide the rows.
    """

    def on_copy(params: Any, items: Any, copy: jax.Array | int) -> Any:
        for leaf in jax.tree.leaves(items):
            if len(leaf) % n:
                raise ValueError(
                    f"train.n_chunks: expected a divisor of the {len(leaf)} rows of a data shard, "
                    f"got {n}"
                )

        def part(items: Any, number: jax.Array | int) -> Any:
            items = jax.tree.map(
                lambda x: sharding.constrain(x, "batch", name="rows of a data shard's chunk"),
                items,
            )
            return encode(params, items, jax.random.fold_in(key, copy * n + number))

        if n == 1:
            return part(items, 0)
        chunks = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), items)
        checkpointed = jax.checkpoint(part, prevent_cse=False)  # a loop keeps them apart
        output = jax.lax.map(lambda chunk: checkpointed(*chunk), (chunks, jnp.arange(n)))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), output)

    output = sharding.on_copies(on_copy, params, items)
    return jax.tree.map(lambda x: sharding.constrain(x, "batch"), output)
