"""Where our parameters are in Hugging Face checkpoints, and what turns each into the other.

The table of each family is `Family.tensors`; loading and export are one loop over `layout`.
"""

import collections
import dataclasses
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from xmc_jax.models import backbone
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.family import Family
from xmc_jax.models.vision import VisionConfig

# Tensors that computing an embedding never needs, and that a user need not hear of: buffers within
# the backbone; outside of it the pooler, the head of a language model and other modalities.
_BUFFER = re.compile(r"embeddings\.(position_ids|mask_token)$|(.*\.)?rotary_emb\.inv_freq$")
_OTHER = re.compile(
    r"(.*\.)?(pooler|lm_head|text_model|vision_tower|multi_modal_projector)\.|logit_(scale|bias)$"
)
_LAYER = re.compile(r"(?:.*\.)?layers?\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters and the tensors of a checkpoint that it is made of.

    Attributes:
        path: ours, within the backbone.
        shape: ours.
        names: of the tensors; one, or one per layer.
        stored: shape of each tensor.
        row: the first of the tensor's rows that belongs to the parameter.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stored: tuple[int, ...]
    row: int = 0

    @property
    def stacked(self) -> bool:
        """Whether the first axis of our parameter is the layer."""
        return self.path.startswith("layers/")

    @property
    def transposed(self) -> bool:
        """Whether the tensor is [out, in] and our parameter [in, out]."""
        return self.path.endswith("/kernel")

    def index(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where a part of one layer is in its tensor, all axes after the second flattened."""
        rows, *others = part[::-1] if self.transposed else part
        return (slice(rows.start + self.row, rows.stop + self.row), *others)

    def from_stored(self, part: np.ndarray) -> np.ndarray:
        """What was read at `index`, in our orientation."""
        return part.T if self.transposed else part

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """One layer of our parameter as the rows of its tensor."""
        value = value.T if self.transposed else value
        return value.reshape(-1, *self.stored[1:])


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


@functools.lru_cache
def layout(sizes: Sizes | VisionConfig) -> Mapping[str, Parameter]:
    """Our path -> parameter, of a model without adapters and without a layer after the pooling."""
    family = backbone.family_of(sizes)
    boxed = jax.eval_shape(
        lambda: family.module(sizes).init(jax.random.key(0), *family.inputs(sizes))["params"]
    )
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    parameters = {path: _parameter(path, shapes, family, sizes.layers) for path in shapes}
    return types.MappingProxyType(parameters)


def dense_layout(sizes: Sizes | VisionConfig) -> dict[str, Parameter]:
    """Our path -> parameter of the layer after the pooling, which has a file of its own."""
    config = getattr(sizes, "dense", None)
    if config is None:
        return {}
    shapes = {"kernel": (sizes.hidden, config.features), "bias": (config.features,)}
    if not config.bias:
        del shapes["bias"]
    names = {"kernel": "linear.weight", "bias": "linear.bias"}
    return {
        f"dense/{kind}": Parameter(f"dense/{kind}", shape, (names[kind],), shape[::-1])
        for kind, shape in shapes.items()
    }


def _parameter(
    path: str, shapes: Mapping[str, tuple[int, ...]], family: Family, layers: int
) -> Parameter:
    stored = family.tensors.get(path)
    if stored is None:
        module, _, kind = path.rpartition("/")
        stored = family.tensors[module]
        suffix = ".bias" if kind == "bias" else ".weight"
        stored = dataclasses.replace(stored, name=stored.name + suffix)
    stacked = path.startswith("layers/")

    def stored_shape(path: str) -> tuple[int, ...]:
        shape = shapes[path][1:] if stacked else shapes[path]
        return shape[::-1] if path.endswith("/kernel") else shape

    rows, *others = stored_shape(path)
    before = stored.fused[: stored.fused.index(path)] if stored.fused else ()
    if stored.fused:
        rows = sum(stored_shape(part)[0] for part in stored.fused)
    if stored.patches:
        side = math.isqrt(others[0] // 3)
        others = [3, side, side]
    return Parameter(
        path=path,
        shape=shapes[path],
        names=tuple(stored.name.format(layer) for layer in range(layers if stacked else 1)),
        stored=(rows, *others),
        row=sum(stored_shape(part)[0] for part in before),
    )


def match(names: Iterable[str], sizes: Sizes | VisionConfig, layers_left_out: range) -> Match:
    """Finds the tensors of a backbone in a checkpoint, whatever prefix their names have there.

    Args:
        names: of the checkpoint.
        sizes: of the backbone.
        layers_left_out: layers of the checkpoint that the backbone does not use.

    Raises:
        ValueError: there is more than one backbone; names their prefixes.
    """
    parameters = layout(sizes)
    wanted = {name for parameter in parameters.values() for name in parameter.names}
    renamed = backbone.family_of(sizes).renamed
    by_name = {_current(name, renamed): name for name in names}
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
    if getattr(sizes, "tied", False):
        (embedding,) = parameters["token_embedding"].names
        tied = [name for name in by_name if name.endswith("lm_head.weight")]
        if embedding not in stored and len(tied) == 1:
            stored[embedding] = by_name[tied[0]]
    return Match(prefix, stored, tuple(unknown), tuple(heads))


def _current(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        if name.endswith(old):
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
            f"expected the tensors of one model, got those of {len(prefixes)}, whose names begin "
            f"with {', '.join(prefixes)}; save one of them by itself"
        )
    return prefixes[0]
