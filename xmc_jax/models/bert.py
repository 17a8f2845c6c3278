"""BERT-like encoders: BERT, MiniLM (a narrow BERT) and DistilBERT (BERT without token types)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.config import LoraConfig
from xmc_jax.models import layers, pooled_dense, segments
from xmc_jax.models.pooled_dense import DenseConfig
from xmc_jax.runtime.sharding import Axis

FAMILIES = ("bert", "distilbert")
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
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
        if self.family not in FAMILIES:
            raise ValueError(f"BertConfig.family: expected one of {FAMILIES}, got {self.family!r}")
        if self.hidden_act not in ACTIVATIONS:
            known = tuple(ACTIVATIONS)
            raise ValueError(f"BertConfig.hidden_act: expected {known}, got {self.hidden_act!r}")
        for name in ("vocab_size", "hidden", "layers", "heads", "ff", "max_positions"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"BertConfig.{name}: expected at least 1, got {value}")
        layers.check_sizes(self)
        if self.hidden % self.heads:
            raise ValueError(
                f"BertConfig.heads: expected a divisor of hidden = {self.hidden}, got {self.heads}"
            )
        if (self.type_vocab > 0) != (self.family == "bert"):
            raise ValueError(
                f"BertConfig.type_vocab: expected 0 for distilbert and at least 1 for bert, got "
                f"{self.type_vocab} for {self.family}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"BertConfig.{name}: expected a fraction in [0, 1), got {value}")

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


# Hugging Face's name of each field, and what a config.json that lacks it means.
_HF_FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "bert": {
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
    },
    "distilbert": {
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
    },
}
# Our path -> Hugging Face's name; {} is the layer, stacked on our side. Kernels are transposed.
HF_NAMES: dict[str, dict[str, str]] = {
    "bert": {
        "token_embedding": "embeddings.word_embeddings.weight",
        "position_embedding": "embeddings.position_embeddings.weight",
        "type_embedding": "embeddings.token_type_embeddings.weight",
        "embedding_norm": "embeddings.LayerNorm",
        "layers/query": "encoder.layer.{}.attention.self.query",
        "layers/key": "encoder.layer.{}.attention.self.key",
        "layers/value": "encoder.layer.{}.attention.self.value",
        "layers/out": "encoder.layer.{}.attention.output.dense",
        "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "layers/up": "encoder.layer.{}.intermediate.dense",
        "layers/down": "encoder.layer.{}.output.dense",
        "layers/output_norm": "encoder.layer.{}.output.LayerNorm",
    },
    "distilbert": {
        "token_embedding": "embeddings.word_embeddings.weight",
        "position_embedding": "embeddings.position_embeddings.weight",
        "embedding_norm": "embeddings.LayerNorm",
        "layers/query": "transformer.layer.{}.attention.q_lin",
        "layers/key": "transformer.layer.{}.attention.k_lin",
        "layers/value": "transformer.layer.{}.attention.v_lin",
        "layers/out": "transformer.layer.{}.attention.out_lin",
        "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
        "layers/up": "transformer.layer.{}.ffn.lin1",
        "layers/down": "transformer.layer.{}.ffn.lin2",
        "layers/output_norm": "transformer.layer.{}.output_layer_norm",
    },
}
# Ends of names in checkpoints of before 2019, as bert-base-uncased is published.
HF_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_ARCHITECTURES = {"bert": "BertModel", "distilbert": "DistilBertModel"}


def from_hf(config: dict[str, Any]) -> BertConfig:
    """The encoder that a Hugging Face config.json describes.

    Args:
        config: the parsed file.

    Raises:
        ValueError: another architecture, a variant of BERT that is not computed here, a field of
            the wrong type, or sizes that do not fit together.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.json: expected model_type to be one of {FAMILIES}, got {family!r} "
            f"(architectures {config.get('architectures')})"
        )
    for name, expected in (("position_embedding_type", "absolute"), ("is_decoder", False)):
        if config.get(name, expected) != expected:
            raise ValueError(f"config.json: expected {name} = {expected!r}, got {config[name]!r}")
    values: dict[str, Any] = {}
    for field, (name, default) in _HF_FIELDS[family].items():
        value = config.get(name, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(
                f"config.json: expected {name} to be a {kinds[-1].__name__}, got {value!r}"
            )
        values[field] = value
    return BertConfig(
        family=family, **({"type_vocab": 0} if family == "distilbert" else {}) | values
    )


def to_hf(config: BertConfig) -> dict[str, Any]:
    """The config.json of an encoder; `from_hf` reads it back."""
    fields = {
        name: getattr(config, field) for field, (name, _) in _HF_FIELDS[config.family].items()
    }
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        **fields,
    }


_normal = nn.initializers.normal(0.02)


class Layer(nn.Module):
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
        scanned = layers.stack(Layer, c.layers, self.remat, unroll=UNROLL)
        x, outputs = scanned(c, self.dtype, self.lora, deterministic, hidden_states, name="layers")(
            x, segments.mask(segment, head)
        )
        return (x, jnp.concatenate([first[None], outputs])) if hidden_states else x
