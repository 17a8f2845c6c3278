"""Bytes of an image file to RGB, within limits."""

import dataclasses
import importlib.util
import io

import numpy as np
from PIL import ExifTags, Image, features

# What is decoded, and nothing else: Pillow knows formats that run other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ISOLATED = ("AVIF", "HEIF")  # as Pillow names what `isolated` decodes
_PLUGIN = "pillow_heif"
# How files begin. A name is for refusals, so that they need not show what is in the file.
_SIGNATURES = {
    b"\xff\xd8\xff": "a JPEG",
    b"\x89PNG": "a PNG",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"II+\0": "a BigTIFF",
    b"MM\0+": "a BigTIFF",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
    b"\xffO\xffQ": "a JPEG 2000",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0": "an icon",
    b"%PDF": "a PDF",
    b"%!PS": "a PostScript file",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "a gzip file",
}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# A JPEG may ask for a pass over all its pixels per scan; encoders make about ten. The two bytes of
# a scan's marker may also turn up by chance, outside of the picture.
_SCAN, _FREE_SCANS, _BYTES_PER_SCAN = b"\xff\xda", 100, 1 << 15
# Likewise an object per segment; the bytes of these markers (APP0 to APP15, COM) turn up by chance
# once in 4 KB.
_SEGMENTS = tuple(bytes((0xFF, code)) for code in (*range(0xE0, 0xF0), 0xFE))
_FREE_SEGMENTS, _BYTES_PER_SEGMENT = 1000, 1 << 9
_GIF_PIECES = 1 << 16  # of comments and the like; a comment in whole pieces may have 16 MB
ALPHA = ("white", "drop")
# What undoes each EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TIFF_TILE = (322, 323)  # width and length, which may exceed the image's


@dataclasses.dataclass(frozen=True)
class DecodeLimits:
    """What an image may cost; beyond it, it is refused before it is decoded.

    Attributes:
        max_bytes: encoded.
        max_pixels: decoded; 16 bytes each at the worst. Pillow has a limit of its own and warns
            above it.
        max_side: pixels of the longer side, which resizing needs 48 bytes of each.
    """

    max_bytes: int = 2**25
    max_pixels: int = 2**25
    max_side: int = 2**16

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            most = Image.MAX_IMAGE_PIXELS if name == "max_pixels" else None
            if not 1 <= value <= (most or value):
                limit = f" and at most {most}, Pillow's limit" if most else ""
                raise ValueError(f"{name}: expected at least 1{limit}, got {value}")


def decode(data: bytes, limits: DecodeLimits = DecodeLimits(), alpha: str = "white") -> Image.Image:
    """The first picture in an image file, upright, 8 bits per channel.

    EXIF orientation is applied and colour profiles are not. Of 10 to 16 bits the upper 8 are taken;
    of floats, 0 is black and 1 is white. (Pillow, and transformers with it, would make every grey
    above 255 of 65535 white.) AVIF is decoded where Pillow was built with it, HEIC where the
    package pillow-heif is installed; see `isolated`.

    Args:
        data: the whole file.
        limits: see `DecodeLimits`.
        alpha: "white" lays what is transparent over white, as transformers 5 and shops do; "drop"
            takes the colours beneath, often black, as transformers 4 and the ViXML reference do.

    Returns:
        An image of mode RGB.

    Raises:
        TooLarge: over a limit.
        ValueError: in one line: another format, made to be slow, truncated or broken.
    """
    if alpha not in ALPHA:
        raise ValueError(f"alpha: expected one of {ALPHA}, got {alpha!r}")
    if len(data) > limits.max_bytes:
        raise TooLarge(f"image: expected at most {limits.max_bytes} bytes, got {len(data)}")
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand.startswith(b"avi") or (brand in _HEIC and b"avif" in data[16:64]):
        if not features.check("avif"):
            raise ValueError(
                "image: expected a format that this Pillow reads, found an AVIF; install Pillow "
                "11.3 or later, built with AVIF"
            )
    elif brand in _HEIC:
        if importlib.util.find_spec(_PLUGIN) is None:
            raise ValueError(
                "image: expected a format that Pillow reads, found a HEIC; pip install "
                "'xmc_jax[heif]'"
            )
    else:
        return decode_here(data, limits, alpha)
    from xmc_jax.images import isolated

    return isolated.decode(data, limits, alpha)


def register_plugins(threads: int) -> None:
    """Lets this process decode AVIF and HEIC, each with so many threads; see `isolated`."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = threads
    if importlib.util.find_spec(_PLUGIN):
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = threads
        pillow_heif.register_heif_opener()


def decode_here(data: bytes, limits: DecodeLimits, alpha: str) -> Image.Image:
    """`decode` in this process, whatever the format."""
    _check_work(data)
    formats = _ISOLATED if data[4:8] == b"ftyp" else FORMATS
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            _check_size(image, limits)
            image.load()
            turn = _orientation(image)
            image = _rgb(image, data, alpha)
            return image if turn is None else image.transpose(turn)
    except (MemoryError, _Refused, TooLarge):
        raise
    except Image.UnidentifiedImageError as error:
        kind = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)
        if data[8:12] == b"WEBP" or data[4:8] == b"ftyp":
            kind = "a damaged WebP, AVIF or HEIC"
        if kind is None and data[:200].lstrip().lower().startswith((b"<html", b"<!doctype html")):
            kind = "a page in HTML"
        problem = f"{len(data)} bytes of something else"
        if kind is not None:
            problem = f"{kind} that Pillow does not read"
        raise ValueError(f"image: expected one of {', '.join(FORMATS)}, found {problem}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(
            f"image: expected at most {limits.max_pixels} pixels, got more: {_one_line(error)}"
        ) from error
    except Exception as error:  # whatever a decoder may raise on bytes from anywhere
        raise ValueError(
            f"image: expected a whole image, found {len(data)} bytes that do not decode: "
            f"{_one_line(error)}"
        ) from error


class TooLarge(ValueError):
    """An image over a limit; larger limits may take it."""


class _Refused(ValueError):
    """An error that says all there is to say."""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_work(data: bytes) -> None:
    """Refuses files that cost far more to decode than their bytes and pixels say."""
    problem = ""
    if data.startswith(b"\xff\xd8"):
        if data.count(_SCAN) > _FREE_SCANS + len(data) // _BYTES_PER_SCAN:
            problem = "a JPEG of more scans"
        elif sum(map(data.count, _SEGMENTS)) > _FREE_SEGMENTS + len(data) // _BYTES_PER_SEGMENT:
            problem = "a JPEG of more segments"
    elif data.startswith(b"GIF8") and _gif_pieces(data) > _GIF_PIECES:
        problem = "a GIF of more pieces"
    if problem:
        raise ValueError(f"image: expected what encoders make, got {problem} than they do")


def _gif_pieces(data: bytes) -> int:
    """Steps that it takes to get to the first picture of a GIF; stops at one too many."""
    colours = data[10] if len(data) > 10 else 0
    at, steps = 13 + (3 << (colours & 7) + 1 if colours & 128 else 0), 0
    while steps <= _GIF_PIECES and at < len(data) and data[at] not in b",;":
        steps += 1
        if data[at] != ord("!"):
            at += 1
            continue
        at += 2
        while steps <= _GIF_PIECES and at < len(data) and data[at]:
            steps += 1
            at += 1 + data[at]
        at += 1
    return steps


def _check_size(image: Image.Image, limits: DecodeLimits) -> None:
    sizes = [image.size]
    if image.format == "TIFF":
        tile = tuple(image.tag_v2.get(tag, 1) for tag in _TIFF_TILE)
        sizes += [tile] if all(isinstance(side, int) for side in tile) else []
    for width, height in sizes:
        fits = width * height <= limits.max_pixels and max(width, height) <= limits.max_side
        if not fits or min(width, height) < 1:
            raise TooLarge(
                f"image: expected 1 to {limits.max_pixels} pixels and at most {limits.max_side} "
                f"per side, got {width} x {height}"
            )


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """What sets an image upright."""
    # Not ImageOps.exif_transpose, which writes the other tags anew and fails on broken ones.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken tag; the pixels are whole
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _rgb(image: Image.Image, data: bytes, alpha: str) -> Image.Image:
    """8 bits of red, green and blue of a loaded image, on white if `alpha` says so."""
    if image.format == "TIFF" and 2 in image.tag_v2.get(_TIFF_SAMPLE_FORMAT, (1,)):
        raise _Refused("image: expected samples from 0 up, got signed ones, which have no white")
    if image.mode == "La":  # multiplied by its alpha
        image = image.convert("LA")
    opaque = None if image.format != "PNG" else _opaque_of_png(image, data)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image)
    if opaque is not None:
        image = image.convert("RGB")
        image.info.pop("transparency", None)
        image.putalpha(Image.fromarray(opaque))
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and alpha == "white":
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """8 bits of greys that have more, black at 0. Pillow does not scale them, nor invert them."""
    tags = image.tag_v2 if image.format == "TIFF" else {_TIFF_PHOTOMETRIC: 1}
    samples = np.asarray(image)
    if image.mode == "I":
        raise _Refused("image: expected up to 16 bits per channel, or floats, got 32 bits")
    if image.mode == "F":
        least, most = samples.min(), samples.max()
        if not (least >= 0 and most <= 1):
            raise _Refused(f"image: expected floats from 0 to 1, got {least:g} to {most:g}")
        grey = np.rint(samples * 255).astype(np.uint8)
    else:
        grey = (samples >> (tags.get(_TIFF_BITS, (16,))[0] - 8)).astype(np.uint8)
    return Image.fromarray(grey if tags.get(_TIFF_PHOTOMETRIC, 0) else 255 - grey)


def _opaque_of_png(image: Image.Image, data: bytes) -> np.ndarray | None:
    """u8[H, W], 0 where a PNG names the colour as transparent and Pillow would not find it.

    Pillow compares 8 bits with the colour as it stands in the file, of 2, 4 or 16.
    """
    depth, named = data[24], image.info.get("transparency")
    if named is None or image.mode == "P" or depth in (1, 8):
        return None
    if image.mode == "L":
        samples = np.asarray(image) // (255 // (2**depth - 1))
    elif image.mode == "RGB":
        samples = np.asarray(image).astype(np.uint16) << 8 | _lower_bytes(data)
    else:
        samples = np.asarray(image)
    there = samples == np.asarray(named)
    return np.where(there.all(-1) if there.ndim == 3 else there, 0, 255).astype(np.uint8)


def _lower_bytes(data: bytes) -> np.ndarray:
    """u8[H, W, 3] of a PNG with 16 bits of red, green and blue: the bytes that Pillow leaves out.

    They are the ones it takes if told that the order of bytes is the other one.
    """
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)


def thumbnail(image: Image.Image, side: int) -> bytes:
    """A WebP file of an image of mode RGB, shrunk to `side` pixels per side if it is larger."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, method=6)
    return file.getvalue()
