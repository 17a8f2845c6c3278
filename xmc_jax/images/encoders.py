"""Image encoders as `embed` runs them: a tower over all devices, or the descriptor on the host."""

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from PIL import Image

from xmc_jax.config import MeshConfig
from xmc_jax.files import json_files
from xmc_jax.images import descriptor, preprocessing
from xmc_jax.models import hf, hf_tensors, hf_weights
from xmc_jax.models.vision import Vision
from xmc_jax.runtime import sharding

LAYOUTS = ("pad", "stretch")
DTYPES = ("bfloat16", "float32")
PROCESSOR = "preprocessor_config.json"
_FLOAT32 = ("norm", "position_embedding", "class_token")  # what is added or scaled in float32
_PADDED_SIDE = 384  # the descriptor's images, where they are larger, as the reference stores them


class Encoder(Protocol):
    """Images to vectors, each image on its own.

    Attributes:
        identity: "name", "revision" and "digest" of what makes the vectors, as manifests have them.
        processing: what else they follow from, as JSON.
        width: E.
    """

    identity: Mapping[str, Any]
    processing: Mapping[str, Any]
    width: int

    def prepare(self, image: Image.Image) -> np.ndarray:
        """The host's part, for threads: RGB of any size -> what `embed` takes, small."""

    def embed(self, prepared: Sequence[np.ndarray]) -> Any:
        """The rest, of 1 to batch_size images.

        Returns:
            f32[m, E], of which the first rows are the images'. Of a device it is still being
            computed; `jax.device_get` waits.
        """


class ImageTower:
    """A vision tower: parameters on every device, batches split over them.

    Pixels travel as bytes and are normalised on the device. Every batch has the same shape; one
    that is not full is completed with its first image.

    Args:
        name: a folder, or a name on the hub; see `hf.resolve`.
        batch_size: images per call, a multiple of the devices.
        revision: on the hub.
        processor: another preprocessor_config.json than the encoder's, or its folder.
        layout: "pad" puts an image on a white square of the encoder's size first, as the ViXML
            reference stores its images; "stretch" leaves the proportions to the processor.
        dtype: of products.
        devices: what the mesh is made of; all of this process by default.

    Raises:
        ValueError: no such encoder, or parts that do not fit.

    Source: ViXML reference, download_amazon_imgs.py and extract_img_embed.py. It takes the
    processor of SigLIP v1 for SigLIP 2; they differ in the filter, which images that are already
    of the size do not meet.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        revision: str | None = None,
        processor: str | None = None,
        layout: str = "pad",
        dtype: str = "bfloat16",
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        _check_one_of("layout", layout, LAYOUTS)
        _check_one_of("dtype", dtype, DTYPES)
        if batch_size < 1 or batch_size % len(devices):
            raise ValueError(
                f"batch_size: expected a multiple of the {len(devices)} devices, got {batch_size}"
            )
        self._source = hf.resolve(name, revision)
        self._config = hf.load_vision_config(self._source)
        self._processor = _load_processor(processor or self._source.folder)
        sides = (self._config.image_size,) * 2
        if self._processor.size != sides:
            raise ValueError(
                f"{processor or self._source.folder}: expected {PROCESSOR} to resize to "
                f"{list(sides)}, as {name} takes images, got {list(self._processor.size)}"
            )
        self._layout, self._batch_size, self._dtype = layout, batch_size, jnp.dtype(dtype)
        self._mesh = sharding.make_mesh(MeshConfig(), devices)
        self.width = self._config.hidden
        self.identity = {
            "name": self._source.name,
            "revision": self._source.revision,
            "digest": self._source.digest,
        }
        self.processing = {
            "layout": layout,
            "dtype": dtype,
            "size": list(sides),
            "resample": self._processor.resample,
            "mean": list(self._processor.mean),
            "std": list(self._processor.std),
            "rescale": self._processor.rescale,
        }

    def prepare(self, image: Image.Image) -> np.ndarray:
        """RGB of any size -> u8[H, W, 3]."""
        if self._layout == "pad":
            image = preprocessing.pad_square(image, self._config.image_size)
        return self._processor.resize(image)

    def embed(self, prepared: Sequence[np.ndarray]) -> jax.Array:
        """u8[H, W, 3] of 1 to batch_size images -> f32[batch_size, E], theirs first."""
        batch = np.empty((self._batch_size, *prepared[0].shape), np.uint8)
        batch[: len(prepared)] = prepared
        batch[len(prepared) :] = prepared[0]
        pixels = jax.device_put(batch, sharding.of_batch(batch, self._mesh))
        return self._run(self._params, pixels)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        # Read when first needed: a finished folder needs none.
        whole = sharding.replicated(self._mesh)
        abstract = {}
        for path, parameter in hf_tensors.layout(self._config).items():
            dtype = jnp.float32 if any(part in path for part in _FLOAT32) else self._dtype
            abstract[path] = jax.ShapeDtypeStruct(parameter.shape, dtype, sharding=whole)
        nested = traverse_util.unflatten_dict(abstract, sep="/")
        return hf_weights.load_params(self._source, self._config, nested)

    @functools.cached_property
    def _run(self) -> Any:
        model = Vision(self._config, self._dtype)

        def run(params: Any, pixels: jax.Array) -> jax.Array:
            return model.apply({"params": params}, self._processor.normalize(pixels))

        return jax.jit(sharding.under(self._mesh, run))


class Descriptor:
    """`descriptor.describe` of each image, in the threads that prepare it.

    Args:
        layout: "pad" puts an image on a white square first, "stretch" makes it one.

    Raises:
        ValueError: an unknown layout, or scikit-image is not installed.
    """

    def __init__(self, layout: str = "pad"):
        _check_one_of("layout", layout, LAYOUTS)
        descriptor.describe([])
        self._layout = layout
        self.width = descriptor.WIDTH
        name = f"{descriptor.NAME} {descriptor.REVISION}"
        self.identity = {
            "name": descriptor.NAME,
            "revision": descriptor.REVISION,
            "digest": hashlib.sha256(name.encode()).hexdigest(),  # it has no weights
        }
        self.processing = {"layout": layout}

    def prepare(self, image: Image.Image) -> np.ndarray:
        """RGB of any size -> f32[E]."""
        if self._layout == "pad":
            image = preprocessing.pad_square(image, min(max(image.size), _PADDED_SIDE))
        return descriptor.describe([image])[0]

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """f32[E] of n images -> f32[n, E]."""
        return np.stack(prepared)


def build(
    name: str,
    batch_size: int,
    revision: str | None = None,
    processor: str | None = None,
    layout: str = "pad",
    dtype: str = "bfloat16",
) -> Encoder:
    """The encoder of a name: `descriptor.NAME`, or a `ImageTower`, whose arguments these are.

    Raises:
        ValueError: see `ImageTower` and `Descriptor`; or a revision or processor of the descriptor.
    """
    if name != descriptor.NAME:
        return ImageTower(name, batch_size, revision, processor, layout, dtype)
    for field, value in (("revision", revision), ("processor", processor)):
        if value is not None:
            raise ValueError(f"{field}: expected none for {name}, got {value!r}")
    return Descriptor(layout)


def _load_processor(where: str | pathlib.Path) -> preprocessing.Processor:
    path = pathlib.Path(where).expanduser()
    path = path / PROCESSOR if path.is_dir() else path
    try:
        return preprocessing.from_hf(json_files.read(path))
    except ValueError as error:
        named = "" if str(error).startswith(str(path)) else f"{path.parent}: "
        raise ValueError(f"{named}{error}; name another with --processor") from error


def _check_one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}: expected one of {allowed}, got {value!r}")
