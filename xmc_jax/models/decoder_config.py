"""What a decoder is: the fields that families differ in, from and to Hugging Face's config.json."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from xmc_jax.models import layers
from xmc_jax.models.pooled_dense import DenseConfig

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3")
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
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
        if self.kind not in ROPE_TYPES:
            raise ValueError(f"rope: expected a type of {ROPE_TYPES}, got {self.kind!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope: expected a factor of at least 1, got {self.factor}")
        numbers = self.low_factor, self.high_factor, self.original_positions
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"rope: expected positive numbers, got {numbers}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder; the families differ in nothing else.

    Attributes:
        family: one of FAMILIES.
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
        out_bias: so has the projection after attention.
        qk_norm: queries and keys are normalised per head (Qwen3, Gemma).
        post_norms: the output of attention and feed-forward is normalised too (Gemma).
        norm_offset: added to the norms' scales (Gemma: 1).
        embedding_scale: token embeddings are multiplied by it (Gemma: sqrt(D)).
        query_width: products of queries and keys are divided by its root; None is W.
        rope_theta: base of the rotary frequencies.
        rope: their stretch.
        sliding: of each layer, whether it attends to a window only.
        window: tokens a sliding layer attends to, itself included.
        local_rope_theta: base for the sliding layers, unstretched; None: they are as the others.
        attention_dropout: fraction, of the attention probabilities.
        tied: the head, which is never loaded, is the token embedding; for the exported config.json.
        pad_id: likewise.
        bos_id: likewise.
        eos_id: likewise.
        dense: the layer behind the pooling; None without.
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
        for name in (*positive, "max_positions", "window"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"DecoderConfig.{name}: expected at least 1, got {value}")
        layers.check_sizes(self)
        for name, fits, expected in (
            ("family", self.family in FAMILIES, f"one of {FAMILIES}"),
            ("hidden_act", self.hidden_act in ACTIVATIONS, f"one of {tuple(ACTIVATIONS)}"),
            ("kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}"),
            ("head_dim", self.head_dim % 2 == 0, "an even number"),
            ("sliding", len(self.sliding) in (0, self.layers), f"one for each of {self.layers}"),
            ("attention_dropout", 0 <= self.attention_dropout < 1, "a fraction in [0, 1)"),
            ("rope_theta", 0 < self.rope_theta < math.inf, "a positive number"),
            (
                "local_rope_theta",
                self.local_rope_theta is None or 0 < self.local_rope_theta < math.inf,
                "a positive number",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"DecoderConfig.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

    @property
    def width(self) -> int:
        """Numbers of an embedding: D, or the features of `dense`."""
        return self.hidden if self.dense is None else self.dense.features

    def first(self, layers: int) -> "DecoderConfig":
        """The same with its first so many layers."""
        return dataclasses.replace(self, layers=layers, sliding=self.sliding[:layers])

    def with_dropout(self, rate: float) -> "DecoderConfig":
        """The same with another fraction dropped; of a decoder, of the attention probabilities."""
        return dataclasses.replace(self, attention_dropout=rate)


# What a config.json that lacks a field means: transformers' defaults, family by family.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma3": _LLAMA
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}
_MODEL_TYPES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",  # the multimodal one, of which only the text tower is read
}
MODEL_TYPES = tuple(_MODEL_TYPES)
_HF_NAMES = {
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
# Our path -> Hugging Face's name; {} is the layer, stacked on our side. Kernels are transposed.
HF_NAMES: dict[str, dict[str, str]] = {
    "qwen2": _HF_NAMES,
    "qwen3": _HF_NAMES,
    "llama": _HF_NAMES,
    "gemma3": _HF_NAMES
    | {
        "layers/attention_post_norm": "layers.{}.post_attention_layernorm",
        "layers/mlp_norm": "layers.{}.pre_feedforward_layernorm",
        "layers/mlp_post_norm": "layers.{}.post_feedforward_layernorm",
    },
}
_ARCHITECTURES = {
    "qwen2": ("qwen2", "Qwen2Model"),
    "qwen3": ("qwen3", "Qwen3Model"),
    "llama": ("llama", "LlamaModel"),
    "gemma3": ("gemma3_text", "Gemma3TextModel"),
}
_GEMMA_PATTERN = 6  # of Gemma 3's layers, the last of so many attends to everything
# Fields whose other values would be another computation than the one here.
_REFUSED = {
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a Hugging Face config.json, as published or as transformers 5 writes it.

    Args:
        config: the parsed file.

    Raises:
        ValueError: another architecture, a variant that is not computed here, a field of the wrong
            type, or sizes that do not fit together.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(
            f"config.json: expected model_type to be one of {MODEL_TYPES}, got {kind!r}"
        )
    family = _MODEL_TYPES[kind]
    text = config
    if kind == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"config.json: expected text_config to be an object, got {text!r}")
    for name, allowed in _REFUSED.items():
        if text.get(name) not in allowed:
            raise ValueError(f"config.json: expected {name} = {allowed[-1]!r}, got {text[name]!r}")
    get = functools.partial(_field, text, _DEFAULTS[family])
    heads, hidden = get("num_attention_heads", int), get("hidden_size", int)
    kv_heads = get("num_key_value_heads", int, None) or heads
    layer_count = get("num_hidden_layers", int)
    if layer_count > layers.MOST_LAYERS:  # before something is made for each
        raise ValueError(
            f"config.json: expected at most {layers.MOST_LAYERS} num_hidden_layers, got "
            f"{layer_count}"
        )
    biased = family == "qwen2" or get("attention_bias", bool)
    common = {
        "family": family,
        "vocab_size": get("vocab_size", int),
        "hidden": hidden,
        "layers": layer_count,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": get("head_dim", int, None) or hidden // max(heads, 1),
        "ff": get("intermediate_size", int),
        "max_positions": get("max_position_embeddings", int),
        "eps": get("rms_norm_eps", float),
        "qkv_bias": biased,
        "out_bias": biased and family != "qwen2",
        "attention_dropout": get("attention_dropout", float),
        "tied": get("tie_word_embeddings", bool),
        "pad_id": get("pad_token_id", int, None),
        "bos_id": get("bos_token_id", int, None),
        "eos_id": _eos(text, _DEFAULTS[family]),
        "qk_norm": family in ("qwen3", "gemma3"),
        "sliding": _sliding(text, family, layer_count),
    }
    if common["sliding"]:
        common["window"] = get("sliding_window", int)
    if family != "gemma3":
        theta, rope = _rope(text, get)
        return DecoderConfig(
            hidden_act=get("hidden_act", str), rope_theta=theta, rope=rope, **common
        )
    theta, rope = _rope(text, get, "full_attention")
    local_theta = _number(text, "rope_local_base_freq", 10_000.0)
    if isinstance(text.get("rope_parameters"), Mapping):
        local_theta, _ = _rope(text, get, "sliding_attention")
    activation = _field(
        text, {"hidden_activation": get("hidden_act", str)}, "hidden_activation", str
    )
    return DecoderConfig(
        hidden_act=activation,
        rope_theta=theta,
        rope=rope,
        local_rope_theta=local_theta,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=math.sqrt(hidden),
        query_width=_field(text, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar", int),
        **common,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder without head; `from_hf` and transformers read it."""
    c = config
    model_type, architecture = _ARCHITECTURES[c.family]
    rope: dict[str, Any] = {"rope_type": c.rope.kind}
    if c.rope.kind != "default":
        rope["factor"] = c.rope.factor
    if c.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": c.rope.low_factor,
            "high_freq_factor": c.rope.high_factor,
            "original_max_position_embeddings": c.rope.original_positions,
        }
    fields = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ff,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope.kind == "default" else rope,
        "attention_dropout": c.attention_dropout,
        "tie_word_embeddings": c.tied,
        "pad_token_id": c.pad_id,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_id) if isinstance(c.eos_id, tuple) else c.eos_id,
    }
    if c.family == "gemma3":
        fields |= {
            "hidden_activation": c.hidden_act,
            "query_pre_attn_scalar": c.query_width or c.head_dim,
            "rope_local_base_freq": c.local_rope_theta,
        }
    else:
        fields["hidden_act"] = c.hidden_act
    if c.family != "qwen2":
        fields["attention_bias"] = c.qkv_bias
    if c.sliding:
        kinds = ("full_attention", "sliding_attention")
        fields |= {
            "layer_types": [kinds[sliding] for sliding in c.sliding],
            "sliding_window": c.window,
        }
        if c.family != "gemma3":
            fields["use_sliding_window"] = True
    return fields


def _field(
    text: Mapping[str, Any], defaults: Mapping[str, Any], name: str, kind: type, *more
) -> Any:
    # The value of a field; `more` are values it may have besides those of its type.
    value = text.get(name, defaults[name])
    kinds = (int, float) if kind is float else (kind,)
    if value in more and value is None:
        return None
    if (isinstance(value, bool) and kind is not bool) or not isinstance(value, kinds):
        raise ValueError(f"config.json: expected {name} to be a {kind.__name__}, got {value!r}")
    return value


def _number(text: Mapping[str, Any], name: str, default: float) -> float:
    return float(_field(text, {name: default}, name, float))


def _eos(text: Mapping[str, Any], defaults: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    value = text.get("eos_token_id", defaults["eos_token_id"])
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return tuple(value)
    return _field(text, defaults, "eos_token_id", int, None)


def _sliding(text: Mapping[str, Any], family: str, count: int) -> tuple[bool, ...]:
    # Of each layer, whether it slides; () where none does.
    kinds = text.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            raise ValueError(f"config.json: expected layer_types of {known}, got {kinds!r}")
        if len(kinds) != count:
            raise ValueError(f"config.json: expected {count} layer_types, got {len(kinds)}")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    elif family == "gemma3":
        pattern = _field(
            text, {"sliding_window_pattern": _GEMMA_PATTERN}, "sliding_window_pattern", int
        )
        if pattern < 1:
            raise ValueError(
                f"config.json: expected sliding_window_pattern of at least 1, got {pattern}"
            )
        sliding = tuple((layer + 1) % pattern != 0 for layer in range(count))
    elif text.get("use_sliding_window"):
        first = _field(text, _DEFAULTS[family], "max_window_layers", int)
        sliding = tuple(layer >= first for layer in range(count))
    else:
        sliding = ()
    return sliding if any(sliding) else ()


def _rope(text: Mapping[str, Any], get, kind: str | None = None) -> tuple[float, RopeScaling]:
    # Base and stretch; transformers 5 holds both in rope_parameters, for Gemma by kind of layer.
    theta, scaling = get("rope_theta", float), text.get("rope_scaling") or {}
    parameters = text.get("rope_parameters")
    if isinstance(parameters, Mapping):
        scaling = parameters.get(kind) or {} if kind else parameters
        if isinstance(scaling, Mapping):
            theta = _field(scaling, {"rope_theta": theta}, "rope_theta", float)
    if not isinstance(scaling, Mapping):
        raise ValueError(f"config.json: expected rope_scaling to be an object, got {scaling!r}")
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name not in ROPE_TYPES:
        raise ValueError(f"config.json: expected a rope_type of {ROPE_TYPES}, got {name!r}")
    if name == "default":
        return float(theta), RopeScaling()
    if name == "linear":
        return float(theta), RopeScaling("linear", _number(scaling, "factor", 1.0))
    return float(theta), RopeScaling(
        "llama3",
        _number(scaling, "factor", 1.0),
        _number(scaling, "low_freq_factor", 1.0),
        _number(scaling, "high_freq_factor", 4.0),
        _field(
            scaling,
            {"original_max_position_embeddings": 8192},
            "original_max_position_embeddings",
            int,
        ),
    )
