"""The section about data: raw files or records, texts, images, synthetic products."""

from typing import Annotated, Literal

from pydantic import Field

from xmc_jax.config.declare import Count, InnerShare, ShareBelowOne, Whole, nested, section
from xmc_jax.config.model_config import Dtype


@section("data.records_options")
class RecordsOptions:
    """How records are read."""

    labels: str | None = Field(
        None, description="File of the labels; none is labels.* in the folder of the records."
    )
    columns: tuple[str, ...] = Field(
        (), description="field=column for columns of other names; field= leaves one out."
    )
    separator: Annotated[str, Field(min_length=1)] = Field(
        "|", description="Separator of label ids in a text."
    )
    delimiter: str = Field(
        "", description="Delimiter of CSV cells, one character or tab; if empty, the header tells."
    )
    label_columns: tuple[str, ...] = Field(
        (), description="Columns of 0 and 1, one for each label; * is all that are no other field."
    )
    row_per_pair: bool = Field(
        False, description="Adjacent rows of one id are one document with all their labels."
    )
    test_fraction: InnerShare = Field(
        0.1, description="Share of documents for testing if no file test.* and no column says."
    )
    split_seed: Whole = Field(0, description="Seed of the choice of test documents.")
    unknown_labels: Literal["error", "drop", "add"] = Field(
        "error", description="What to do with ids that no label has."
    )
    allow_paths: bool = Field(
        False, description="Allow image paths that lead out of the folder of the records."
    )


@section("data.images")
class ImagesOptions:
    """Images of items and their vectors; see docs/images.md."""

    name: str | None = Field(
        None, description="Name of the folder images-<name>; none trains on text alone."
    )
    source: str | None = Field(
        None, description="Image files, a table of URLs or published vectors; none is raw_dir."
    )
    encoder: str = Field(
        "google/siglip2-so400m-patch14-384",
        description="Image encoder: hog-colour, a folder, or a name on the hub. [V]",
    )
    revision: str | None = Field(None, description="Revision of the encoder on the hub.")
    per_item: Count = Field(3, description="Most images of an item. [V]")
    layout: Literal["pad", "stretch"] = Field(
        "pad", description="How an image becomes square. [script]"
    )
    batch_size: Count = Field(64, description="Images per call, over all devices.")
    dtype: Dtype = Field(
        "bfloat16", description="Type of the encoder's products; the reference has float16."
    )
    allow_paths: bool = Field(
        False, description="Allow image paths that lead out of the folder of their table."
    )


@section("data.synthetic")
class SyntheticOptions:
    """Synthetic products, made if raw_dir is "synthetic"."""

    documents: Count = Field(2000, description="Training documents.")
    labels: Count = Field(1000, description="Labels.")
    seed: Whole = Field(0, description="Seed of the products.")


@section("data")
class DataConfig:
    """Which data, and how texts become tokens."""

    dataset: str = Field("", description="Name of the dataset; known names have checked counts.")
    raw_dir: str = Field("", description="Folder of the raw files, or bundled, or synthetic.")
    records: str | None = Field(
        None,
        description="In place of raw_dir, your own records: a folder with train.* and labels.*, "
        "or a file; see docs/data.md.",
    )
    records_options: RecordsOptions = nested(RecordsOptions, "How records are read.")
    data_dir: str = Field("data", description="Folder in which dataset folders are made.")
    max_length: Annotated[int, Field(ge=1, lt=1 << 16)] = Field(
        32, description="Tokens of a text, special ones included. [V]"
    )
    encoding: Literal["utf-8", "latin-1"] = Field(
        "utf-8", description="Encoding of raw texts; the reference reads them as latin-1. [ours]"
    )
    text: Literal["title", "title_content"] | None = Field(
        "title", description="Text of an item; none follows from the name of the dataset."
    )
    tokenizer: str | None = Field(
        None, description="Tokenizer, a folder or a name on the hub; none is the backbone's."
    )
    propensity_a: Annotated[float, Field(ge=0, le=100)] = Field(
        0.6, description="Constant A of propensities, for all Amazon sets. [script]"
    )
    propensity_b: Annotated[float, Field(ge=0, le=100)] = Field(
        2.6, description="Constant B of propensities, for all Amazon sets. [script]"
    )
    validation_fraction: ShareBelowOne = Field(
        0.0, description="Share of training documents to hold out in place of the test split."
    )
    validation_seed: Whole = Field(0, description="Seed of the choice of held-out documents.")
    images: ImagesOptions = nested(ImagesOptions, "Images of items and their vectors.")
    synthetic: SyntheticOptions = nested(SyntheticOptions, "Synthetic products.")
