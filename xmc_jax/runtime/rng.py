"""Named random streams: randomness is a function of (seed, stream, counter), never a stored key.

Adding a stream never changes another; a resumed run draws what the straight run would have drawn.
"""

import enum

import jax
import numpy as np


class Stream(enum.IntEnum):
    """The purpose of a random number. A checkpoint relies on the values: append, never renumber."""

    INIT = 0  # parameters
    DROPOUT = 1  # per step
    POSITIVE = 2  # the positive drawn inside the loss, per step
    SAMPLE = 3  # labels sampled for the documents of a batch, per step
    ORDER = 4  # order of documents, per epoch
    KMEANS = 5  # seeds of balanced 2-means, per clustering
    LENGTHS = 6  # batches drawn to see how long they are, before the first step


def key(seed: int, stream: Stream, counter) -> jax.Array:
    """The device key of (seed, stream, counter).

    Args:
        counter: step or epoch; an int or a traced i32[].
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(stream)), counter)


def host(seed: int, stream: Stream, counter: int) -> np.random.Generator:
    """The host generator of (seed, stream, counter): Philox, (stream, counter) its counter."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, int(stream), counter]))
