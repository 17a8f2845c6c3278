"""The Siamese encoder: one backbone for documents and labels, and the prototype path of labels."""

import contextlib

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from xmc_jax.config import LoraConfig, PrimeConfig
from xmc_jax.data.types import Array, Rows
from xmc_jax.models import backbone, layers, segments
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.combiner import SumCombiner, TransformerCombiner
from xmc_jax.models.layers import NO_LORA
from xmc_jax.runtime import rng, sharding

_FREE_VECTOR_INITS = {
    "xavier": nn.initializers.xavier_uniform(),
    "cluster_mean": nn.initializers.zeros,  # set once the labels are encoded
    "zero": nn.initializers.zeros,
}


@flax.struct.dataclass
class EncoderOutput:
    """Embeddings of n items.

    Attributes:
        pooled: f32[n, D], before normalisation; the label prototype network combines these.
        unit: f32[n, D], L2-normalised; what similarities are taken of.
    """

    pooled: Array
    unit: Array


class DualEncoder(nn.Module):
    """Texts and images to embeddings, and label embeddings to prototypes.

    Parameters: {"backbone", "projection", "combiner", "free_vectors": f32[C, D]}; the projection
    with images, the last two with PRIME, the combiner's only where it has some.

    Attributes:
        sizes: of the backbone, which is a decoder if they are.
        pooling: see `EncoderConfig`.
        compute_dtype: see `EncoderConfig`.
        precision: see `EncoderConfig`.
        remat: see `EncoderConfig`.
        lora: see `EncoderConfig`.
        image_width: E; 0 is text only.
        prime: None trains on label text alone.
        num_free_vectors: C, shared and private together; 0 without PRIME.
    """

    sizes: Sizes
    pooling: str = "mean"
    compute_dtype: str = "float32"
    precision: str | None = None
    remat: str = "none"
    lora: LoraConfig = NO_LORA
    image_width: int = 0
    prime: PrimeConfig | None = None
    num_free_vectors: int = 0

    def setup(self):
        self.backbone = backbone.build(self.sizes, self.compute_dtype, self.remat, self.lora)
        if self.image_width:
            init = layers.uniform(self.image_width**-0.5)  # as the reference draws both
            self.projection = layers.Dense(
                self.sizes.hidden,
                (None, "embed"),
                kernel_init=init,
                bias_init=init,
                dtype=jnp.dtype(self.compute_dtype),
            )
        if self.prime is not None:
            p = self.prime
            if self.num_free_vectors < 1:
                raise ValueError(
                    f"prime: expected at least one free vector, got {self.num_free_vectors}"
                )
            self.combiner = combiner(p)
            init = nn.with_logical_partitioning(
                _FREE_VECTOR_INITS[p.free_vector_init], (None, "table_width")
            )
            self.free_vectors = self.param(
                "free_vectors", init, (self.num_free_vectors, self.sizes.width)
            )

    @jax.named_scope("tower")
    def encode(self, rows: Rows, deterministic: bool = True) -> EncoderOutput:
        """Embeddings of items, documents or labels alike, in the shape of `rows.slots`.

        Args:
            rows: see `Rows`; with images if the model has them, without if not.
            deterministic: no dropout; otherwise the rng "dropout" is needed.
        """
        width = 0 if rows.images is None else rows.images.shape[-1]
        if width != self.image_width:
            raise ValueError(
                f"images: expected vectors {self.image_width} wide (0 is none), got {width}"
            )
        with self._precisely():
            images = None
            if self.image_width:
                images = (self.projection(rows.images), rows.image_places)
            hidden = self.backbone(
                *(rows.tokens, rows.segments, rows.positions),
                *(rows.head, rows.longest, images, deterministic),
            )
            pooled = segments.pool(
                layers.wide(hidden), rows.segments, rows.per_row, rows.head, self.pooling
            )
            pooled = segments.take(pooled, rows.slots)
            if self.sizes.dense is not None:
                pooled = self.backbone(None, pooled=pooled)
        return EncoderOutput(pooled=pooled, unit=layers.normalize(pooled))

    def _precisely(self) -> contextlib.AbstractContextManager:
        """Within it, products are traced with the model's precision."""
        if self.precision is None and self.compute_dtype != "float32":
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.precision or "highest")

    @jax.named_scope("prototypes")
    def prototype(
        self,
        pooled: jax.Array,
        free_vector_ids: jax.Array,
        centroids: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """Prototypes of n labels; needs PRIME.

        Args:
            pooled: f32[n, D], as `encode` gives it.
            free_vector_ids: i32[n], rows of the free vectors.
            centroids: [n, D].
            deterministic: no dropout; otherwise the rng "dropout" is needed.

        Returns:
            unit f32[n, D].
        """
        free = sharding.rows(self.free_vectors, free_vector_ids)
        with self._precisely():
            return self.combiner(pooled, free, centroids, deterministic)

    def __call__(self, rows: Rows) -> EncoderOutput:
        """Touches every parameter; what `init_params` initialises through."""
        out = self.encode(rows)
        if self.prime is not None:
            self.prototype(out.pooled, jnp.zeros(len(out.pooled), jnp.int32), out.pooled)
        return out


def combiner(config: PrimeConfig) -> nn.Module:
    """The label prototype network of a config."""
    if config.combiner == "transformer":
        return TransformerCombiner(config.heads, config.ff_dim, config.dropout)
    return SumCombiner()


def init_params(model: DualEncoder, seed: int):
    """Random parameters, boxed with their logical axis names.

    Args:
        model: what to initialise.
        seed: the run's; the draw is a function of it and of nothing else.

    Returns:
        A dict of `nn.LogicallyPartitioned` leaves; under `jax.eval_shape`, of shapes.
    """
    zeros = jnp.zeros((1, 1), jnp.int32)
    one = Rows(tokens=zeros, segments=zeros, positions=zeros, slots=zeros[0])
    if model.image_width:
        one = one.replace(images=jnp.zeros((1, 1, model.image_width)), image_places=zeros)
    return model.init(rng.key(seed, rng.Stream.INIT, 0), one)["params"]
