"""Layers shared by the encoders and the combiner: arrays in, arrays out, no configuration."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


class Dense(nn.Module):
    """x @ kernel + bias over the last axis.

    Attributes:
        features: output width.
        axes: logical names of the kernel's two axes; the bias is split like the second.
        kernel_init: of f32[in, features].
        bias_init: of f32[features].
        dtype: what the product is computed in; parameters are float32.
    """

    features: int
    axes: tuple[str | None, str | None]
    kernel_init: Initializer
    bias_init: Initializer = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> dtype[..., features]."""
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(self.bias_init, self.axes[1:]),
            (self.features,),
        )
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in float32 whatever comes in.

    Attributes:
        eps: added to the variance.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> the same shape and dtype."""

        def param(name: str, init: Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, ("embed",)), x.shape[-1:])

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Written out because `jax.nn.dot_product_attention` cannot drop probabilities; it compiles to the
    same program on CPU, and sequences are too short (T <= 256) for a fused kernel to gain.

    Args:
        query: [n, T, H, W].
        key: [n, S, H, W].
        value: [n, S, H, W].
        mask: bool, broadcastable to [n, H, T, S]; False is not attended to. A row needs one True.
        dropout: applied to the probabilities f32[n, H, T, S].

    Returns:
        [n, T, H * W], in the dtype of `value`.
    """
    scores = jnp.einsum("nthw,nshw->nhts", query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
    out = jnp.einsum("nhts,nshw->nthw", probabilities, value)
    return out.reshape(*out.shape[:2], -1)


def dropout(x: jax.Array, rate: float, seed: jax.Array) -> jax.Array:
    """Sets elements to zero with probability `rate` and divides the others by `1 - rate`.

    An element is kept if a 32-bit hash of (seed, position) is below `(1 - rate) * 2^32`. Threefry
    bits cost 9 % of a training step on CPU, these under 1 %, and they are local under any sharding.
    Two rounds of a full-avalanche integer hash are ample for masks; use them for nothing else.

    Args:
        x: any shape, fewer than 2^32 elements.
        rate: fraction dropped, in [0, 1).
        seed: u32[2]; the same seed gives the same mask. See `dropouts`.

    Source: hash constants "lowbias32", C. Wellons, https://nullprogram.com/blog/2018/07/31/.
    """
    if rate == 0:
        return x
    bits = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape) * jnp.uint32(0x9E3779B9)
    for word in seed:
        bits ^= word
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        bits ^= bits >> 16
    kept = bits < jnp.uint32(min(round((1 - rate) * 2**32), 2**32 - 1))
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def dropouts(
    module: nn.Module, rates: tuple[float, ...], deterministic: bool
) -> list[Callable[[jax.Array], jax.Array]]:
    """The dropouts of one layer, in order: one key and one small draw of seeds for all of them.

    Args:
        module: whose rng "dropout" is drawn from, unless there is nothing to drop.
        rates: fraction dropped by each.
        deterministic: drop nothing.
    """
    if deterministic or not any(rates):
        return [lambda x: x for _ in rates]
    seeds = jax.random.bits(module.make_rng("dropout"), (len(rates), 2), jnp.uint32)
    return [functools.partial(dropout, rate=rate, seed=seed) for rate, seed in zip(rates, seeds)]


def normalize(x: jax.Array) -> jax.Array:
    """[..., D] -> f32[..., D] of length one; a zero vector stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
