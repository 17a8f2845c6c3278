"""Decoder-only language models as text encoders, without head: Qwen2, Qwen3, Llama 3, Gemma 3."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xmc_jax.models import fusion, layers, pooled_dense
from xmc_jax.models.decoder_config import ACTIVATIONS, DecoderConfig, RopeScaling
from xmc_jax.models.packing import Packed
from xmc_jax.sharding import Axis

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


def rotary_frequencies(theta: float, head_dim: int, rope: RopeScaling) -> np.ndarray:
    """f32[W/2], radians per position.

    Args:
        theta: base.
        head_dim: W.
        rope: the stretch.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequencies /= rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_positions * frequencies / (2 * math.pi)
        high = (turns - rope.low_factor) / (rope.high_factor - rope.low_factor)
        high = np.clip(high, 0, 1)
        frequencies *= high + (1 - high) / rope.factor
    return frequencies.astype(np.float32)


_normal = nn.initializers.normal(0.02)


class Layer(nn.Module):
    """One pre-norm transformer layer with gated feed-forward, as the body of a scan."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: layers.LoraConfig
    deterministic: bool
    hidden_states: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, rotary, masks, packed: Packed | None, sliding
    ) -> tuple[jax.Array, jax.Array | None]:
        """[n, S, D] -> [n, S, D], and that again as a scanned output if asked.

        Args:
            x: [n, S, D]; packed, [g, prefix + t, D].
            rotary: cosine and sine of all layers, or of full and of sliding ones.
            masks: bool[..., S, S] likewise; packed, as `Packed.attention` takes them.
            packed: how texts are packed, or None.
            sliding: bool[], or None where no layer slides.
        """
        c = self.config
        if sliding is not None:
            rotary, masks = (
                jax.tree.map(lambda full, local: jnp.where(sliding, local, full), *both)
                for both in (rotary, masks)
            )
        (drop,) = layers.dropouts(self, (c.attention_dropout,), self.deterministic)

        def dense(name: str, features: int, axes: tuple[Axis, Axis], x: jax.Array, bias=False):
            return layers.Dense(
                features,
                axes,
                kernel_init=_normal,
                bias_init=nn.initializers.zeros if bias else None,
                dtype=self.dtype,
                lora=self.lora if name in self.lora.targets else layers.NO_LORA,
                deterministic=self.deterministic,
                name=name,
            )(x)

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layers.RMSNorm(c.eps, c.norm_offset, name=name)(x)

        def heads(name: str, count: int, axis: str) -> jax.Array:
            y = dense(name, count * c.head_dim, ("embed", (axis, count)), normed, c.qkv_bias)
            return y.reshape(*y.shape[:2], count, c.head_dim)

        normed = norm("attention_norm", x)
        query, key = heads("query", c.heads, "heads"), heads("key", c.kv_heads, "kv")
        if c.qk_norm:
            query, key = norm("query_norm", query), norm("key_norm", key)
        query, key = layers.rotate(query, *rotary), layers.rotate(key, *rotary)
        value = heads("value", c.kv_heads, "kv")
        scale = (c.query_width or c.head_dim) ** -0.5
        attend = layers.attention if packed is None else packed.attention
        y = attend(query, key, value, masks, drop, scale)
        y = dense("out", c.hidden, (("heads", c.heads), "embed"), y, c.out_bias)
        x += norm("attention_post_norm", y) if c.post_norms else y

        normed = norm("mlp_norm", x)
        gate = ACTIVATIONS[c.hidden_act](dense("gate", c.ff, ("embed", "mlp"), normed))
        y = gate * dense("up", c.ff, ("embed", "mlp"), normed)
        y = dense("down", c.hidden, ("mlp", "embed"), y)
        x += norm("mlp_post_norm", y) if c.post_norms else y
        return x, (x if self.hidden_states else None)


class Decoder(nn.Module):
    """Token ids to contextual vectors under causal attention.

    Attributes:
        config: see `DecoderConfig`.
        dtype: of activations and products; norms, rotations and softmax are float32.
        remat: what of a layer is kept for the backward pass; see `layers.stack`.
        lora: adapters of the layers `PROJECTIONS`.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    lora: layers.LoraConfig = layers.NO_LORA

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        deterministic: bool = True,
        hidden_states: bool = False,
        positions: jax.Array | None = None,
        images: tuple[jax.Array, jax.Array] | None = None,
        packed: Packed | None = None,
        pooled: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Encodes texts; what stands past a text's length does not change its vectors.

        Args:
            tokens: i32[n, S], right padded; -1 where there is no token.
            lengths: i32[n], in [1, S]; vectors past it mean nothing. Attention is causal, so that
                it need not be looked at.
            deterministic: no dropout; otherwise the rng "dropout" is needed.
            hidden_states: return also the input of the first layer and the output of each, the last
                normalised (as transformers does).
            positions: i32[n, S], ascending within a text; None is 0, 1, 2, ...
            images: what stands in the place of some tokens, see `fusion.place`, where nothing is
                packed; or None.
            packed: how the texts are packed: tokens and positions are i32[g, prefix + t].
            pooled: f32[n, D]: no texts are encoded, but these go through the layer `dense`.

        Returns:
            dtype[n, S, D], or that and dtype[layers + 1, n, S, D]; packed, [g, prefix + t, D]. Of
            `pooled`, f32[n, width].

        Raises:
            ValueError: S is longer than the model's positions.
        """
        if pooled is not None:
            return pooled_dense.apply(self.config.dense, pooled, self.dtype)
        del lengths
        c, S = self.config, tokens.shape[1]
        if packed is not None:
            S = packed.prefix + packed.width
        if c.max_positions < S:
            raise ValueError(
                f"encoder: expected texts of at most {c.max_positions} tokens, prompts included, "
                f"got S = {S}; prepare the data with a smaller --config.data.max_length"
            )
        init = nn.with_logical_partitioning(_normal, ("vocab", "token_width"))
        # asarray: weights as read from disk are numpy, which traced ids do not index
        table = jnp.asarray(self.param("token_embedding", init, (c.vocab_size, c.hidden)))
        place = fusion.place if packed is None else packed.with_images
        x = layers.lookup(table, tokens)
        # Gemma's factor is rounded to bfloat16 where that is computed in, as in transformers.
        x = x.astype(self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        first = x = x if images is None else place(x, *images)

        positions = jnp.arange(S)[None] if positions is None else positions
        rotary, sliding = self._rotary(positions, c.rope_theta, c.rope), None
        mask = _masks(positions, packed)
        if c.sliding:
            local = rotary
            if c.local_rope_theta is not None:
                local = self._rotary(positions, c.local_rope_theta, RopeScaling())
            rotary = (rotary, local)
            mask = (mask, _masks(positions, packed, c.window))
            sliding = jnp.asarray(c.sliding)

        per_layer = nn.broadcast if sliding is None else 0
        in_axes = (nn.broadcast, nn.broadcast, nn.broadcast, per_layer)
        scanned = layers.stack(Layer, c.layers, self.remat, in_axes)
        x, outputs = scanned(c, self.dtype, self.lora, deterministic, hidden_states, name="layers")(
            x, rotary, mask, packed, sliding
        )
        x = layers.RMSNorm(c.eps, c.norm_offset, name="final_norm")(x)
        return (x, jnp.concatenate([first[None], outputs[:-1], x[None]])) if hidden_states else x

    def _rotary(self, positions: jax.Array, theta: float, rope: RopeScaling):
        frequencies = rotary_frequencies(theta, self.config.head_dim, rope)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return layers.rotary_tables(positions, frequencies.astype(dtype))


def _masks(positions: jax.Array, packed: Packed | None, window: int | None = None) -> Any:
    """Which keys a query sees: those before it, less than `window` positions away.

    Args:
        positions: i32[n, S], or i32[1, S] where they are the same for all.
        packed: how texts are packed, or None.
        window: None is no limit.

    Returns:
        bool[n or 1, 1, S, S]; packed, of the prefix, if there is one, and of each class.
    """

    def mask(queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Of i32[n, T] and i32[n, S] positions, the last T of the keys being the queries."""
        T, S = queries.shape[1], keys.shape[1]
        causal = (jnp.arange(T)[:, None] + (S - T) >= jnp.arange(S))[None, None]
        if window is None:
            return causal
        return causal & (queries[:, :, None] - keys[:, None] < window)[:, None]

    if packed is None:
        return mask(positions, positions)
    h = packed.prefix
    masks = [mask(positions[:, :h], positions[:, :h])] if h else []
    for own in packed.apart(positions[:, h:]):
        prefix = jnp.repeat(positions[:, :h], len(own) // len(positions), axis=0)
        masks.append(mask(own, jnp.concatenate([prefix, own], axis=1)))
    return tuple(masks)
