"""Some fifty odd images as the bytes of their files: every mode, orientation and shape."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import ExifTags, Image

ORIENTATIONS = tuple(range(1, 9))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format, **options)
        return file.getvalue()


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours with some noise and hard edges; of modes with alpha, all of 0 to 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin((x * a + y * b) / 9 + a) for a, b in ((1, 2), (2, -1), (-1, 1))]
    pixels = np.stack(waves, -1) + rng.normal(0, 9, (height, width, 3))
    pixels[(x // 5 + y // 3) % 4 == 0] = rng.integers(0, 256, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        ramp = (255 * (x + y) / max(width + height - 2, 1)).astype(np.uint8)
        image.putalpha(Image.fromarray(ramp))
    return image.convert(mode)


def oriented(orientation: Any, format: str = "JPEG", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(picture(41, 23), format, exif=exif, **options)


def interlaced(rows: np.ndarray) -> bytes:
    """u8[H, W, 3] as an Adam7 PNG, which Pillow reads and does not write."""
    height, width = rows.shape[:2]
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    data = b""
    for top, left, down, across in (*starts, (1, 0, 2, 1)):
        part = rows[top::down, left::across]
        if part.size:
            data += b"".join(b"\0" + row.tobytes() for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return png_of((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, true or not."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts += [struct.pack(">I", len(body)), kind, body]
        parts += [struct.pack(">I", zlib.crc32(kind + body))]
    return b"".join(parts)


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples [H, W] or [H, W, channels], whatever Pillow can write.

    Args:
        depth: bits of a sample; of fewer than 8, W is a multiple of 8.
        colour: type as the format numbers them.
        rows: values of `depth` bits.
        *chunks: between header and pixels.
    """
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + packed(row, depth, ">") for row in rows)
    return png_of((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b""))


def packed(samples: np.ndarray, depth: int, order: str) -> bytes:
    """Samples of `depth` bits, one behind the other."""
    if depth >= 8 and depth != 12:
        return samples.astype(f"{order}{samples.dtype.kind}{depth // 8}").tobytes()
    bits = np.unpackbits(samples.astype(">u2").reshape(-1, 1).view(np.uint8), axis=1)
    return np.packbits(bits[:, 16 - depth :]).tobytes()


def tiff(samples: np.ndarray, depth: int, photometric: int, order: str = "<", **tags) -> bytes:
    """An uncompressed TIFF of samples [H, W] or [H, W, channels], whatever Pillow can write.

    Args:
        samples: values of `depth` bits.
        depth: bits of a sample.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK.
        order: of bytes, "<" or ">".
        **tags: extra (of alpha: 1 multiplied, 2 not), format (2 signed, 3 floats) and colormap.
    """
    height, width, *channels = samples.shape
    count, data = (channels or [1])[0], packed(samples, depth, order)
    fields = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [depth] * count),
        259: ("H", [1]),
        262: ("H", [photometric]),
        273: ("I", [8]),
        277: ("H", [count]),
        278: ("I", [height]),
        279: ("I", [len(data)]),
        339: ("H", [tags.get("format", 1)] * count),
    }
    fields |= {338: ("H", [tags["extra"]])} if "extra" in tags else {}
    fields |= {320: ("H", tags["colormap"])} if "colormap" in tags else {}
    entries, values = b"", b""
    after = 8 + len(data) + 2 + 12 * len(fields) + 4
    for tag, (kind, numbers) in sorted(fields.items()):
        value = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(value) > 4:
            value, values = struct.pack(f"{order}I", after + len(values)), values + value
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers))
        entries += value.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = mark + struct.pack(f"{order}I", 8 + len(data)) + data
    return start + struct.pack(f"{order}H", len(fields)) + entries + bytes(4) + values


def _palette(**options: Any) -> bytes:
    return encoded(picture(40, 30).quantize(17), "PNG", **options)


def _images() -> dict[str, bytes]:
    rgb, grey = picture(64, 48), picture(64, 48, "L")
    frames = [picture(32, 20, seed=seed) for seed in range(3)]
    rotated = {f"exif {k}": oriented(k) for k in ORIENTATIONS}
    shapes = ((1, 1), (1, 2), (2, 1), (10000, 3), (3, 10000), (1, 700), (224, 224), (500, 333))
    wide = np.asarray(picture(50, 40, "L")).astype(np.uint16) * 256 + 77
    colours = np.asarray(picture(30, 20)).astype(np.uint16) * 256 + 200
    # 16 bits of three channels: Pillow reads them and does not write them
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    deep = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    return {
        **{f"{w}x{h}": encoded(picture(w, h), "PNG") for w, h in shapes},
        **rotated,
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg of quality 5": encoded(rgb, "JPEG", quality=5),
        "jpeg, progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg, no subsampling": encoded(rgb, "JPEG", subsampling=0),
        "jpeg, grey": encoded(grey, "JPEG"),
        "jpeg, CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg of several pictures": encoded(rgb, "MPO", save_all=True, append_images=frames[:1]),
        "exif in png": oriented(6, "PNG"),
        "exif in webp": oriented(5, "WEBP", lossless=True),
        "orientation in tiff": encoded(rgb, "TIFF", tiffinfo={274: 8}),
        "grey": encoded(grey, "PNG"),
        "grey of 16 bits": encoded(Image.fromarray(wide), "PNG"),
        "grey of 16 bits, tiff": encoded(Image.fromarray(wide), "TIFF"),
        "colours of 16 bits": png_of(
            (b"IHDR", deep), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
        ),
        "black and white": encoded(rgb.convert("1"), "PNG"),
        "grey and alpha": encoded(picture(64, 48, "LA"), "PNG"),
        "alpha": encoded(picture(64, 48, "RGBA"), "PNG"),
        "alpha, tiff": encoded(picture(64, 48, "RGBA"), "TIFF"),
        "alpha, webp": encoded(picture(64, 48, "RGBA"), "WEBP", lossless=True),
        "one colour transparent": encoded(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
        "one grey transparent": encoded(grey, "PNG", transparency=grey.getpixel((0, 0))),
        "palette": _palette(),
        "palette of 2 bits": encoded(rgb.quantize(4), "PNG", bits=2),
        "palette, one transparent": _palette(transparency=3),
        "palette with alpha": _palette(transparency=bytes(range(0, 255, 15))),
        "interlaced": interlaced(np.asarray(picture(45, 37))),
        "gif": encoded(rgb, "GIF"),
        "gif, transparent": encoded(rgb.quantize(9), "GIF", transparency=2),
        "gif, animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp, lossy": encoded(rgb, "WEBP", quality=60),
        "webp, animated": encoded(
            frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
        ),
        "png, animated": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "bmp": encoded(rgb, "BMP"),
        "bmp of 8 bits": encoded(grey, "BMP"),
        "tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff, CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
    }


IMAGES = _images()
# Those of which transformers, in Pillow's way, leaves nothing but white.
SATURATED = ("grey of 16 bits", "grey of 16 bits, tiff")
