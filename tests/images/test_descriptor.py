"""The descriptor without weights: what a nearest centroid reads from rendered pictures."""

import io
import sys

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra vision")
pytest.importorskip("skimage", reason="the descriptor needs the extra vision")

from xmc_jax.data.synthetic.product_set import ATTRIBUTES, Shop, SyntheticConfig  # noqa: E402
from xmc_jax.images import descriptor  # noqa: E402

COUNT = 600


@pytest.fixture(scope="module")
def rendered():
    """Pictures of labels of as many looks as there are, and their attributes."""
    shop = Shop(SyntheticConfig(labels=COUNT * 10, looks=24, styles=480))
    numbers = range(COUNT)
    images = [
        Image.open(io.BytesIO(shop.picture("label", number, 0))).convert("RGB")
        for number in numbers
    ]
    return images, np.array([shop.item("label", number).attributes for number in numbers])


@pytest.fixture(scope="module")
def vectors(rendered):
    return descriptor.describe(rendered[0])


def test_shape_dtype_and_range(vectors):
    assert vectors.shape == (COUNT, descriptor.WIDTH) and descriptor.WIDTH == 452
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors.astype(np.float16)).all() and vectors.min() >= 0
    # Gradients and colours weigh about the same.
    gradients, colours = (
        np.linalg.norm(part, axis=1).mean() for part in np.split(vectors, [324], axis=1)
    )
    assert 0.5 < gradients / colours < 2


# Shares of right answers by chance: 1 in 8, in 10, in 6.
@pytest.mark.parametrize("attribute, least", [("shape", 0.6), ("colour", 0.45), ("pattern", 0.45)])
def test_the_nearest_centroid_tells_an_attribute(rendered, vectors, attribute, least):
    values = rendered[1][:, ATTRIBUTES.index(attribute)]
    known, asked = slice(0, COUNT // 2), slice(COUNT // 2, COUNT)
    centroids = np.stack(
        [vectors[known][values[known] == value].mean(axis=0) for value in range(values.max() + 1)]
    )
    distance = ((vectors[asked, None] - centroids) ** 2).sum(-1)
    assert (distance.argmin(axis=1) == values[asked]).mean() > least


def test_a_vector_depends_on_its_image_alone(rendered, vectors):
    images = rendered[0]
    np.testing.assert_array_equal(descriptor.describe([images[7], images[3]]), vectors[[7, 3]])
    assert descriptor.describe([]).shape == (0, descriptor.WIDTH)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (64, 64), (301, 200)])
def test_any_size_and_no_contrast(size):
    vector = descriptor.describe([Image.new("RGB", size, (255, 255, 255))])[0]
    np.testing.assert_allclose(np.linalg.norm(vector), 3 * np.sqrt(2), rtol=1e-6)
    assert not vector[:324].any()  # no gradients


def test_colours_are_where_they_are():
    red = descriptor.describe([Image.new("RGB", (20, 20), (255, 0, 0))])[0, 324:]
    assert np.flatnonzero(red).tolist() == [48, 64 + 48]  # the corner (3, 0, 0) of 4 x 4 x 4
    frame = Image.new("RGB", (64, 64), (0, 0, 255))
    frame.paste((255, 0, 0), (16, 16, 48, 48))
    whole, middle = np.split(descriptor.describe([frame])[0, 324:] ** 2 / 9, 2)
    # Resizing keeps the size, so that nothing is mixed at the edge.
    np.testing.assert_allclose(whole[[48, 3]], [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(middle[[48, 3]], [1.0, 0.0], atol=1e-6)


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match="hog-colour: expected an image of mode RGB, got L"):
        descriptor.describe([Image.new("L", (8, 8))])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(ValueError, match=r"hog-colour: .*pip install 'xmc_jax\[vision\]'"):
        descriptor.describe([])
