"""The stack of decoder-only language models as text encoders, without the language model's head.

Families differ in sizes, constants and names of tensors: `llama`, `qwen2`, `qwen3`, `gemma3`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xmc_jax.config import LoraConfig
from xmc_jax.models import decoder_config, layers, pooled_dense, segments
from xmc_jax.models.decoder_config import DecoderConfig, RopeScaling
from xmc_jax.models.family import ACTIVATIONS, Family, Stored, named
from xmc_jax.runtime.sharding import Axis

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
TENSORS = named(
    {
        "token_embedding": "embed_tokens.weight",
        "final_norm": "norm",
        "layers/attention_norm": "layers.{}.input_layernorm",
        "layers/query": "layers.{}.self_attn.q_proj",
        "layers/key": "layers.{}.self_attn.k_proj",
        "layers/value": "layers.{}.self_attn.v_proj",
        "layers/out": "layers.{}.self_attn.o_proj",
        "layers/query_norm": "layers.{}.self_attn.q_norm",
        "layers/key_norm": "layers.{}.self_attn.k_norm",
        "layers/mlp_norm": "layers.{}.post_attention_layernorm",
        "layers/gate": "layers.{}.mlp.gate_proj",
        "layers/up": "layers.{}.mlp.up_proj",
        "layers/down": "layers.{}.mlp.down_proj",
    }
)


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


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer with gated feed-forward, as the body of a scan."""

    config: DecoderConfig
    dtype: jnp.dtype
    lora: LoraConfig
    deterministic: bool
    hidden_states: bool

    @nn.compact
    def __call__(self, x: jax.Array, rotary, mask, sliding) -> tuple[jax.Array, jax.Array | None]:
        """[r, R, D] -> [r, R, D], and that again as a scanned output if asked.

        Args:
            x: [r, R, D].
            rotary: cosine and sine of all layers, or of full and of sliding ones.
            mask: bool[r, 1, R, R] likewise.
            sliding: bool[], or None where no layer slides.
        """
        c = self.config
        if sliding is not None:
            rotary, mask = (
                jax.tree.map(lambda full, local: jnp.where(sliding, local, full), *both)
                for both in (rotary, mask)
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
        y = layers.attention(query, key, value, mask, drop, scale)
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
    lora: LoraConfig = layers.NO_LORA

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array | None,
        segment: jax.Array | None = None,
        position: jax.Array | None = None,
        head: int = 0,
        longest: int | None = None,
        images: tuple[jax.Array, jax.Array] | None = None,
        deterministic: bool = True,
        hidden_states: bool = False,
        pooled: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Encodes rows of texts, each of which sees itself and the head; see `types.Rows`.

        Arguments and result are those of `Bert.__call__`. Of the hidden states the last one is
        normalised, as in transformers.
        """
        if pooled is not None:
            return pooled_dense.apply(self.config.dense, pooled, self.dtype)
        del longest
        c = self.config
        init = nn.with_logical_partitioning(_normal, ("vocab", "token_width"))
        # asarray: weights as read from disk are numpy, which traced ids do not index
        table = jnp.asarray(self.param("token_embedding", init, (c.vocab_size, c.hidden)))
        x = layers.lookup(table, tokens)
        # Gemma's factor is rounded to bfloat16 where that is computed in, as in transformers.
        x = x.astype(self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        first = x = x if images is None else segments.place_images(x, *images)

        rotary, sliding = self._rotary(position, c.rope_theta, c.rope), None
        mask = segments.mask(segment, head, position)
        if c.sliding:
            local = rotary
            if c.local_rope_theta is not None:
                local = self._rotary(position, c.local_rope_theta, RopeScaling())
            rotary = (rotary, local)
            mask = (mask, segments.mask(segment, head, position, c.window))
            sliding = jnp.asarray(c.sliding)

        in_axes = (nn.broadcast, nn.broadcast, nn.broadcast if sliding is None else 0)
        scanned = layers.stack(DecoderLayer, c.layers, self.remat, in_axes)
        x, outputs = scanned(c, self.dtype, self.lora, deterministic, hidden_states, name="layers")(
            x, rotary, mask, sliding
        )
        x = layers.RMSNorm(c.eps, c.norm_offset, name="final_norm")(x)
        return (x, jnp.concatenate([first[None], outputs[:-1], x[None]])) if hidden_states else x

    def _rotary(self, position: jax.Array, theta: float, rope: RopeScaling):
        frequencies = rotary_frequencies(theta, self.config.head_dim, rope)
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return layers.rotary_tables(position, frequencies.astype(dtype))


def family(
    name: str,
    architecture: str,
    defaults: Mapping[str, Any],
    model_types: tuple[str, ...] = (),
    from_hf: Callable[[Mapping[str, Any]], DecoderConfig] | None = None,
    to_hf: Callable[[DecoderConfig], dict[str, Any]] | None = None,
    tensors: Mapping[str, Stored] = TENSORS,
) -> Family:
    """A family of this stack; see `Family`.

    Args:
        name: of the family.
        architecture: transformers' class.
        defaults: see `decoder_config.from_hf`.
        model_types: () is the name alone.
        from_hf: None is `decoder_config.from_hf`.
        to_hf: None is `decoder_config.to_hf`.
        tensors: where the parameters are.
    """
    return Family(
        name=name,
        model_types=model_types or (name,),
        from_hf=from_hf or functools.partial(decoder_config.from_hf, name=name, defaults=defaults),
        to_hf=to_hf or functools.partial(decoder_config.to_hf, architecture=architecture),
        tensors=tensors,
        module=Decoder,
        projections=PROJECTIONS,
        causal=True,
    )
