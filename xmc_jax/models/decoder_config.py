"""Sizes and constants of a decoder, from and to Hugging Face's config.json."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from xmc_jax.models import family
from xmc_jax.models.family import check, check_sizes, read_fields
from xmc_jax.models.pooled_dense import DenseConfig

ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pretraining.

    Attributes:
        kind: "default", not at all; "linear", all by `factor`; "llama3", the low ones by `factor`,
            the high ones not, those between in proportion.
        factor: of the stretch.
        low_factor: wavelengths above `original_positions` / this are low.
        high_factor: wavelengths below `original_positions` / this are high.
        original_positions: context of pretraining, tokens.

    Source: transformers, modeling_rope_utils.py.
    """

    kind: str = "default"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        positive = ("low_factor", "high_factor", "original_positions")
        check(
            self,
            ("kind", self.kind in ROPE_TYPES, f"one of {ROPE_TYPES}"),
            ("factor", 1 <= self.factor < math.inf, "at least 1"),
            *((name, 0 < getattr(self, name) < math.inf, "above 0") for name in positive),
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder.

    Attributes:
        family: name of the family.
        vocab_size: V.
        hidden: D.
        layers: number of layers.
        heads: H, of queries.
        kv_heads: G, of keys and values; divides H.
        head_dim: W; H * W need not be D.
        ff: F.
        max_positions: longest sequence, tokens.
        eps: of the norms.
        hidden_act: a key of ACTIVATIONS.
        qkv_bias: queries, keys and values have biases (Qwen2).
        out_bias: the projection after attention has a bias.
        qk_norm: queries and keys are normalised per head (Qwen3, Gemma).
        post_norms: the output of attention and feed-forward is normalised too (Gemma).
        norm_offset: added to the norms' scales (Gemma: 1).
        embedding_scale: token embeddings are multiplied by it (Gemma: sqrt(D)).
        query_width: products of queries and keys are divided by its root; None is W.
        rope_theta: base of the rotary frequencies.
        rope: stretch of the rotary frequencies.
        sliding: of each layer, whether it attends to a window only; () if no layer does.
        window: tokens that a sliding layer attends to, the query's own included.
        local_rope_theta: base for the sliding layers, unstretched; None is that of the others.
        attention_dropout: fraction, of the attention probabilities.
        tied: the head, which is never loaded, is the token embedding; for the exported config.json.
        pad_id: for the exported config.json.
        bos_id: for the exported config.json.
        eos_id: for the exported config.json.
        dense: the layer after the pooling; None without.
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    max_positions: int = 32768
    eps: float = 1e-6
    hidden_act: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    query_width: int | None = None
    rope_theta: float = 10_000.0
    rope: RopeScaling = RopeScaling()
    sliding: tuple[bool, ...] = ()
    window: int = 4096
    local_rope_theta: float | None = None
    attention_dropout: float = 0.0
    tied: bool = True
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    dense: DenseConfig | None = None

    def __post_init__(self):
        positive = ("vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ff")
        check_sizes(self, (*positive, "max_positions", "window"))
        thetas = {"rope_theta": self.rope_theta, "local_rope_theta": self.local_rope_theta}
        check(
            self,
            ("kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}"),
            ("head_dim", self.head_dim % 2 == 0, "an even number"),
            ("sliding", len(self.sliding) in (0, self.layers), f"one for each of {self.layers}"),
            ("attention_dropout", 0 <= self.attention_dropout < 1, "a fraction in [0, 1)"),
            *(
                (name, value is None or 0 < value < math.inf, "above 0")
                for name, value in thetas.items()
            ),
        )

    @property
    def width(self) -> int:
        """Numbers of an embedding: D, or the features of `dense`."""
        return self.hidden if self.dense is None else self.dense.features

    def first(self, layers: int) -> "DecoderConfig":
        """The same sizes with only the first layers."""
        return dataclasses.replace(self, layers=layers, sliding=self.sliding[:layers])

    def with_dropout(self, rate: float) -> "DecoderConfig":
        """The same sizes with another dropout of the attention probabilities."""
        return dataclasses.replace(self, attention_dropout=rate)


DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "rope_theta": 10_000.0,
}
"""What a Llama's config.json means if it lacks a field."""
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ff": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
    "attention_dropout": "attention_dropout",
    "tied": "tie_word_embeddings",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
_NULLABLE = ("kv_heads", "head_dim", "pad_id", "bos_id", "eos_id")
_REFUSED = {
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}
_ATTENTION = ("full_attention", "sliding_attention")


def from_hf(
    config: Mapping[str, Any],
    name: str,
    defaults: Mapping[str, Any],
    rope_kind: str | None = None,
    slides: Callable[[int], bool] | None = None,
    **constants: Any,
) -> DecoderConfig:
    """The sizes in a config.json, as published or as transformers 5 writes it.

    Args:
        config: the parsed file.
        name: of the family.
        defaults: Hugging Face's name of a field -> what a file that lacks it means.
        rope_kind: the kind of layer whose rope_parameters count, in files with one set per kind.
        slides: whether a layer slides, where the file does not list the kinds of layers.
        constants: fields of DecoderConfig that the family sets.

    Raises:
        ValueError: a variant that is not computed here, a field of the wrong type, or sizes that do
            not fit together.
    """
    family.refuse_others(config, _REFUSED)
    eos = config.get("eos_token_id")
    several = isinstance(eos, list) and all(isinstance(one, int) for one in eos)
    values = read_fields(
        {**config, "eos_token_id": eos[0]} if several and eos else config,
        {field: (hf_name, defaults[hf_name]) for field, hf_name in _FIELDS.items()}
        | {"qkv_bias": ("attention_bias", defaults["attention_bias"])},
        _NULLABLE,
    )
    if several:
        values["eos_id"] = tuple(eos)
    values["out_bias"] = values["qkv_bias"]
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or values["hidden"] // max(values["heads"], 1)
    sliding = _sliding(config, defaults, values["layers"], slides)
    if any(sliding):
        window = read_fields(config, {"window": ("sliding_window", defaults.get("sliding_window"))})
        values |= {"sliding": sliding, **window}
    theta, rope = read_rope(config, defaults, rope_kind)
    return DecoderConfig(**values | {"family": name, "rope_theta": theta, "rope": rope} | constants)


def to_hf(sizes: DecoderConfig, architecture: str) -> dict[str, Any]:
    """The config.json of a decoder without head; `from_hf` and transformers read it.

    Args:
        sizes: of the decoder.
        architecture: transformers' class.
    """
    rope: dict[str, Any] = {"rope_type": sizes.rope.kind, "factor": sizes.rope.factor}
    if sizes.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": sizes.rope.low_factor,
            "high_freq_factor": sizes.rope.high_factor,
            "original_max_position_embeddings": sizes.rope.original_positions,
        }
    fields = {
        "architectures": [architecture],
        "model_type": sizes.family,
        **{name: getattr(sizes, field) for field, name in _FIELDS.items()},
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None if sizes.rope.kind == "default" else rope,
        "attention_bias": sizes.qkv_bias,
    }
    if isinstance(sizes.eos_id, tuple):
        fields["eos_token_id"] = list(sizes.eos_id)
    if sizes.sliding:
        fields["layer_types"] = [_ATTENTION[sliding] for sliding in sizes.sliding]
        fields |= {"sliding_window": sizes.window, "use_sliding_window": True}
    return fields


def read_rope(
    config: Mapping[str, Any], defaults: Mapping[str, Any], kind: str | None = None
) -> tuple[float, RopeScaling]:
    """Base and stretch of the rotary frequencies.

    Args:
        config: the parsed config.json; transformers 5 writes both into rope_parameters.
        defaults: see `from_hf`.
        kind: key of the kind of layer within rope_parameters; None if all layers have the same.
    """
    scaling, parameters = config.get("rope_scaling") or {}, config.get("rope_parameters")
    read_theta = {"theta": ("rope_theta", defaults["rope_theta"])}
    theta = read_fields(config, read_theta)["theta"]
    if isinstance(parameters, Mapping):
        scaling = parameters.get(kind) or {} if kind else parameters
        if isinstance(scaling, Mapping):
            theta = read_fields({"rope_theta": theta, **scaling}, read_theta)["theta"]
    if not isinstance(scaling, Mapping):
        raise ValueError(f"config.json: expected rope_scaling to be an object, got {scaling!r}")
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in ROPE_TYPES:
        raise ValueError(f"config.json: expected a rope_type of {ROPE_TYPES}, got {name!r}")
    if name == "default":
        return float(theta), RopeScaling()
    names = {"factor": ("factor", 1.0)}
    if name == "llama3":
        names |= {
            "low_factor": ("low_freq_factor", 1.0),
            "high_factor": ("high_freq_factor", 4.0),
            "original_positions": ("original_max_position_embeddings", 8192),
        }
    return float(theta), RopeScaling(name, **read_fields(scaling, names))


def _sliding(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    count: int,
    slides: Callable[[int], bool] | None,
) -> tuple[bool, ...]:
    """Whether each layer slides; () where none does."""
    if count > family.MOST_LAYERS:  # before a list of that length is made
        raise ValueError(
            f"config.json: expected at most {family.MOST_LAYERS} num_hidden_layers, got {count}"
        )
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or any(kind not in _ATTENTION for kind in kinds):
            raise ValueError(f"config.json: expected layer_types of {_ATTENTION}, got {kinds!r}")
        if len(kinds) != count:
            raise ValueError(f"config.json: expected {count} layer_types, got {len(kinds)}")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    elif slides is not None:
        sliding = tuple(map(slides, range(count)))
    elif config.get("use_sliding_window") and "max_window_layers" in defaults:
        name = "max_window_layers"
        first = read_fields(config, {name: (name, defaults[name])})[name]
        sliding = tuple(layer >= first for layer in range(count))
    else:
        sliding = ()
    return sliding if any(sliding) else ()
