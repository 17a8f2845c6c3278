"""Decoding within limits, and the pixels of the processors."""

import dataclasses
import io
import json
import pathlib
import struct
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.vision import odd_images
from tests.vision.odd_images import IMAGES, encoded, oriented, picture, png_of
from xmc_jax.vision import images
from xmc_jax.vision.images import Limits, Processor

PUBLISHED = pathlib.Path(__file__).parents[1] / "models" / "published" / "vision"


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data: bytes, **options) -> str:
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("ignore")  # Pillow's own, before the error
        images.decode(data, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith("image: expected")
    return str(error.value)


@pytest.mark.parametrize("name", IMAGES)
def test_every_odd_image_decodes(name):
    image = images.decode(IMAGES[name])
    with Image.open(io.BytesIO(IMAGES[name])) as file:
        assert image.mode == "RGB" and sorted(image.size) == sorted(file.size)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(orientation, format, options):
    image = images.decode(oriented(orientation, format, **options))
    expected = UPRIGHT[orientation](np.asarray(picture(41, 23)))
    np.testing.assert_array_equal(array(image), expected)


def test_orientation_of_a_tiff_is_applied_once():
    expected = UPRIGHT[8](np.asarray(picture(64, 48)))
    np.testing.assert_array_equal(array(images.decode(IMAGES["orientation in tiff"])), expected)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0*garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\0\0\0\x09\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0",  # 99
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01\x36\0\0\0\0\0\0\0",  # text
    ],
)
def test_a_broken_orientation_is_none(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = images.decode(encoded(picture(41, 23), "JPEG", exif=exif))
    plain = images.decode(encoded(picture(41, 23), "JPEG"))
    np.testing.assert_array_equal(array(image), array(plain))


def test_alpha_is_laid_over_white_or_dropped():
    rgba = np.asarray(picture(64, 48, "RGBA"))
    colours, share = rgba[..., :3], rgba[..., 3:] / 255
    white = images.decode(IMAGES["alpha"])
    np.testing.assert_allclose(array(white), colours * share + 255 * (1 - share), atol=1)
    np.testing.assert_array_equal(array(images.decode(IMAGES["alpha"], alpha="drop")), colours)
    with pytest.raises(ValueError, match=r"alpha: expected one of .* got 'black'"):
        images.decode(IMAGES["alpha"], alpha="black")


@pytest.mark.parametrize("name", ["one colour transparent", "palette, one transparent"])
def test_what_is_transparent_is_white(name):
    kept = array(images.decode(IMAGES[name], alpha="drop"))
    laid = array(images.decode(IMAGES[name]))
    changed = (kept != laid).any(-1)
    assert 0 < changed.sum() < changed.size
    assert (laid[changed] == 255).all()


@pytest.mark.parametrize("name", [*odd_images.SATURATED, "colours of 16 bits"])
def test_of_16_bits_the_upper_8_are_taken(name):
    expected = picture(50, 40, "L").convert("RGB") if "grey" in name else picture(30, 20)
    np.testing.assert_array_equal(array(images.decode(IMAGES[name])), np.asarray(expected))


def test_interlaced():
    expected = np.asarray(picture(45, 37))
    np.testing.assert_array_equal(array(images.decode(IMAGES["interlaced"])), expected)


@pytest.mark.parametrize("name", ["gif, animated", "webp, animated", "png, animated"])
def test_the_first_of_several_frames(name):
    first = np.asarray(picture(32, 20)).astype(int)
    far = np.abs(first - np.asarray(picture(32, 20, seed=1))).mean()
    assert np.abs(first - array(images.decode(IMAGES[name]))).mean() < far / 4


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has no more."""
    return png_of(
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )


@pytest.mark.parametrize(
    "width, height", [(50_000, 50_000), (10_000, 10_000), (9_000, 9_000), (70_000, 3), (3, 70_000)]
)
def test_size_is_looked_at_before_decoding(width, height):
    assert "33554432 pixels" in refused(header(width, height))


def test_limits():
    data = encoded(picture(20, 10), "PNG")
    assert images.decode(data, Limits(len(data), 200, 20)).size == (20, 10)
    assert f"at most {len(data) - 1} bytes, got {len(data)}" in refused(
        data, limits=Limits(max_bytes=len(data) - 1)
    )
    for limits in (Limits(max_pixels=199), Limits(max_side=19)):
        assert f"{limits.max_pixels} pixels" in refused(data, limits=limits)
    assert "got 20 x 10" in refused(data, limits=Limits(max_pixels=199))


@pytest.mark.parametrize("field", ["max_bytes", "max_pixels", "max_side"])
def test_limits_are_checked(field):
    with pytest.raises(ValueError, match=f"Limits.{field}: expected at least 1, got 0"):
        Limits(**{field: 0})


def test_limits_beyond_those_of_pillow_are_refused():
    with pytest.raises(ValueError, match=r"max_pixels: expected at most 89478485, Pillow's"):
        Limits(max_pixels=10**8)


def test_tiles_larger_than_the_image_are_refused():
    tags = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1))
    tags += ((322, 40_000), (323, 40_000), (324, 8), (325, 4))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0\x10\0\0\0" + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    assert "got 40000 x 40000" in refused(data)


@pytest.mark.parametrize("kind", [b"zTXt", b"IDAT"])
def test_a_bomb_does_not_decode(kind):
    """More than the size says: in a text, which is refused, or in the pixels, which are not."""
    start = header(5, 5)[: 8 + 25]
    body = (b"k\0\0" if kind == b"zTXt" else b"") + zlib.compress(bytes(50 << 20))
    chunks = png_of((kind, body), (b"IDAT", zlib.compress(bytes(80))), (b"IEND", b""))
    if kind == b"zTXt":
        assert "too large" in refused(start + chunks[8:])
    else:
        assert images.decode(start + chunks[8:]).size == (5, 5)


@pytest.mark.parametrize("name", IMAGES)
def test_truncated(name):
    data = IMAGES[name]
    # within the first of several, which is all that is read
    share = 0.2 if "several pictures" in name or "animated" in name else 0.5
    refused(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<html>\n<body>Not found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"%PDF-1.7\n",
        encoded(picture(9, 9), "PPM"),
        encoded(picture(9, 9), "ICO"),
        encoded(picture(9, 9), "TGA"),
        encoded(picture(9, 9), "AVIF"),
    ],
    ids=["empty", "one byte", "html", "svg", "eps", "pdf", "ppm", "ico", "tga", "avif"],
)
def test_other_files_are_refused(data):
    assert "one of JPEG, PNG, WEBP, GIF, BMP, TIFF," in refused(data)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    assert "8 or 16 bits per channel, got 32" in refused(encoded(picture(9, 9, mode), "TIFF"))


def test_damaged_files_decode_or_are_refused_in_one_line():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, whole in IMAGES.items():
            if "tiff" in name:
                continue  # libtiff writes what it finds to standard error
            for _ in range(8):
                data = bytearray(whole)
                for place in rng.integers(0, min(len(data), 400), 4):
                    data[place] = rng.integers(256)
                try:
                    image = images.decode(bytes(data))
                except ValueError as error:
                    assert "\n" not in str(error) and str(error).startswith("image: expected")
                else:
                    assert image.mode == "RGB"


def test_a_decoded_image_outlives_its_file():
    image = images.decode(IMAGES["jpeg"])
    assert type(image) is Image.Image
    again = images.decode(encoded(image, "PNG"))
    np.testing.assert_array_equal(array(image), array(again))


@pytest.mark.parametrize(
    "size, shrunk",
    [
        ((64, 48), (20, 15)),
        ((48, 64), (15, 20)),
        ((20, 20), (20, 20)),
        ((7, 4), (7, 4)),
        ((1000, 3), (20, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_pad_square(size, shrunk):
    image = picture(*size)
    before = array(image).copy()
    padded = array(images.pad_square(image, 20))
    np.testing.assert_array_equal(array(image), before)
    assert padded.shape == (20, 20, 3)
    width, height = shrunk
    left, top = (20 - width) // 2, (20 - height) // 2
    inner = padded[top : top + height, left : left + width]
    copy = image.copy()
    copy.thumbnail((20, 20), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(inner, array(copy))
    outside = np.ones((20, 20), bool)
    outside[top : top + height, left : left + width] = False
    assert (padded[outside] == 255).all()


def test_processor_is_resize_rescale_normalise():
    processor = Processor((9, 13), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = picture(64, 48)
    small = array(image.resize((13, 9), Image.Resampling.BILINEAR))
    pixels = processor(image)
    assert pixels.shape == (9, 13, 3) and pixels.dtype == np.float32
    expected = (small / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    np.testing.assert_array_equal(processor.resize(image), small)


def test_pixels_are_normalised_on_a_device_as_here():
    processor = Processor((9, 13))
    small = np.stack([processor.resize(picture(30, 20, seed=seed)) for seed in range(3)])
    there = jax.jit(processor.normalize)(jnp.asarray(small))
    assert there.dtype == jnp.float32 and small.dtype == np.uint8
    np.testing.assert_allclose(there, processor.normalize(small), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_processor_takes_rgb_only(mode):
    with pytest.raises(ValueError, match=f"expected mode RGB, got {mode}"):
        Processor()(picture(9, 9, mode))


EXPECTED = {
    "siglip2-so400m-patch14-384": Processor((384, 384), "bilinear"),
    "siglip2-base-patch16-224": Processor((224, 224), "bilinear"),
    "siglip2-large-patch16-256": Processor((256, 256), "bilinear"),
    "siglip-so400m-patch14-384": Processor((384, 384), "bicubic"),
    "vit-base-patch16-224-in21k": Processor((224, 224), "bilinear"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_processors(name):
    raw = json.loads((PUBLISHED / f"{name}.preprocessor.json").read_text(encoding="utf-8"))
    assert images.from_hf(raw) == EXPECTED[name]
    size = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    size = size.get("vision_config", size).get("image_size", 224)
    assert images.from_hf(raw).size == (size, size)


@pytest.mark.parametrize(
    "raw, changes",
    [
        ({"image_processor_type": "SiglipImageProcessor"}, {}),
        ({"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 8, "width": 6}},
         {"size": (8, 6)}),
        ({"image_processor_type": "ViTImageProcessor"}, {"resample": "bilinear"}),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 1},
         {"size": (32, 32), "resample": "lanczos"}),
        ({"image_mean": 0.25, "image_std": [1, 2, 3], "rescale_factor": 1},
         {"mean": (0.25,) * 3, "std": (1.0, 2.0, 3.0), "rescale": 1.0, "resample": "bilinear"}),
        ({"do_rescale": False, "do_normalize": False, "do_resize": None, "do_pad": False},
         {"mean": (0.0,) * 3, "std": (1.0,) * 3, "rescale": 1.0, "resample": "bilinear"}),
    ],
)  # fmt: skip
def test_what_a_config_lacks_is_the_default(raw, changes):
    assert images.from_hf(raw) == dataclasses.replace(Processor(), **changes)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "one of .*'SiglipImageProcessor'"),
        ({"do_resize": False}, "do_resize to be True, got False"),
        ({"do_center_crop": True}, "do_center_crop to be False, got True"),
        ({"size": {"shortest_edge": 224}}, r"size to be .* got \{'shortest_edge': 224\}"),
        ({"size": "224"}, "size to be a number or height and width, got '224'"),
        ({"size": 0}, "Processor.size: expected height and width"),
        ({"resample": 9}, r"resample to be one of \{.*\}, got 9"),
        ({"resample": "bicubic"}, "resample to be one of"),
        ({"image_mean": [0.5, 0.5]}, "image_mean to be a number or three"),
        ({"image_std": [0.5, 0.5, 0]}, "Processor.std: expected three numbers above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor to be a number or three, got '1/255'"),
        ({"rescale_factor": 0}, "Processor.rescale: expected more than 0"),
    ],
)
def test_other_processors_are_refused_in_one_line(raw, message):
    with pytest.raises(ValueError, match=message) as error:
        images.from_hf(raw)
    assert "\n" not in str(error.value)
