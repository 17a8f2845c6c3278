"""Items that lie in rows, see `types.Rows`: what each token sees, images, and pooling."""

import jax
import jax.numpy as jnp

from xmc_jax.config import EncoderConfig, choices
from xmc_jax.models import layers
from xmc_jax.runtime import sharding

POOLINGS = choices(EncoderConfig, "pooling")


def mask(
    segments: jax.Array,
    head: int,
    positions: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Which keys a query sees: those of its own item and of the head.

    Args:
        segments: i32[r, R], see `Rows`.
        head: see `Rows`.
        positions: i32[r, R], if attention is causal, else None.
        window: if attention is causal, keys at this many positions before the query or more are
            not seen, either; None is no limit.

    Returns:
        bool[r, 1, R, R].
    """
    place = jnp.arange(segments.shape[1])
    seen = segments[:, :, None] == segments[:, None]
    if head:
        seen |= place < head
    if positions is not None:
        seen &= place[:, None] >= place
        if window is not None:
            seen &= positions[:, :, None] - positions[:, None] < window
    return seen[:, None]


def place_images(x: jax.Array, images: jax.Array, places: jax.Array) -> jax.Array:
    """Token embeddings with image embeddings in their places.

    Args:
        x: [r, R, D] of tokens.
        images: [n, ..., K, D], projected.
        places: i32[n, ..., K], see `Rows.image_places`.

    Returns:
        [r, R, D] of the dtype of `x`.
    """
    groups, width = sharding.groups(), x.shape[-1]

    def write(x: jax.Array, images: jax.Array, places: jax.Array) -> jax.Array:
        return x.at[places].set(images, mode="drop", unique_indices=True)

    written = jax.vmap(write)(
        x.reshape(groups, -1, width),
        images.astype(x.dtype).reshape(groups, -1, width),
        places.reshape(groups, -1),
    )
    return written.reshape(x.shape)


def pool(hidden: jax.Array, segments: jax.Array, per_row: int, head: int, pooling: str):
    """One vector of each segment, the head's tokens included; see `EncoderConfig`.

    Args:
        hidden: f[r, R, D], float32 or wider.
        segments: i32[r, R], see `Rows`.
        per_row: M.
        head: see `Rows`.
        pooling: one of POOLINGS.

    Returns:
        f[r, M, D]; zeros, or of the head alone, where no item has that number.
    """

    def of_number(number: jax.Array) -> jax.Array:
        return (segments[:, None] == number) | (jnp.arange(segments.shape[1]) < head)

    if pooling == "max":

        def largest(number: jax.Array) -> jax.Array:
            seen = of_number(number)[:, 0, :, None]
            values = jnp.where(seen, hidden, -jnp.inf).max(axis=1)
            return jnp.where(seen.any(axis=1), values, 0)

        return jax.lax.map(largest, jnp.arange(per_row)).swapaxes(0, 1)
    seen = of_number(jnp.arange(per_row)[:, None])
    count = seen.sum(axis=-1, keepdims=True)
    if pooling == "mean":
        weights = seen / jnp.maximum(count, 1)
    else:
        wanted = 1 if pooling == "cls" else count
        weights = seen & (jnp.cumsum(seen, axis=-1) == wanted)
    # What is not finite stays with its own item: 0 times NaN would be NaN.
    finite = jnp.isfinite(hidden)
    spoilt = (seen & ~finite.all(axis=-1)[:, None]).any(axis=-1, keepdims=True)
    pooled = jnp.einsum(
        *("rms,rsd->rmd", weights.astype(hidden.dtype), jnp.where(finite, hidden, 0)),
        precision="highest",
    )
    return jnp.where(spoilt, jnp.nan, pooled)


def take(pooled: jax.Array, slots: jax.Array) -> jax.Array:
    """f[r, M, D], i32[n, ...] -> f[n, ..., D], see `Rows.slots`; 0 where there is no item."""
    groups, width = sharding.groups(), pooled.shape[-1]

    def read(pooled: jax.Array, slots: jax.Array) -> jax.Array:
        return pooled.at[slots].get(mode="fill", fill_value=0, unique_indices=True)

    values = jax.vmap(read)(pooled.reshape(groups, -1, width), slots.reshape(groups, -1))
    return layers.wide(values).reshape(*slots.shape, width)
