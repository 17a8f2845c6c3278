"""The pure functions of training: the step, and encoding documents, labels and prototypes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xmc_jax import rng, sharding
from xmc_jax.models.dual import DualEncoder
from xmc_jax.training import losses, optimizer, tables
from xmc_jax.types import Batch, EncoderOutput, Inputs, TrainState


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
    transform: optax.GradientTransformation
    loss: losses.LossConfig
    tables: tables.TablesConfig
    n_chunks: int
    seed: int

    def train(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        """One optimizer step on the four-term objective.

        Args:
            state: donated by the caller.
            frozen: parameters that get no gradient.
            batch: of B documents and U labels, both divisible by `n_chunks`.

        Returns:
            The next state, and metrics as f32[] arrays.

        Source: ViXML sec. 3.1, supp. A; reference utils.py::train.
        """
        dropout = rng.key(self.seed, rng.Stream.DROPOUT, state.step)
        positive = rng.key(self.seed, rng.Stream.POSITIVE, state.step)

        def objective(params):
            params = optimizer.merge(params, frozen)
            encode_key, prototype_key = jax.random.split(dropout)
            document, label = self._encode_batch(params, batch, encode_key)
            prototype = None
            if self.model.prime is not None:
                prototype = self.model.apply(
                    {"params": params},
                    label.pooled,
                    state.tables.free_vector_of[batch.label_ids],
                    state.tables.centroids[batch.label_ids].astype(jnp.float32),
                    deterministic=False,
                    rngs={"dropout": prototype_key},
                    method="prototype",
                )
            loss, metrics = losses.objective(
                document.unit, label.unit, prototype, batch.relevance, positive, self.loss
            )
            return loss, (metrics, jax.lax.stop_gradient(document.unit))

        grads, (metrics, document) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = self.transform.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            tables=tables.after_step(
                state.tables, batch.document_ids, document, batch.label_ids, self.tables
            ),
        )
        return state, metrics | {"grad_norm": optax.global_norm(grads)}

    def encode(self, params: Any, frozen: Any, inputs: Inputs) -> EncoderOutput:
        """Embeddings without dropout. `params` and `frozen` as in `train`."""
        return self.model.apply(
            {"params": optimizer.merge(params, frozen)}, inputs, deterministic=True, method="encode"
        )

    def prototype(
        self, state: TrainState, frozen: Any, label_ids: jax.Array, inputs: Inputs
    ) -> jax.Array:
        """What the index holds: f32[n, D] unit prototypes with PRIME, label embeddings without.

        Args:
            state: parameters and tables.
            frozen: see `train`.
            label_ids: i32[n].
            inputs: texts of these labels.
        """
        output = self.encode(state.params, frozen, inputs)
        if self.model.prime is None:
            return output.unit
        return self.model.apply(
            {"params": optimizer.merge(state.params, frozen)},
            output.pooled,
            state.tables.free_vector_of[label_ids],
            state.tables.centroids[label_ids].astype(jnp.float32),
            deterministic=True,
            method="prototype",
        )

    def _encode_batch(
        self, params: Any, batch: Batch, key: jax.Array
    ) -> tuple[EncoderOutput, EncoderOutput]:
        """Documents and labels through the tower as one stream, in strided chunks.

        Each document goes next to its own labels: the first axis stays that of the batch's
        sharding, and taking every n-th row gives each device its share of each chunk, so
        nothing moves.
        """
        size = batch.document.tokens.shape[0]
        per_document = batch.label.tokens.shape[0] // size
        items = jax.tree.map(
            lambda d, u: jnp.concatenate(
                [d[:, None], u.reshape(size, per_document, *u.shape[1:])], axis=1
            ),
            batch.document,
            batch.label,
        )

        def encode(items: Inputs, key: jax.Array) -> EncoderOutput:
            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), items)
            flat = jax.tree.map(
                lambda x: sharding.constrain(x, "batch", *[None] * (x.ndim - 1)), flat
            )
            output = self.model.apply(
                {"params": params},
                flat,
                deterministic=False,
                rngs={"dropout": key},
                method="encode",
            )
            return jax.tree.map(lambda x: x.reshape(-1, 1 + per_document, x.shape[-1]), output)

        output = in_chunks(encode, items, key, self.n_chunks)
        return (
            jax.tree.map(lambda x: x[:, 0], output),
            jax.tree.map(lambda x: x[:, 1:].reshape(-1, x.shape[-1]), output),
        )


def in_chunks(encode: Callable[[Any, jax.Array], Any], items: Any, key: jax.Array, n: int) -> Any:
    """`encode(items, key)` in n strided parts, each recomputed in the backward pass.

    Args:
        encode: a function of items and a dropout key.
        items: pytree of arrays [B, ...].
        key: part i gets this key with i folded in.
        n: number of parts; 1 keeps activations instead of recomputing them.

    Returns:
        Pytree of [B, ...], rows in the order of `items`.

    Raises:
        ValueError: n does not divide B.
    """
    size = jax.tree.leaves(items)[0].shape[0]
    if size % n:
        raise ValueError(f"train.n_chunks: expected a divisor of the batch of {size}, got {n}")
    if n == 1:
        return encode(items, jax.random.fold_in(key, 0))
    chunks = jax.tree.map(lambda x: x.reshape(size // n, n, *x.shape[1:]).swapaxes(0, 1), items)
    checkpointed = jax.checkpoint(encode)
    output = jax.lax.map(
        lambda part: checkpointed(part[0], jax.random.fold_in(key, part[1])),
        (chunks, jnp.arange(n)),
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:]), output)
