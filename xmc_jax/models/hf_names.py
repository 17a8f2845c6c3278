"""Where our parameters are in Hugging Face checkpoints: a table per family, for both directions."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from xmc_jax.models import backbone, vision
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.layers import NO_LORA
from xmc_jax.models.vision import VisionConfig

_DECODER = {
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
NAMES: dict[str, dict[str, str]] = {
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
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "llama": _DECODER,
    "gemma3": _DECODER
    | {
        "layers/attention_post_norm": "layers.{}.post_attention_layernorm",
        "layers/mlp_norm": "layers.{}.pre_feedforward_layernorm",
        "layers/mlp_post_norm": "layers.{}.post_feedforward_layernorm",
    },
    "siglip": {
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "layers/attention_norm": "encoder.layers.{}.layer_norm1",
        "layers/query": "encoder.layers.{}.self_attn.q_proj",
        "layers/key": "encoder.layers.{}.self_attn.k_proj",
        "layers/value": "encoder.layers.{}.self_attn.v_proj",
        "layers/out": "encoder.layers.{}.self_attn.out_proj",
        "layers/mlp_norm": "encoder.layers.{}.layer_norm2",
        "layers/up": "encoder.layers.{}.mlp.fc1",
        "layers/down": "encoder.layers.{}.mlp.fc2",
        "final_norm": "post_layernorm",
        "head/probe": "head.probe",
        "head/in_proj_weight": "head.attention.in_proj_weight",
        "head/in_proj_bias": "head.attention.in_proj_bias",
        "head/out": "head.attention.out_proj",
        "head/norm": "head.layernorm",
        "head/up": "head.mlp.fc1",
        "head/down": "head.mlp.fc2",
    },
    "vit": {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "layers/attention_norm": "encoder.layer.{}.layernorm_before",
        "layers/query": "encoder.layer.{}.attention.attention.query",
        "layers/key": "encoder.layer.{}.attention.attention.key",
        "layers/value": "encoder.layer.{}.attention.attention.value",
        "layers/out": "encoder.layer.{}.attention.output.dense",
        "layers/mlp_norm": "encoder.layer.{}.layernorm_after",
        "layers/up": "encoder.layer.{}.intermediate.dense",
        "layers/down": "encoder.layer.{}.output.dense",
        "final_norm": "layernorm",
    },
}
# What a checkpoint may put before all names, as a model with a head or one with images does.
PREFIXES = (
    "",
    "bert.",
    "distilbert.",
    "model.",
    "language_model.model.",  # Gemma 3 with images, as published
    "model.language_model.",  # as transformers 5 writes it
    "language_model.",
    "vision_model.",  # SigLIP with its text tower
    "vit.",
)
# What a checkpoint may hold besides: position buffers, poolers, heads, other modalities.
_UNUSED = re.compile(
    r"(bert\.|distilbert\.|vision_model\.|vit\.)?(embeddings\.(position_ids|mask_token)|pooler\.|cls\.|"
    r"classifier\.|pre_classifier\.|qa_outputs\.|vocab_(transform|layer_norm|projector)\.)|"
    r"text_model\.|logit_(scale|bias)$|(language_model\.)?lm_head\.|"
    r"(model\.)?(vision_tower|multi_modal_projector)\.|.*\.rotary_emb\.inv_freq$"
)
_LAYER = re.compile(r"(?:.*\.)?layers?\.(\d+)\.")


def shapes(sizes: Sizes | VisionConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> shape, of all parameters of a backbone or image encoder but adapters."""
    if isinstance(sizes, VisionConfig):
        module = vision.Vision(sizes)
        inputs = [jnp.zeros((1, sizes.image_size, sizes.image_size, 3))]
    else:
        module = backbone.build(sizes, "float32", "none", NO_LORA)
        inputs = [jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)]
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def of_path(path: str, sizes: Sizes | VisionConfig) -> list[str]:
    """The tensors that a parameter is made of: one, or one per layer.

    Args:
        path: ours, within the backbone; of a module, the common beginning of its tensors' names.
        sizes: of the backbone.
    """
    table = NAMES[sizes.family]
    if path in table:
        template = table[path]
    else:
        module, parameter = path.rsplit("/", 1)
        template = table[module] + (".bias" if parameter == "bias" else ".weight")
    return [template.format(layer) for layer in range(sizes.layers if is_stacked(path) else 1)]


def is_stacked(path: str) -> bool:
    """Whether the first axis of a parameter is its layer."""
    return path.startswith("layers/")


def is_transposed(path: str) -> bool:
    """Whether Hugging Face has it [out, in]."""
    return path.endswith("/kernel")


def stored_shape(path: str, shape: tuple[int, ...], sizes: Sizes | VisionConfig) -> tuple[int, ...]:
    """That of each tensor which a parameter of this shape is made of."""
    shape = shape[1:] if is_stacked(path) else shape
    if path == "patch_embedding/kernel":  # a convolution, whose last three axes are one of ours
        return (shape[1], 3, sizes.patch_size, sizes.patch_size)
    return shape[::-1] if is_transposed(path) else shape


def prefix_of(names: set[str], sizes: Sizes | VisionConfig) -> str:
    """What a checkpoint with these tensors puts before the names of this table; "" if unknown."""
    images = isinstance(sizes, VisionConfig)
    (embedding, *_) = of_path("patch_embedding/kernel" if images else "token_embedding", sizes)
    return next((prefix for prefix in PREFIXES if prefix + embedding in names), "")


def may_be_unused(name: str, layers_left_out: range) -> bool:
    """Whether a tensor that is not of the backbone is one that we know and leave."""
    layer = _LAYER.match(name)
    return bool(_UNUSED.match(name)) or (layer is not None and int(layer[1]) in layers_left_out)
