"""The shape of a config's data and the length of its prompts, from what is here: no weights, and
nothing large is downloaded."""

import dataclasses
import pathlib

from xmc_jax.config import DataConfig, RunConfig
from xmc_jax.data import image_vectors, store, tokenizer
from xmc_jax.data.known import KNOWN
from xmc_jax.data.prompts import tokenize
from xmc_jax.data.types import DataShape, Prompts
from xmc_jax.training import build

# E of image encoders: the hidden_size of their published config.json; "hog-colour" as
# images/descriptor.py makes it.
_WIDTHS = {
    "google/siglip2-so400m-patch14-384": 1152,
    "google/siglip2-large-patch16-256": 1024,
    "google/siglip2-base-patch16-224": 768,
    "google/vit-base-patch16-224-in21k": 768,
    "hog-colour": 452,
}


def of(config: RunConfig) -> tuple[DataShape, str]:
    """The counts of a config's dataset, and in words where they are from.

    The dataset folder's where it is there, or can be made without downloading anything; else those
    published about the dataset.

    Raises:
        ValueError: there is no folder, and nothing is known about a dataset of that name.
    """
    section, folder = config.data, build.prepare_config(config).folder
    at_hand = section.raw_dir in (build.BUNDLED, build.SYNTHETIC)
    if at_hand and section.records is None:
        opened = build.data(config)
        return opened.shape, f"counted in {opened.folder}"
    images, source = _images(section)
    if (folder / "manifest.json").is_file():
        counted = store.open(folder).shape
        return dataclasses.replace(counted, **images), f"counted in {folder}; {source}"
    known = KNOWN.get(section.dataset)
    if known is None or config.train.labels == "all":
        raise ValueError(
            f"plan: expected the dataset folder {folder}, or a dataset whose counts are published "
            f"and train.labels='sampled', got {section.dataset}; run --mode=prepare first"
        )
    published = DataShape(
        documents=known.train,
        test=known.test,
        labels=known.labels,
        length=section.max_length,
        pairs=round(known.train * known.labels_per_document),
        positives=(0,),
    )
    return (
        dataclasses.replace(published, **images),
        f"as published, for there is no {folder}; {source}",
    )


def prompts(config: RunConfig) -> tuple[Prompts, str]:
    """The prompts of a config, and in words where they are from."""
    if not build.decodes(config):
        return Prompts(), "of an encoder, whose texts include them"
    folder, order = build.tokenizer_source(config).tokenizer, build.order(config)
    texts = build.prompt_texts(config)
    if (folder / "tokenizer.json").is_file():
        return tokenize(tokenizer.load(folder), folder, **texts, order=order), "as tokenised"
    text, image, tail = ((0,) * len(words.split()) for words in texts.values())
    said = f"of a token per word, for there is no tokenizer in {folder}"
    if order is None:
        return Prompts(head=text, tail=tail), said
    first, second = (image, text) if order == "image_text" else (text, image)
    return Prompts(head=first, middle=second, tail=tail), said


def _images(section: DataConfig) -> tuple[dict[str, int], str]:
    """The fields of a `DataShape` about images, and in words where they are from."""
    images = section.images
    if images.name is None:
        return {"image_width": 0, "images_per_item": 0}, "no images"
    folder = pathlib.Path(section.data_dir) / section.dataset / f"images-{images.name}"
    width, source = _WIDTHS.get(images.encoder), f"images as {images.encoder} gives them"
    if (folder / "manifest.json").is_file():
        width, source = image_vectors.open(folder).width, f"images of {folder}"
    if width is None:
        raise ValueError(
            f"plan: expected the image folder {folder}, or an image encoder of "
            f"{', '.join(_WIDTHS)}, got {images.encoder}; make the folder first"
        )
    return {"image_width": width, "images_per_item": images.per_item}, source
