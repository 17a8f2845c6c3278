"""Where our parameters are in Hugging Face checkpoints, in both directions.

The table of each family is in the module of the family.
"""

import collections
import dataclasses
import functools
import re
import types
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from xmc_jax.models import backbone, bert, decoder_config, vision
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.layers import NO_LORA
from xmc_jax.models.vision import VisionConfig

NAMES = {
    # The layer behind the pooling has a file of its own.
    family: table | {"dense": "linear"}
    for family, table in (bert.HF_NAMES | decoder_config.HF_NAMES | vision.HF_NAMES).items()
}
# Tensors that computing an embedding never needs, and that a user need not hear of: buffers within
# the backbone; outside of it the pooler, the head of a language model and other modalities.
_BUFFER = re.compile(r"embeddings\.(position_ids|mask_token)$|(.*\.)?rotary_emb\.inv_freq$")
_OTHER = re.compile(
    r"(.*\.)?(pooler|lm_head|text_model|vision_tower|multi_modal_projector)\.|logit_(scale|bias)$"
)
_LAYER = re.compile(r"(?:.*\.)?layers?\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Match:
    """Where the tensors of a backbone are in a checkpoint.

    Attributes:
        prefix: what stands before the names of the backbone's tensors.
        stored: name in the table of the family -> name in the checkpoint. Tensors that the
            checkpoint lacks are absent.
        unknown: names within the backbone that the family does not have.
        heads: names outside of the backbone, such as those of a classifier.
    """

    prefix: str
    stored: Mapping[str, str]
    unknown: tuple[str, ...]
    heads: tuple[str, ...]


def match(names: Iterable[str], sizes: Sizes | VisionConfig, layers_left_out: range) -> Match:
    """Finds the tensors of a backbone in a checkpoint, whatever prefix their names have there.

    Args:
        names: of the checkpoint.
        sizes: of the backbone.
        layers_left_out: layers of the checkpoint that the backbone does not use.

    Raises:
        ValueError: there is more than one backbone; names their prefixes.
    """
    wanted = {name for path in shapes(sizes) for name in of_path(path, sizes)}
    by_name = {_renamed(name, sizes): name for name in names}
    prefix = _prefix(by_name, wanted)
    stored = {name: by_name[prefix + name] for name in wanted if prefix + name in by_name}
    roots = {name.partition(".")[0] for name in wanted}
    heads, unknown = [], []
    for name in sorted(by_name.keys() - {prefix + name for name in wanted}):
        within = name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] in roots
        layer = _LAYER.match(name)
        left_out = layer is not None and int(layer[1]) in layers_left_out
        if within and not left_out and not _BUFFER.match(name.removeprefix(prefix)):
            unknown.append(by_name[name])
        if not within and not _OTHER.match(name):
            heads.append(by_name[name])
    (embedding,) = of_path("token_embedding", sizes) if getattr(sizes, "tied", False) else ("",)
    if embedding and embedding not in stored:
        tied = [name for name in by_name if name.endswith("lm_head.weight")]
        if len(tied) == 1:
            stored[embedding] = by_name[tied[0]]
    return Match(prefix, stored, tuple(unknown), tuple(heads))


def _renamed(name: str, sizes: Sizes | VisionConfig) -> str:
    for old, new in bert.HF_RENAMED.items():
        if sizes.family in bert.FAMILIES and name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _prefix(names: Iterable[str], wanted: set[str]) -> str:
    """What stands before the names of the backbone; that of the most names, "" for none."""
    counts: collections.Counter[str] = collections.Counter({"": 0})
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    most = max(counts.values())
    prefixes = sorted(prefix for prefix, count in counts.items() if count == most)
    if len(prefixes) > 1:
        raise ValueError(
            f"expected the tensors of one model, found those of {len(prefixes)}, whose names begin "
            f"with {', '.join(prefixes)}; save one of them by itself"
        )
    return prefixes[0]


@functools.lru_cache
def shapes(sizes: Sizes | VisionConfig) -> Mapping[str, tuple[int, ...]]:
    """Our path -> shape, of a backbone or image encoder without adapters and without `dense`."""
    if isinstance(sizes, VisionConfig):
        module = vision.Vision(sizes)
        inputs = [jnp.zeros((1, sizes.image_size, sizes.image_size, 3))]
    else:
        module = backbone.build(sizes, "float32", "none", NO_LORA)
        inputs = [jnp.zeros((1, 1), jnp.int32)] * 3
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"])
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    return types.MappingProxyType({path: leaf.shape for path, leaf in flat.items()})


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
