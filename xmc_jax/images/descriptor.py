"""A frozen descriptor of pictures, "hog-colour", for where no pretrained encoder is at hand.

Histograms of gradients (scikit-image) and of colours (numpy). It sees shape, pattern and colour of
a thing on a plain ground, and knows nothing of what things are. Not from the paper.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "hog-colour"
"""What manifests, commands and tables call it."""
REVISION = "1"
"""Version of the vectors: equal images have equal vectors for as long as it stays the same."""

_SIDE = 64  # images are resized to a square
_CELL = 16  # pixels of a cell's side
_BLOCK = 2  # cells of a block's side, within which gradients are normalised
_ORIENTATIONS = 9
_LEVELS = 4  # of each of red, green and blue
_COLOUR_WEIGHT = 3.0  # colours then have the length that gradients have

_GRADIENTS = (_SIDE // _CELL - _BLOCK + 1) ** 2 * _BLOCK**2 * _ORIENTATIONS
WIDTH = _GRADIENTS + 2 * _LEVELS**3
"""E of the vectors."""


def describe(images: Sequence["Image"]) -> np.ndarray:
    """Descriptors of images.

    A vector is 9 orientations of gradients in 3 x 3 overlapping blocks of 2 x 2 cells; and 4 x 4 x
    4 colours of the whole image and of its middle quarter, as square roots of shares, with each
    pixel shared among the nearest colours.

    Args:
        images: n Pillow images of mode RGB and any size; they are stretched to a square.

    Returns:
        f32[n, E], E = 452; an image's vector does not depend on the others.

    Raises:
        ValueError: scikit-image is not installed, or an image is not RGB.
    """
    try:
        from skimage.feature import hog
    except ImportError as error:
        raise ValueError(
            f"{NAME}: expected scikit-image, found no {error.name}; pip install 'xmc_jax[vision]'"
        ) from error
    vectors = np.empty((len(images), WIDTH), np.float32)
    for vector, image in zip(vectors, images):
        if image.mode != "RGB":
            raise ValueError(f"{NAME}: expected an image of mode RGB, got {image.mode}")
        pixels = np.asarray(image.resize((_SIDE, _SIDE)), np.float64) / 255
        vector[:_GRADIENTS] = hog(
            pixels,
            orientations=_ORIENTATIONS,
            pixels_per_cell=(_CELL, _CELL),
            cells_per_block=(_BLOCK, _BLOCK),
            block_norm="L2-Hys",
            channel_axis=-1,
        )
        middle = pixels[_SIDE // 4 : -_SIDE // 4, _SIDE // 4 : -_SIDE // 4]
        colours = np.concatenate([_colours(pixels), _colours(middle)])
        vector[_GRADIENTS:] = _COLOUR_WEIGHT * colours
    return vectors


def _colours(pixels: np.ndarray) -> np.ndarray:
    """f64[levels^3]: roots of the shares of colours, pixels shared by trilinear interpolation."""
    scaled = pixels.reshape(-1, 3) * (_LEVELS - 1)
    below = np.minimum(scaled.astype(np.int64), _LEVELS - 2)
    above = scaled - below
    shares = np.zeros(_LEVELS**3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, above, 1 - above).prod(axis=1)
        cell = (below + corner) @ (_LEVELS**2, _LEVELS, 1)
        shares += np.bincount(cell, weight, _LEVELS**3)
    return np.sqrt(shares / len(scaled))
