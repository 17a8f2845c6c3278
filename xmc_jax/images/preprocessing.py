"""RGB to the pixels that an image encoder was trained on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

RESAMPLING = {filter.name.lower(): filter for filter in Image.Resampling}


def white(size: int) -> Image.Image:
    """A white square, size x size, RGB."""
    return Image.new("RGB", (size, size), "white")


def pad_square(image: Image.Image, size: int) -> Image.Image:
    """The image shrunk into a square if it is larger, its proportions kept, on white.

    As the ViXML reference stores its images (`download_amazon_imgs.py::load_img`, size 384) before
    the encoder's own processing; it also saves them as JPEG, which is not done here.

    Args:
        image: of mode RGB.
        size: pixels per side.

    Returns:
        Another image, RGB, size x size.
    """
    image = image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    across, down = size - image.width, size - image.height
    border = (across // 2, down // 2, across - across // 2, down - down // 2)
    return ImageOps.expand(image, border, fill=(255, 255, 255))


@dataclasses.dataclass(frozen=True)
class Processor:
    """An image to the pixels of an encoder: resize, rescale, normalise; nothing is cropped.

    Called, it does all of it. In two steps, what travels to a device is a quarter as large:
    `resize` here, `normalize` there.

    Attributes:
        size: height and width.
        resample: a key of RESAMPLING.
        mean: of red, green and blue, after rescaling.
        std: likewise.
        rescale: what 0 to 255 is multiplied by.
    """

    size: tuple[int, int] = (224, 224)
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255

    def __post_init__(self):
        for name, fits, expected in (
            ("size", len(self.size) == 2 and min(self.size) >= 1, "height and width"),
            ("resample", self.resample in RESAMPLING, f"one of {tuple(RESAMPLING)}"),
            ("mean", len(self.mean) == 3, "three numbers"),
            ("std", len(self.std) == 3 and min(self.std) > 0, "three numbers above 0"),
            ("rescale", self.rescale > 0, "more than 0"),
        ):
            if not fits:
                raise ValueError(
                    f"Processor.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB of any size -> f32[H, W, 3]."""
        return self.normalize(self.resize(image))

    def resize(self, image: Image.Image) -> np.ndarray:
        """RGB of any size -> u8[H, W, 3].

        Raises:
            ValueError: an image of another mode.
        """
        if image.mode != "RGB":
            raise ValueError(
                f"image: expected mode RGB, got {image.mode}; decode it with images.decode"
            )
        height, width = self.size
        return np.asarray(image.resize((width, height), RESAMPLING[self.resample]))

    def normalize(self, pixels: Any) -> Any:
        """u8[..., 3] of numpy or JAX -> f32[..., 3] of the same."""
        mean, std = np.float32(self.mean), np.float32(self.std)
        return (pixels.astype(np.float32) * np.float32(self.rescale) - mean) / std


# Image processors of transformers, by class without "Fast" or "Pil": the filter they resize with
# unless told otherwise. ViT's first files name no class.
_DEFAULT_RESAMPLE = {
    "SiglipImageProcessor": "bicubic",
    "ViTImageProcessor": "bilinear",
    "ViTFeatureExtractor": "bilinear",
}
# Fields whose other values would be another computation than the one here.
_REFUSED = {"do_resize": (None, True), "do_center_crop": (None, False), "do_pad": (None, False)}


def from_hf(config: Mapping[str, Any]) -> Processor:
    """The processor of a Hugging Face preprocessor_config.json; what it lacks is their default.

    Args:
        config: the parsed file. do_convert_rgb is not looked at: `decode` has done it.

    Raises:
        ValueError: another processor, a variant that is not computed here, or a field of the wrong
            type.
    """
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = str(named or "ViTFeatureExtractor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _DEFAULT_RESAMPLE:
        known = tuple(_DEFAULT_RESAMPLE)
        raise ValueError(
            f"preprocessor_config.json: expected image_processor_type to be one of {known}, got "
            f"{named!r}"
        )
    for name, allowed in _REFUSED.items():
        if (value := config.get(name)) not in allowed:
            raise _wrong(name, repr(allowed[-1]), value)
    size = 224 if config.get("size") is None else config["size"]
    sides = (size.get("height"), size.get("width")) if isinstance(size, Mapping) else (size, size)
    if not all(type(side) is int for side in sides):
        raise _wrong("size", "a number or height and width", size)
    resample = config.get("resample")
    if resample is not None:
        names = {filter.value: name for name, filter in RESAMPLING.items()}
        if type(resample) is not int or resample not in names:
            raise _wrong("resample", f"one of {names}", resample)
        resample = names[resample]
    rescaled = config.get("do_rescale") is not False
    normalized = config.get("do_normalize") is not False
    return Processor(
        size=sides,
        resample=resample or _DEFAULT_RESAMPLE[kind],
        mean=_channels(config, "image_mean", 0.5) if normalized else (0.0, 0.0, 0.0),
        std=_channels(config, "image_std", 0.5) if normalized else (1.0, 1.0, 1.0),
        rescale=_channels(config, "rescale_factor", 1 / 255)[0] if rescaled else 1.0,
    )


def _channels(config: Mapping[str, Any], name: str, default: float) -> tuple[float, ...]:
    value = config.get(name)
    value = default if value is None else value
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
        raise _wrong(name, "a number or three", value)
    return tuple(float(number) for number in numbers)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"preprocessor_config.json: expected {name} to be {expected}, got {value!r}")
