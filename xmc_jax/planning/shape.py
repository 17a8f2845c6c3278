"""The shape of a config's data and the length of its prompts, from what is here: no weights, and
nothing large is downloaded."""

import pathlib
from collections.abc import Mapping
from typing import Any

from xmc_jax.data import image_vectors, prepare, store, tokenizer
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


def of(fields: Mapping[str, Any]) -> tuple[DataShape, str]:
    """The counts of a config's dataset, and in words where they are from.

    The dataset folder's where it is there, or can be made without downloading anything; else those
    published about the dataset.

    Args:
        fields: a config as nested mappings.

    Raises:
        ValueError: there is no folder, and nothing is known about a dataset of that name.
    """
    section, folder = fields["data"], _folder(fields)
    at_hand = section["raw_dir"] in (build.BUNDLED, build.SYNTHETIC)
    if at_hand and section["records"] is None:
        opened = build.data(fields)
        return opened.shape, f"counted in {opened.folder}"
    width, per_item, source = _images(section)
    if (folder / "manifest.json").is_file():
        counted = store.open(folder).shape
        return _with_images(counted, width, per_item), f"counted in {folder}; {source}"
    known = KNOWN.get(section["dataset"])
    if known is None or fields["train"]["labels"] == "all":
        raise ValueError(
            f"plan: expected the dataset folder {folder}, or a dataset whose counts are published "
            f"and train.labels='sampled', got {section['dataset']}; run --mode=prepare first"
        )
    published = DataShape(
        documents=known.train,
        test=known.test,
        labels=known.labels,
        length=section["max_length"],
        pairs=round(known.train * known.labels_per_document),
        positives=(0,),
    )
    return (
        _with_images(published, width, per_item),
        f"as published, for there is no {folder}; {source}",
    )


def prompts(fields: Mapping[str, Any]) -> tuple[Prompts, str]:
    """The prompts of a config, and in words where they are from.

    Args:
        fields: a config as nested mappings.
    """
    if not build.decodes(fields):
        return Prompts(), "of an encoder, whose texts include them"
    folder, order = build.tokenizer_source(fields).tokenizer, build.order(fields)
    texts = build.prompt_texts(fields)
    if (folder / "tokenizer.json").is_file():
        return tokenize(tokenizer.load(folder), folder, **texts, order=order), "as tokenised"
    text, image, tail = ((0,) * len(words.split()) for words in texts.values())
    said = f"of a token per word, for there is no tokenizer in {folder}"
    if order is None:
        return Prompts(head=text, tail=tail), said
    first, second = (image, text) if order == "image_text" else (text, image)
    return Prompts(head=first, middle=second, tail=tail), said


def _with_images(shape: DataShape, width: int, per_item: int) -> DataShape:
    counts = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    return DataShape(**counts | {"image_width": width, "images_per_item": per_item})


def _images(section: Mapping[str, Any]) -> tuple[int, int, str]:
    """E, K and where they are from; 0 without images."""
    asked = section["images"]
    if asked["name"] is None:
        return 0, 0, "no images"
    folder = pathlib.Path(section["data_dir"]) / section["dataset"] / f"images-{asked['name']}"
    if (folder / "manifest.json").is_file():
        return image_vectors.open(folder).width, asked["per_item"], f"images of {folder}"
    if asked["encoder"] not in _WIDTHS:
        raise ValueError(
            f"plan: expected the image folder {folder}, or an image encoder of "
            f"{', '.join(_WIDTHS)}, got {asked['encoder']}; make the folder first"
        )
    return _WIDTHS[asked["encoder"]], asked["per_item"], f"images as {asked['encoder']} gives them"


def _folder(fields: Mapping[str, Any]) -> pathlib.Path:
    section = fields["data"]
    name = section["tokenizer"] or fields["encoder"]["backbone"]
    return prepare.PrepareConfig(
        dataset=section["dataset"],
        data_dir=section["data_dir"],
        tokenizer=name,
        tokenizer_name=pathlib.PurePath(name).name,
        max_length=section["max_length"],
        special_tokens=not build.decodes(fields),
        prompts=build.encoder_prompts(fields),
        validation_fraction=section["validation_fraction"],
        seed=section["validation_seed"],
    ).folder
