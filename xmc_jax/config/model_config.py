"""Sections about the model: backbone, adapters, sequences of text and images, label prototypes."""

import math
from typing import Literal

from pydantic import Field

from xmc_jax.config.declare import Count, Positive, ShareBelowOne, Whole, nested, section

Dtype = Literal["float32", "bfloat16"]
Order = Literal["text_image", "image_text"]
Pooling = Literal["mean", "cls", "last", "max"]


@section("encoder.lora")
class LoraConfig:
    """Low-rank adapters of the backbone: y = x W + scale * dropout(x) A B; A and B are trained.

    Source: ViXML supp. A; Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732.
    """

    rank: Whole = Field(0, description="Rank of the adapters; 0 means no adapters.")
    alpha: Positive = Field(256.0, description="Numerator of the scale. [V]")
    dropout: ShareBelowOne = Field(0.0, description="Dropped share of the adapters' input. [V]")
    scaling: Literal["rslora", "classic"] = Field(
        "rslora", description="Scale: rslora is alpha / sqrt(rank), classic alpha / rank. [V]"
    )
    targets: tuple[str, ...] = Field(
        ("query", "key", "value", "out", "gate", "up", "down"),
        description="Layers that get adapters; only decoders have gate. [V]",
    )

    def __post_init__(self):
        if self.rank and not self.targets:
            raise ValueError("targets: expected at least one layer, got none")

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    def check_targets(self, known: tuple[str, ...]) -> None:
        """Raises ValueError if a target is not one of a backbone's layers, `known`."""
        unknown = [name for name in self.targets if name not in known]
        if self.rank and unknown:
            raise ValueError(
                f"encoder.lora.targets: expected layers of this backbone, {known}, got {unknown}"
            )


@section("encoder")
class EncoderConfig:
    """The backbone."""

    backbone: str = Field(
        "minilm-l6-packaged",
        description="A local folder, a name on the Hugging Face hub, or minilm-l6-packaged.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the hub; none is its main branch."
    )
    layers: Count | None = Field(None, description="Number of layers to keep; none keeps all.")
    pooling: Pooling | None = Field(
        None,
        description="Vector of a text: mean or max over its tokens, its first token (cls) or its "
        "last; none is what the backbone's folder says, else mean.",
    )
    dropout: ShareBelowOne | None = Field(
        None, description="Replaces the dropout of the model; none keeps the model's own."
    )
    compute_dtype: Dtype = Field("float32", description="Type of activations and products.")
    precision: Literal["default", "high", "highest"] | None = Field(
        None,
        description="Precision of products in float32, as JAX names it; none is highest if "
        "compute_dtype is float32, else default.",
    )
    frozen_dtype: Dtype = Field("float32", description="Type of parameters that are not trained.")
    remat: Literal[
        "none",
        "nothing_saveable",
        "projections",
        "dots_saveable",
        "dots_with_no_batch_dims_saveable",
    ] = Field("none", description="Activations of a layer that are kept for the backward pass.")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="Initial weights: those of the backbone, or random ones."
    )
    lora: LoraConfig = nested(LoraConfig, "Low-rank adapters of the backbone.")


@section("fusion")
class FusionConfig:
    """The sequence of an item. Source: ViXML eq. 1, 3, 4, Table 6; reference code, run scripts."""

    prefix: str | None = Field(
        None,
        description="Text before an item's text, with the blank between them; none is what the "
        "folder of an encoder says, and nothing for a decoder.",
    )
    label_prefix: str | None = Field(
        None,
        description="The same for labels, of encoders only; none is what the folder says if prefix "
        "is none, else prefix.",
    )
    image_prefix: str = Field("", description="Text before the images of an item.")
    suffix: str = Field(
        "", description="Text at the end; if empty, what the tokenizer ends texts with."
    )
    order: Order = Field(
        "image_text", description="Order of text and images; encoders have images first. [V]"
    )
    positions: Literal["contiguous", "padded"] = Field(
        "contiguous",
        description="Positions count the tokens present (contiguous), or also padding and missing "
        "images as the reference code does (padded). [V]",
    )


@section("prime")
class PrimeConfig:
    """PRIME's label prototypes. Source: ViXML supp. A; reference code, run scripts."""

    enabled: bool = Field(True, description="False trains on label texts alone (NGAME).")
    combiner: Literal["transformer", "sum"] = Field(
        "transformer",
        description="Network of label prototypes: PRIME's transformer, or a sum, which has no "
        "parameters and uses none of heads, ff_dim and dropout.",
    )
    heads: Count = Field(8, description="Heads of the combiner; PRIME's own code has 1. [script]")
    ff_dim: Count = Field(1024, description="Feed-forward width of the combiner. [script]")
    dropout: ShareBelowOne = Field(0.1, description="Dropout of the combiner. [script]")
    free_vectors: Count = Field(
        65_536, description="Vectors that clusters of labels share. [script]"
    )
    private_vectors: Whole = Field(
        0, description="Number of the most frequent labels with a vector of their own. [script]"
    )
    free_vector_init: Literal["xavier", "cluster_mean", "zero"] = Field(
        "xavier",
        description="Initial free vectors: xavier (encoders), the mean of the labels' initial "
        "embeddings (decoders), or zero. [script]",
    )


@section("mesh")
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = Field(
        -1, description="Copies of the parameters; -1 takes all devices that other axes leave."
    )
    fsdp: int = Field(1, description="Shards of parameters, gathered where they are used.")
    tensor: int = Field(1, description="Shards of attention heads and of the feed-forward width.")
    replicate: tuple[Literal["embed", "heads", "kv", "mlp", "rank", "token_width"], ...] = Field(
        (),
        description="Logical axes that are not split, such as kv with fewer key-value heads than "
        "tensor.",
    )
