"""BERT-like encoders: BERT, MiniLM (a narrow BERT) and DistilBERT (BERT without token types)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.config import LoraConfig
from xmc_jax.models import layers, pooled_dense, segments
from xmc_jax.models.family import (
    ACTIVATIONS,
    Family,
    check,
    check_sizes,
    named,
    read_fields,
    refuse_others,
)
from xmc_jax.models.pooled_dense import DenseConfig
from xmc_jax.runtime.sharding import Axis

PROJECTIONS = ("query", "key", "value", "out", "up", "down")
# Layers per iteration of the scan: on CPU, rolled costs 9 % of a training step, unrolled 2 %.
UNROLL = 6


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and constants of an encoder.

    Attributes:
        family: "bert" (MiniLM too) or "distilbert".
        vocab_size: V.
        hidden: D.
        layers: number of layers.
        heads: H; divides D.
        ff: F.
        max_positions: longest text, in tokens.
        type_vocab: token types, of which only the first is used; 0 for DistilBERT.
        eps: of the norms.
        hidden_act: a key of ACTIVATIONS; "gelu" is the exact one.
        dropout: fraction, of the embeddings and of each sublayer's output.
        attention_dropout: fraction, of the attention probabilities.
        pad_id: the padding token; only for the exported config.json.
        dense: the layer behind the pooling; None without.
    """

    family: str = "bert"
    vocab_size: int = 30522
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 3072
    max_positions: int = 512
    type_vocab: int = 2
    eps: float = 1e-12
    hidden_act: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_id: int = 0
    dense: DenseConfig | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "hidden", "layers", "heads", "ff", "max_positions")
        check_sizes(self, sizes)
        rates, types = ("dropout", "attention_dropout"), "at least 1 for bert, 0 for distilbert"
        check(
            self,
            ("heads", self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}"),
            ("type_vocab", (self.type_vocab > 0) == (self.family == "bert"), types),
            *((name, 0 <= getattr(self, name) < 1, "a fraction in [0, 1)") for name in rates),
        )

    @property
    def width(self) -> int:
        """Numbers of an embedding: D, or the features of `dense`."""
        return self.hidden if self.dense is None else self.dense.features

    def first(self, layers: int) -> "BertConfig":
        """The same with its first so many layers."""
        return dataclasses.replace(self, layers=layers)

    def with_dropout(self, rate: float) -> "BertConfig":
        """The same with another fraction dropped, of both kinds."""
        return dataclasses.replace(self, dropout=rate, attention_dropout=rate)


_normal = nn.initializers.normal(0.02)


class BertLayer(nn.Module):
    """One post-norm transformer layer, as the body of a scan."""

    config: BertConfig
    dtype: jnp.dtype
    lora: LoraConfig
    deterministic: bool
    hidden_states: bool

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """[r, R, D], bool[r, 1, R, R] -> [r, R, D], and that again as a scanned output if asked."""
        c = self.config
        drop_probabilities, drop_attention, drop_output = layers.dropouts(
            self, (c.attention_dropout, c.dropout, c.dropout), self.deterministic
        )

        def dense(name: str, features: int, axes: tuple[Axis, Axis], x: jax.Array) -> jax.Array:
            return layers.Dense(
                features,
                axes,
                kernel_init=_normal,
                dtype=self.dtype,
                lora=self.lora if name in self.lora.targets else layers.NO_LORA,
                deterministic=self.deterministic,
                name=name,
            )(x)

        def heads(name: str) -> jax.Array:
            # Three products: one of [D, 3D] saves 1 % on CPU and would blur mapping and sharding.
            y = dense(name, c.hidden, ("embed", ("heads", c.heads)), x)
            return y.reshape(*y.shape[:2], c.heads, -1)

        y = layers.attention(heads("query"), heads("key"), heads("value"), mask, drop_probabilities)
        y = dense("out", c.hidden, (("heads", c.heads), "embed"), y)
        x = layers.LayerNorm(c.eps, name="attention_norm")(x + drop_attention(y))
        y = dense("up", c.ff, ("embed", "mlp"), x)
        # Recomputed in the backward pass: a quarter less memory at no cost in time.
        y = jax.checkpoint(ACTIVATIONS[c.hidden_act])(y)
        y = dense("down", c.hidden, ("mlp", "embed"), y)
        x = layers.LayerNorm(c.eps, name="output_norm")(x + drop_output(y))
        return x, (x if self.hidden_states else None)


class Bert(nn.Module):
    """Token ids to contextual vectors.

    Attributes:
        config: see `BertConfig`.
        dtype: of activations and products; norms and softmax are float32 at least.
        remat: what of a layer is kept for the backward pass; see `layers.stack`.
        lora: adapters of the layers `PROJECTIONS`.
    """

    config: BertConfig
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
        """Encodes rows of texts, each of which sees itself alone; see `types.Rows`.

        Args:
            tokens: i32[r, R]; -1 where there is no token.
            segment: i32[r, R], `Rows.segments`.
            position: i32[r, R], `Rows.positions`.
            head: `Rows.head`.
            longest: `Rows.longest`.
            images: what stands in the place of some tokens, see `segments.place_images`; or None.
            deterministic: no dropout; otherwise the rng "dropout" is needed.
            hidden_states: return also the input of the first layer and the output of each.
            pooled: f32[n, D]: no texts are encoded, but these go through the layer `dense`.

        Returns:
            dtype[r, R, D], or that and dtype[layers + 1, r, R, D]. Of `pooled`, f32[n, width].
        """
        if pooled is not None:
            return pooled_dense.apply(self.config.dense, pooled, self.dtype)
        c = self.config

        def table(name: str, rows: int, axes: tuple[str | None, ...]) -> jax.Array:
            init = nn.with_logical_partitioning(_normal, axes)
            # asarray: weights as read from disk are numpy, which traced ids do not index
            return jnp.asarray(self.param(name, init, (rows, c.hidden)))

        words = table("token_embedding", c.vocab_size, ("vocab", "token_width"))
        x = layers.lookup(words, tokens)
        x = x if images is None else segments.place_images(x, *images)
        places = table("position_embedding", c.max_positions, (None, "embed"))
        x += layers.of_positions(places[:longest], position)
        if c.type_vocab:
            x += table("type_embedding", c.type_vocab, (None, "embed"))[0]
        x = layers.LayerNorm(c.eps, name="embedding_norm")(x).astype(self.dtype)
        (drop,) = layers.dropouts(self, (c.dropout,), deterministic)
        first = x = drop(x)
        scanned = layers.stack(BertLayer, c.layers, self.remat, unroll=UNROLL)
        x, outputs = scanned(c, self.dtype, self.lora, deterministic, hidden_states, name="layers")(
            x, segments.mask(segment, head)
        )
        return (x, jnp.concatenate([first[None], outputs])) if hidden_states else x


# Hugging Face's name of each field, and what a config.json that lacks it means.
_BERT_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "ff": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "type_vocab": ("type_vocab_size", 2),
    "eps": ("layer_norm_eps", 1e-12),
    "hidden_act": ("hidden_act", "gelu"),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "pad_id": ("pad_token_id", 0),
}
_DISTILBERT_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden": ("dim", 768),
    "layers": ("n_layers", 6),
    "heads": ("n_heads", 12),
    "ff": ("hidden_dim", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "hidden_act": ("activation", "gelu"),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "pad_id": ("pad_token_id", 0),
}
_EMBEDDING_TENSORS = {
    "token_embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm",
}
_BERT_TENSORS = _EMBEDDING_TENSORS | {
    "type_embedding": "embeddings.token_type_embeddings.weight",
    "layers/query": "encoder.layer.{}.attention.self.query",
    "layers/key": "encoder.layer.{}.attention.self.key",
    "layers/value": "encoder.layer.{}.attention.self.value",
    "layers/out": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/up": "encoder.layer.{}.intermediate.dense",
    "layers/down": "encoder.layer.{}.output.dense",
    "layers/output_norm": "encoder.layer.{}.output.LayerNorm",
}
_DISTILBERT_TENSORS = _EMBEDDING_TENSORS | {
    "layers/query": "transformer.layer.{}.attention.q_lin",
    "layers/key": "transformer.layer.{}.attention.k_lin",
    "layers/value": "transformer.layer.{}.attention.v_lin",
    "layers/out": "transformer.layer.{}.attention.out_lin",
    "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers/up": "transformer.layer.{}.ffn.lin1",
    "layers/down": "transformer.layer.{}.ffn.lin2",
    "layers/output_norm": "transformer.layer.{}.output_layer_norm",
}
_REFUSED = {"position_embedding_type": ("absolute",), "is_decoder": (False,)}


def _family(
    name: str,
    architecture: str,
    fields: Mapping[str, tuple[str, Any]],
    tensors: Mapping[str, str],
    **constants: Any,
) -> Family:
    """A family of this stack; `constants` are fields of BertConfig that config.json lacks."""

    def from_hf(config: Mapping[str, Any]) -> BertConfig:
        refuse_others(config, _REFUSED)
        return BertConfig(family=name, **constants, **read_fields(config, fields))

    def to_hf(sizes: BertConfig) -> dict[str, Any]:
        values = {hf_name: getattr(sizes, field) for field, (hf_name, _) in fields.items()}
        return {"architectures": [architecture], "model_type": name, **values}

    return Family(
        name=name,
        model_types=(name,),
        from_hf=from_hf,
        to_hf=to_hf,
        tensors=named(tensors),
        module=Bert,
        projections=PROJECTIONS,
        # Checkpoints of before 2019, such as bert-base-uncased as published.
        renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    )


BERT = _family("bert", "BertModel", _BERT_FIELDS, _BERT_TENSORS)
DISTILBERT = _family(
    "distilbert", "DistilBertModel", _DISTILBERT_FIELDS, _DISTILBERT_TENSORS, type_vocab=0
)
