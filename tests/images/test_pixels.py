"""Decoding within limits, and the pixels of the processors."""

import dataclasses
import io
import json
import pathlib
import struct
import subprocess
import sys
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.images import odd_images
from tests.images.odd_images import IMAGES, encoded, oriented, picture, png, png_of, tiff
from xmc_jax.images import decoding, isolated, preprocessing
from xmc_jax.images.decoding import DecodeLimits
from xmc_jax.images.preprocessing import Processor

CASES = pathlib.Path(__file__).parents[1] / "cases" / "images"
PUBLISHED = pathlib.Path(__file__).parents[1] / "models" / "published" / "vision"


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data: bytes, **options) -> str:
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("ignore")  # Pillow's own, before the error
        decoding.decode(data, **options)
    assert "\n" not in str(error.value) and str(error.value).startswith("image: expected")
    return str(error.value)


@pytest.mark.parametrize("name", IMAGES)
def test_every_odd_image_decodes(name):
    image = decoding.decode(IMAGES[name])
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
    image = decoding.decode(oriented(orientation, format, **options))
    expected = UPRIGHT[orientation](np.asarray(picture(41, 23)))
    np.testing.assert_array_equal(array(image), expected)


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
        image = decoding.decode(encoded(picture(41, 23), "JPEG", exif=exif))
    plain = decoding.decode(encoded(picture(41, 23), "JPEG"))
    np.testing.assert_array_equal(array(image), array(plain))


def transparent(*colour: int) -> tuple[bytes, bytes]:
    """The chunk of a PNG that names one colour as transparent."""
    return b"tRNS", struct.pack(f">{len(colour)}H", *colour)


def on_white(colours: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """Colours of 0 to 255 [H, W, 3 or 1] with alpha of 0 to 255 [H, W], over white."""
    share = opaque[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share))


def oracles() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files, and their pixels computed here: u8[H, W, 3 or 1]."""
    rng = np.random.default_rng(0)
    cases = {}
    grey = {depth: rng.integers(0, 2**depth, (6, 8)) for depth in (1, 2, 4, 8, 12, 16)}
    seen = {d: v * 255 // (2**d - 1) if d < 8 else v >> d - 8 for d, v in grey.items()}
    for depth, samples in grey.items():
        black = seen[depth][..., None]
        if depth != 12:
            colour = int(samples[2, 3])
            cases[f"png, grey of {depth} bits"] = png(depth, 0, samples), black
            cases[f"png, grey of {depth} bits, one transparent"] = (
                png(depth, 0, samples, transparent(colour)),
                np.where((samples == colour)[..., None], 255, black),
            )
        for order in "<>":
            for photometric, expected in ((1, black), (0, 255 - black)):
                if (order == "<" and (depth, photometric) != (12, 0)) or depth < 12:
                    name = f"tiff, grey of {depth} bits, {order}, photometric {photometric}"
                    cases[name] = tiff(samples, depth, photometric, order), expected
    floats = rng.random((6, 8)).astype(np.float32)
    light = np.rint(floats * 255)[..., None]
    for order in "<>":
        for photometric, expected in ((1, light), (0, 255 - light)):
            data = tiff(floats, 32, photometric, order, format=3)
            cases[f"tiff of floats, {order}, photometric {photometric}"] = data, expected
    rgb, deep = rng.integers(0, 256, (6, 8, 3)), rng.integers(0, 2**16, (6, 8, 3))
    alpha = rng.integers(0, 256, (6, 8))
    deep_alpha = rng.integers(0, 2**16, (6, 8))
    deep[0, 1] = deep[0, 0] ^ (0, 0, 1)  # equal in the upper 8 bits
    for name, depth, samples in (("8", 8, rgb), ("16", 16, deep)):
        there = (samples == samples[0, 0]).all(-1, keepdims=True)
        upper = samples >> depth - 8
        cases[f"png, colours of {name} bits"] = png(depth, 2, samples), upper
        cases[f"png, colours of {name} bits, one transparent"] = (
            png(depth, 2, samples, transparent(*samples[0, 0])),
            np.where(there, 255, upper),
        )
        for order in "<>":
            cases[f"tiff, colours of {name} bits, {order}"] = tiff(samples, depth, 2, order), upper
        opaque = alpha if depth == 8 else deep_alpha
        rgba, la = np.dstack([samples, opaque]), np.dstack([samples[..., :1], opaque])
        white = on_white(upper, opaque >> depth - 8)
        white_grey = on_white(upper[..., :1], opaque >> depth - 8)
        cases[f"png, alpha of {name} bits"] = png(depth, 6, rgba), white
        cases[f"png, grey and alpha of {name} bits"] = png(depth, 4, la), white_grey
        cases[f"tiff, alpha of {name} bits"] = tiff(rgba, depth, 2, extra=2), white
    la = np.dstack([rgb[..., :1], alpha])
    cases["tiff, grey and alpha"] = tiff(la, 8, 1, extra=2), on_white(rgb[..., :1], alpha)
    held = np.minimum(rgb, alpha[..., None])  # multiplied by alpha already
    over = held + 255 - alpha[..., None]
    cases["tiff, multiplied alpha"] = tiff(np.dstack([held, alpha]), 8, 2, extra=1), over
    la = np.dstack([held[..., :1], alpha])
    cases["tiff, grey and multiplied alpha"] = tiff(la, 8, 1, extra=1), over[..., :1]
    palette = rng.integers(0, 256, (256, 3))
    fades = rng.integers(0, 256, 256)
    for depth in (1, 2, 4, 8):
        rows, size = grey[depth], 2**depth
        chunk = b"PLTE", palette[:size].astype(np.uint8).tobytes()
        fade = b"tRNS", fades[:size].astype(np.uint8).tobytes()
        cases[f"png, palette of {depth} bits"] = png(depth, 3, rows, chunk), palette[rows]
        cases[f"png, palette of {depth} bits and alpha"] = (
            png(depth, 3, rows, chunk, fade),
            on_white(palette[rows], fades[rows]),
        )
        table = (palette[:size].T * 257).reshape(-1).tolist()
        cases[f"tiff, palette of {depth} bits"] = (
            tiff(rows, depth, 3, colormap=table),
            palette[rows],
        )
    pa = np.dstack([grey[8], alpha])
    table = (palette.T * 257).reshape(-1).tolist()
    cases["tiff, palette and alpha"] = (
        tiff(pa, 8, 3, extra=2, colormap=table),
        on_white(palette[grey[8]], alpha),
    )
    cmyk = rng.integers(0, 256, (6, 8, 4))
    ink = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    cases["tiff, CMYK"] = tiff(cmyk, 8, 5), ink
    cases["tiff, CMYK of 16 bits"] = tiff(cmyk * 257, 16, 5), ink
    flat = np.broadcast_to(cmyk[0, 0], (16, 16, 4)).astype(np.uint8)
    adobe = encoded(Image.fromarray(flat, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in adobe
    cases["jpeg, CMYK, inverted as Adobe does"] = adobe, np.broadcast_to(ink[0, 0], (16, 16, 3))
    frames = [picture(32, 20, seed=seed) for seed in range(3)]
    several = {"save_all": True, "append_images": frames[1:]}
    first = np.asarray(frames[0])
    cases["webp, animated"] = encoded(frames[0], "WEBP", lossless=True, **several), first
    cases["png, animated"] = encoded(frames[0], "PNG", **several), first
    gifs = [frame.quantize(32) for frame in frames]
    shown = np.asarray(gifs[0].convert("RGB"))
    several = {"save_all": True, "append_images": gifs[1:]}
    cases["gif, animated"] = encoded(gifs[0], "GIF", **several), shown
    hole = np.asarray(gifs[0]) == 2
    cases["gif, one transparent"] = (
        encoded(gifs[0], "GIF", transparency=2, optimize=False),
        np.where(hole[..., None], 255, shown),
    )
    cases["png with a colour profile"] = encoded(frames[0], "PNG", icc_profile=b"profile"), first
    cases["png, interlaced"] = odd_images.interlaced(np.asarray(picture(45, 37))), picture(45, 37)
    turned = encoded(picture(64, 48), "TIFF", tiffinfo={274: 8})
    cases["tiff, turned once"] = turned, UPRIGHT[8](np.asarray(picture(64, 48)))
    cases["bmp"] = encoded(frames[0], "BMP"), first
    return cases


ORACLES = oracles()


@pytest.mark.parametrize("name", ORACLES)
def test_pixels_are_those_of_the_file_on_white(name):
    data, expected = ORACLES[name]
    found, expected = array(decoding.decode(data)).astype(int), np.asarray(expected)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1)


def test_alpha_may_be_dropped():
    rgba = np.asarray(picture(64, 48, "RGBA"))
    found = decoding.decode(encoded(picture(64, 48, "RGBA"), "PNG"), alpha="drop")
    np.testing.assert_array_equal(array(found), rgba[..., :3])
    with pytest.raises(ValueError, match=r"alpha: expected one of .* got 'black'"):
        decoding.decode(IMAGES["alpha"], alpha="black")


@pytest.mark.parametrize("name, mean", [("gray12.tiff", 127.5), ("gray16_trns.png", 205.5)])
def test_published_faults_of_pillow(name, mean):
    """Greys of 12 bits were nearly black (8); of the other, half is transparent."""
    assert array(decoding.decode((CASES / name).read_bytes())).mean() == mean


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
    assert decoding.decode(data, DecodeLimits(len(data), 200, 20)).size == (20, 10)
    assert f"at most {len(data) - 1} bytes, got {len(data)}" in refused(
        data, limits=DecodeLimits(max_bytes=len(data) - 1)
    )
    for limits in (DecodeLimits(max_pixels=199), DecodeLimits(max_side=19)):
        assert f"{limits.max_pixels} pixels" in refused(data, limits=limits)
    assert "got 20 x 10" in refused(data, limits=DecodeLimits(max_pixels=199))


@pytest.mark.parametrize("field", ["max_bytes", "max_pixels", "max_side"])
def test_limits_are_checked(field):
    with pytest.raises(ValueError, match=f"{field}: expected at least 1.*got 0"):
        DecodeLimits(**{field: 0})


def test_limits_beyond_those_of_pillow_are_refused():
    with pytest.raises(ValueError, match=r"max_pixels: expected .* at most 89478485, Pillow's"):
        DecodeLimits(max_pixels=10**8)


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
        assert decoding.decode(start + chunks[8:]).size == (5, 5)


@pytest.mark.parametrize("name", IMAGES)
def test_truncated(name):
    data = IMAGES[name]
    # within the first of several, which is all that is read
    share = 0.2 if "several pictures" in name or "animated" in name else 0.5
    refused(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "0 bytes of something else"),
        (b"secret: 1234", "12 bytes of something else"),
        (b"<html>\n<body>Not found</body></html>", "a page in HTML"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "something else"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "a PostScript file"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\xff\x0a\0\0", "a JPEG XL"),
        (encoded(picture(9, 9), "PPM"), "something else"),
        (encoded(picture(9, 9), "ICO"), "an icon"),
        (encoded(picture(9, 9), "TGA"), "something else"),
        (tiff(np.zeros((4, 4), int), 16, 0, ">"), "a TIFF"),
        (tiff(np.zeros((4, 4), int), 12, 1, ">"), "a TIFF"),
    ],
)
def test_other_files_are_refused_by_what_they_are(data, found):
    message = refused(data)
    assert message.startswith("image: expected one of JPEG, PNG, WEBP, GIF, BMP, TIFF")
    assert found in message and "secret" not in message


@pytest.mark.parametrize(
    "samples, depth, format, message",
    [
        (np.zeros((4, 4), np.int32), 32, 2, "signed"),
        (np.zeros((4, 4), np.uint32), 32, 1, "up to 16 bits per channel, or floats, got 32"),
        (np.zeros((4, 4), np.int16), 16, 2, "signed"),
        (np.full((4, 4), 1.5, np.float32), 32, 3, "floats from 0 to 1, got 1.5 to 1.5"),
        (np.full((4, 4), np.nan, np.float32), 32, 3, "floats from 0 to 1, got nan to nan"),
    ],
)
def test_samples_without_a_white_are_refused(samples, depth, format, message):
    assert message in refused(tiff(samples, depth, 1, format=format))


# What other processes decode


@pytest.fixture
def fresh(monkeypatch):
    """Processes of the test's own, which it may limit."""
    monkeypatch.setattr(isolated, "_idle", [])
    yield
    for process in isolated._idle:
        process.kill()
        process.wait()


def heic(image: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", quality=100, chroma=444)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_avif_and_heic(kind):
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:24, :, :3], pixels[:, :32, 3] = (200, 40, 90), 255
    image = Image.fromarray(pixels)
    data = (
        heic(image) if kind == "HEIC" else encoded(image, "AVIF", quality=100, subsampling="4:4:4")
    )
    found = array(decoding.decode(data)).astype(int)
    expected = on_white(pixels[..., :3], pixels[..., 3])
    np.testing.assert_allclose(found, expected, atol=8)
    assert "do not decode" in (message := refused(data[: len(data) // 2])) or kind in message
    with pytest.raises(decoding.TooLarge, match="at most 65536 per side, got 64 x 48"):
        decoding.decode(data, DecodeLimits(max_pixels=3000))


def test_the_published_avif_and_its_orientation():
    assert array(decoding.decode((CASES / "avif.avif").read_bytes())).shape == (48, 64, 3)
    exif = Image.Exif()
    exif[0x112] = 6
    turned = decoding.decode(encoded(picture(41, 23), "AVIF", exif=exif))
    assert turned.size == (23, 41)


def test_heic_and_avif_are_named_where_they_cannot_be_read(monkeypatch):
    data = heic(picture(9, 9))
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda _: None)
    assert "found a HEIC; pip install 'xmc_jax[heif]'" in refused(data)
    monkeypatch.setattr(decoding.features, "check", lambda _: False)
    assert "found an AVIF; install Pillow 11.3" in refused(encoded(picture(9, 9), "AVIF"))


def test_a_picture_larger_than_it_says_is_refused_within_the_memory(fresh, monkeypatch):
    data = encoded(Image.new("RGB", (4000, 4000), (3, 4, 5)), "AVIF", speed=10)
    size = data.index(b"ispe") + 8
    data = data[:size] + struct.pack(">II", 64, 64) + data[size + 8 :]
    assert decoding.decode(data).size == (64, 64)
    isolated._idle.pop().kill()
    monkeypatch.setattr(isolated, "MEMORY", 16 << 20)
    assert "Decoding" in refused(data)
    assert decoding.decode(encoded(picture(9, 9), "AVIF")).size == (9, 9)


@pytest.mark.parametrize("end, why", [("XCPU", "time"), ("KILL", "memory")])
def test_a_picture_that_ends_its_process_costs_no_other(fresh, end, why):
    dying = f"import os, signal; os.read(0, 1); os.kill(os.getpid(), signal.SIG{end})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    isolated._idle.append(subprocess.Popen([sys.executable, "-c", dying], **pipes))
    assert refused(encoded(picture(9, 9), "AVIF")).endswith(f"takes more {why}")
    assert decoding.decode(encoded(picture(9, 9), "AVIF")).size == (9, 9)


def test_processor_time_is_limited(fresh):
    """To none here, and the second that has begun."""
    endless = "decoding.decode_here = lambda *_: any(iter(int, 1)); isolated.serve(1 << 30, 0)"
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from xmc_jax.images import decoding, isolated; "
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    isolated._idle.append(subprocess.Popen([sys.executable, "-c", code + endless], **pipes))
    assert refused(encoded(picture(9, 9), "AVIF")).endswith("takes more time")


def test_damaged_files_decode_or_are_refused_in_one_line():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, whole in (IMAGES | {"avif": encoded(picture(40, 30), "AVIF")}).items():
            if "tiff" in name:
                continue  # libtiff writes what it finds to standard error
            for _ in range(8):
                data = bytearray(whole)
                for place in rng.integers(0, min(len(data), 400), 4):
                    data[place] = rng.integers(256)
                try:
                    image = decoding.decode(bytes(data))
                except ValueError as error:
                    assert "\n" not in str(error) and str(error).startswith("image: expected")
                else:
                    assert image.mode == "RGB"


def test_a_decoded_image_outlives_its_file():
    image = decoding.decode(IMAGES["jpeg"])
    assert type(image) is Image.Image
    again = decoding.decode(encoded(image, "PNG"))
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
    padded = array(preprocessing.pad_square(image, 20))
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
    assert preprocessing.from_hf(raw) == EXPECTED[name]
    size = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    size = size.get("vision_config", size).get("image_size", 224)
    assert preprocessing.from_hf(raw).size == (size, size)


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
    assert preprocessing.from_hf(raw) == dataclasses.replace(Processor(), **changes)


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
        preprocessing.from_hf(raw)
    assert "\n" not in str(error.value)
