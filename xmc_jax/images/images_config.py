"""What the command that embeds images is told."""

import pathlib
from typing import Literal

from pydantic import Field

from xmc_jax.config.declare import Count, section
from xmc_jax.data import image_vectors
from xmc_jax.data.known import KNOWN
from xmc_jax.images.settings import Networks

ENCODER = "google/siglip2-so400m-patch14-384"
"""The default encoder. Published embeddings are taken in its place."""


@section("")
class ImagesConfig:
    """Which images, and how they become vectors.

    Source: ViXML supp. A and reference code: siglip2-so400m-patch14-384, three images, padded.
    """

    dataset: str = Field(description=f"Its name; known: {', '.join(KNOWN)}.")
    data_dir: pathlib.Path = Field(description="Folder in which dataset folders are made.")
    name: str = Field(description="The result is the folder images-NAME of the dataset.")
    source: pathlib.Path = Field(
        description="A folder of images or of published embeddings; or a .parquet, .jsonl or .csv "
        "of images or URLs; or a .bin of ViXML."
    )
    encoder: str = Field(ENCODER, description="A folder, a name on the hub, or hog-colour.")
    revision: str | None = Field(None, description="Revision of the encoder on the hub.")
    processor: str | None = Field(
        None, description="Another preprocessor_config.json than the encoder's, or its folder."
    )
    per_item: Count = Field(3, description="The first images of an item that are encoded.")
    layout: Literal["pad", "stretch"] = Field(
        "pad", description="pad on a white square, as the reference does, or stretch."
    )
    alpha: Literal["white", "drop"] = Field(
        "white", description="What is transparent: white, or drop, for the colours beneath."
    )
    batch_size: Count = Field(64, description="Images per call, over all devices.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of products.")
    by: Literal["uid", "index"] = Field("uid", description="What image files are named by.")
    allow_paths: bool = Field(
        False, description="Read images by paths that lead out of the folder of their table."
    )
    allow_private: Networks = Field(
        (), description="Fetch from these networks, too, such as 10.0.0.0/8; none named: from any."
    )
    overwrite: bool = Field(False, description="Replace a folder that differs or is damaged.")

    def __post_init__(self):
        if self.batch_size < self.per_item:
            raise ValueError(
                f"batch_size: expected at least {self.per_item} images, got {self.batch_size}"
            )
        image_vectors.path(self.data_dir, self.dataset, self.name)

    @property
    def folder(self) -> pathlib.Path:
        """The image folder."""
        return image_vectors.path(self.data_dir, self.dataset, self.name)

    @property
    def fetched(self) -> pathlib.Path:
        """The folder of fetched images."""
        return self.folder.with_name(f"fetched-{self.name}")
