"""PRIME's label prototype network: (text, free vector, centroid) of a label -> its prototype."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.models import layers
from xmc_jax.runtime import sharding


class TransformerCombiner(nn.Module):
    """One post-norm transformer layer over the three vectors, their mean, L2-normalised.

    The layer and its initial distribution are those of `torch.nn.TransformerEncoderLayer`. There
    is no position or type embedding: the mean is the same in any order of the three.

    Attributes:
        heads: attention heads; divides D.
        ff_dim: feed-forward width.
        dropout: fraction, of probabilities, feed-forward activations and both sublayers' outputs.

    Source: ViXML sec. 3.3 and supp. A; reference code, SingleLayerTransformerEncoder.
    """

    heads: int
    ff_dim: int
    dropout: float

    @nn.compact
    def __call__(
        self, pooled: jax.Array, free: jax.Array, centroid: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Prototypes of n labels.

        Args:
            pooled: f32[n, D], text embeddings before normalisation.
            free: f32[n, D], free vectors.
            centroid: f32[n, D], mean unit embeddings of the labels' documents.
            deterministic: no dropout; otherwise the rng "dropout" is needed.

        Returns:
            unit f32[n, D].

        Raises:
            ValueError: heads does not divide D.
        """
        D = pooled.shape[-1]
        if D % self.heads:
            raise ValueError(f"prime.heads: expected a divisor of D = {D}, got {self.heads}")
        drops = layers.dropouts(self, (self.dropout,) * 4, deterministic)
        drop_probabilities, drop_attention, drop_activations, drop_output = drops

        def pin(x: jax.Array) -> jax.Array:
            # Left to choose, XLA splits the three vectors and gives wrong sums on a (2, 2, 2) mesh.
            return sharding.constrain(x, "batch")

        x = pin(layers.wide(jnp.stack([pooled, free, centroid], axis=1)))
        dense = functools.partial(layers.Dense, dtype=x.dtype)
        # torch draws in_proj as one [3D, D] matrix: fan_in + fan_out = 4D.
        project = functools.partial(
            dense, D, ("embed", ("heads", self.heads)), _uniform(math.sqrt(6 / (4 * D)))
        )
        by_width, by_ff_dim = _uniform(D**-0.5), _uniform(self.ff_dim**-0.5)

        def heads(name: str) -> jax.Array:
            y = project(name=name)(x)
            return y.reshape(*y.shape[:2], self.heads, -1)

        y = layers.attention(
            heads("query"), heads("key"), heads("value"), dropout=drop_probabilities
        )
        y = dense(D, (("heads", self.heads), "embed"), by_width, name="out")(y)
        x = pin(layers.LayerNorm(1e-5, name="norm1")(pin(x + drop_attention(y))))
        y = dense(self.ff_dim, ("embed", "mlp"), by_width, by_width, name="up")(x)
        y = drop_activations(jax.nn.gelu(y, approximate=False))
        y = dense(D, ("mlp", "embed"), by_ff_dim, by_ff_dim, name="down")(y)
        x = pin(layers.LayerNorm(1e-5, name="norm2")(pin(x + drop_output(y))))
        return layers.normalize(x.mean(axis=1))


class SumCombiner(nn.Module):
    """The sum of unit text embedding, free vector and unit centroid, L2-normalised.

    It has no parameters: from the first step on, with free vectors that start at zero, prototypes
    are what text and centroid say, and free vectors learn what these miss. Not in the paper.
    """

    def __call__(
        self, pooled: jax.Array, free: jax.Array, centroid: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Prototypes of n labels; arguments and result as of `TransformerCombiner`."""
        return layers.normalize(layers.normalize(pooled) + free + layers.normalize(centroid))


def _uniform(bound: float) -> layers.Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
