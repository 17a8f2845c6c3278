"""Layers shared by the backbones and the combiner: arrays in, arrays out."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xmc_jax.config import EncoderConfig, LoraConfig, choices
from xmc_jax.runtime import sharding
from xmc_jax.runtime.sharding import Axis

Initializer = Callable[..., jax.Array]

REMAT = choices(EncoderConfig, "remat")


NO_LORA = LoraConfig()


class Dense(nn.Module):
    """x @ kernel + bias over the last axis, and low-rank adapters if asked.

    Attributes:
        features: output width.
        axes: logical names of the kernel's two axes; the bias is split like the second, but, as the
            norms, not by "embed": to gather a vector costs more than it saves.
        kernel_init: of f32[in, features].
        bias_init: of f32[features]; None is no bias.
        dtype: what the products are computed in, whatever the parameters are stored in.
        lora: adapters `lora_a` f32[in, R], drawn as in `peft`, and `lora_b` f32[R, features], zero
            at first; none of rank 0.
        deterministic: no dropout of the adapters' input.
    """

    features: int
    axes: tuple[Axis, Axis]
    kernel_init: Initializer
    bias_init: Initializer | None = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32
    lora: LoraConfig = NO_LORA
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> dtype[..., features]."""

        def param(name: str, init: Initializer, axes: tuple[Axis, ...], *shape: int):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape)
            return sharding.gathered(value.astype(self.dtype), axes)

        x, width = x.astype(self.dtype), x.shape[-1]
        y = x @ param("kernel", self.kernel_init, self.axes, width, self.features)
        if self.bias_init is not None:
            axis = None if self.axes[1] == "embed" else self.axes[1]
            y += param("bias", self.bias_init, (axis,), self.features)
        if rank := self.lora.rank:
            # Where the long side is not split by "embed", the rank is over the same devices.
            inner, outer = (None if axis == "embed" else "rank" for axis in self.axes)
            a = param("lora_a", uniform(width**-0.5), (self.axes[0], inner), width, rank)
            b = param("lora_b", nn.initializers.zeros, (outer, self.axes[1]), rank, self.features)
            (drop,) = dropouts(self, (self.lora.dropout,), self.deterministic)
            # Scaled where it is narrow, so that the second product may be added in place.
            narrow = jnp.asarray(self.lora.scale, self.dtype) * (drop(x) @ a)
            y += checkpoint_name(narrow, "projection") @ b
        return checkpoint_name(y, "projection")


def uniform(bound: float) -> Initializer:
    """Draws uniformly from [-bound, bound); PyTorch's of a linear layer has in^-0.5."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, `wide` whatever comes in.

    Attributes:
        eps: added to the variance.
    """

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> the same shape and dtype."""

        def param(name: str, init: Initializer) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(init, (None,)), x.shape[-1:])

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        y = wide(x)
        centred = y - y.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, `wide` whatever comes in.

    Attributes:
        eps: added to the mean square.
        offset: added to the scale as it is stored: 1 for Gemma, whose scales are around 0.
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> the same shape and dtype."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", nn.with_logical_partitioning(init, (None,)), x.shape[-1:])
        y = wide(x)
        normed = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (normed * (wide(scale) + self.offset)).astype(x.dtype)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens: [V, D], i32[n, S] -> [n, S, D], split like a batch.

    The table is split by width over both axes that split parameters, so that a row is read where it
    lies, and what moves is what was read. Where a token is -1, nothing is read, the result is 0,
    and nothing is added to the gradient: many additions to one row are slow on accelerators.
    """
    ids = jnp.where(tokens < 0, len(table), tokens)
    x = table.at[sharding.constrain(ids, "copy")].get(mode="fill", fill_value=0)
    return sharding.width_to_batch(sharding.constrain(x, "copy", None, "token_width"))


def of_positions(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of a small table by a product: f[S, D], i32[n, m] in [0, S) -> f[n, m, D].

    Values are those of `table[positions]`. Its gradient would add all n * m rows to S rows, one
    after the other on accelerators; here it is a product, too.
    """
    chosen = jax.nn.one_hot(positions, len(table), dtype=table.dtype)
    return jnp.matmul(chosen, table, precision="highest")


def rotary_tables(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, f[..., S, 1, W/2], of i32[..., S] positions and f[W/2] frequencies."""
    angles = positions[..., None, None].astype(frequencies.dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotary position embedding, its pairs (i, i + W/2): [n, S, H, W] -> the same shape and dtype.

    Source: Su et al., arXiv 2104.09864; the order of pairs is Hugging Face's.
    """
    first, second = jnp.split(wide(x), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda x: x,
    scale: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32 or wider.

    Written out because `jax.nn.dot_product_attention` cannot drop probabilities; it compiles to the
    same program on CPU, and sequences are too short (T <= 256) for a fused kernel to gain.

    Args:
        query: [n, T, H, W].
        key: [n, S, G, W]; G divides H, and H / G query heads in a row share one.
        value: [n, S, G, W].
        mask: bool, broadcastable to [n, 1, T, S]; False is not attended to. A row needs one True.
        dropout: applied to the probabilities f32[n, G, H / G, T, S].
        scale: of the products; None is W^-0.5.

    Returns:
        [n, T, H * W], in the dtype of `value`.
    """
    n, T, H, W = query.shape
    query = query.reshape(n, T, key.shape[2], -1, W)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("ntgrw,nsgw->ngrts", query, key, preferred_element_type=dtype)
    scores *= W**-0.5 if scale is None else scale
    if mask is not None:
        # What is not finite reaches the queries that see it alone: 0 times NaN would be NaN.
        finite = jnp.isfinite(value)
        spoilt = jnp.where(finite.all(axis=(2, 3)), 0, jnp.nan)[:, None, None, None]
        scores = jnp.where(mask[:, :, None], scores + spoilt, jnp.finfo(dtype).min)
        value = jnp.where(finite, value, 0)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
    return jnp.einsum("ngrts,nsgw->ntgrw", probabilities, value).reshape(n, T, H * W)


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


def stack(
    layer: type[nn.Module],
    length: int,
    remat: str,
    in_axes: tuple[Any, ...] | Any = nn.broadcast,
    unroll: int = 1,
) -> Callable[..., nn.Module]:
    """One layer after the other, parameters stacked [layers, ...]: the body of a scan.

    Args:
        layer: module of (x, *inputs) -> (x, output).
        length: number of layers.
        remat: what of a layer is kept for the backward pass, the rest being computed again: "none",
            all; "projections", what the `Dense` layers give, of adapters the narrow part; other
            names of REMAT are policies of `jax.checkpoint_policies`.
        in_axes: of each of `inputs`, `nn.broadcast` or 0 for one per layer.
        unroll: layers per iteration.
    """
    if remat != "none":
        if remat == "projections":
            policy = jax.checkpoint_policies.save_only_these_names("projection")
        else:
            policy = getattr(jax.checkpoint_policies, remat)
        # A loop keeps the two computations of a layer apart; unrolled, XLA might make them one.
        layer = nn.remat(layer, policy=policy, prevent_cse=unroll > 1)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=min(length, unroll),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def wide(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where it is wider: what norms and losses are computed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalize(x: jax.Array) -> jax.Array:
    """[..., D] -> f32[..., D] of length one; a zero vector stays zero, with a finite gradient."""
    x = wide(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
