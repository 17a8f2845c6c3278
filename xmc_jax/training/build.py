"""What a config names, found and opened: data, images, prompts, and the run over them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from xmc_jax.config import DataConfig, RunConfig
from xmc_jax.data import bundled, prepare, prompts, raw_folder, store, tokenizer
from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data.records import data_report, own_records
from xmc_jax.data.synthetic import product_set
from xmc_jax.data.types import Prompts
from xmc_jax.models import backbone, hf, hf_modules, hf_weights
from xmc_jax.models.hf_modules import Modules
from xmc_jax.retrieval import tuned
from xmc_jax.runtime import distributed
from xmc_jax.training.run import Run

BUNDLED, SYNTHETIC = "bundled", "synthetic"  # values of data.raw_dir that are no folders


def run(
    config: RunConfig,
    devices: Sequence[jax.Device] | None = None,
    workdir: epath.PathLike | None = None,
) -> Run:
    """The run of a config, over its data, which is prepared if it is not there.

    Args:
        config: of the run.
        devices: what it runs on; all devices of all processes by default.
        workdir: where tuned weights are, if the config asks for them.

    Raises:
        ValueError: data, weights or config do not fit; there are no tuned weights.
    """
    encoder = config.encoder
    if encoder.init == "pretrained":  # before the data are prepared, which may take hours
        hf_weights.check(hf.resolve(encoder.backbone, encoder.revision), encoder.layers)
    opened = data(config)
    if config.eval.augmented.weights == "tuned":
        chosen = workdir and tuned.read(workdir, config, opened)
        if chosen is None:
            raise ValueError(
                f"eval.augmented.weights: expected {tuned.FILE} in {workdir or 'a workdir'}, "
                "found none; make it with --mode=tune"
            )
        config = config.replace(eval={"augmented": chosen})
    return Run(config, opened, _prompts(config), devices)


def data(config: RunConfig) -> store.Store:
    """The dataset folder of a config, with its image folder; a missing folder is made."""
    return distributed.first_then_others("data", lambda: _data(config))


def names_validation(config: RunConfig) -> bool:
    """Whether the raw files of a config name validation documents; records are converted."""
    raw = distributed.first_then_others("raw", lambda: _raw(config.data))
    return raw is not None and raw_folder.names_validation(raw)


def _data(config: RunConfig) -> store.Store:
    raw = _raw(config.data)
    opened = store.open(prepare.prepare(prepare_config(config, raw)))
    images = config.data.images
    if images.name is None:
        return opened
    return opened.with_images(_images(config.data, raw, opened), images.per_item)


def prepare_config(config: RunConfig, raw: pathlib.Path | None = None) -> prepare.PrepareConfig:
    """How the dataset folder of a config is prepared.

    Args:
        config: of the run.
        raw: folder of the raw files; None for a bundled dataset's own.
    """
    section, source = config.data, tokenizer_source(config)
    return prepare.PrepareConfig(
        dataset=_dataset(section),
        data_dir=section.data_dir,
        tokenizer=str(source.tokenizer),
        tokenizer_name=pathlib.PurePath(source.name).name,
        max_length=section.max_length,
        raw=raw,
        special_tokens=not decodes(config),
        prompts=encoder_prompts(config),
        encoding=section.encoding,
        text=section.text,
        propensity=(section.propensity_a, section.propensity_b),
        validation_fraction=section.validation_fraction,
        seed=section.validation_seed,
    )


def _dataset(section: DataConfig) -> str:
    """The dataset's name; that of synthetic data tells their sizes and seed."""
    if section.records is not None or section.raw_dir != SYNTHETIC:
        return section.dataset
    made = section.synthetic
    return f"{section.dataset}-{made.documents}x{made.labels}-seed{made.seed}"


def _raw(section: DataConfig) -> pathlib.Path | None:
    """The folder of the raw files, None for bundled ones; of records and synthetic ones, made."""
    if section.records is not None:
        return _of_records(section)
    if not section.raw_dir:
        raise ValueError(
            "data.records: expected a folder with train.* and labels.*, or a file, got none; "
            "--config.data.records=path, or --config.data.raw_dir=path for raw files"
        )
    if section.raw_dir == BUNDLED:
        return None
    if section.raw_dir != SYNTHETIC:
        return pathlib.Path(section.raw_dir)
    folder = pathlib.Path(section.data_dir) / _dataset(section) / "raw"
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = dataclasses.asdict(section.synthetic)
    product_set.generate(product_set.SyntheticConfig(**made), folder)
    return folder


def _of_records(section: DataConfig) -> pathlib.Path:
    if section.encoding != "utf-8":
        raise ValueError(f"data.encoding: expected utf-8, as records are, got {section.encoding!r}")
    folder = own_records.folder(section.data_dir, section.dataset)
    options = dataclasses.asdict(section.records_options)
    config = own_records.RecordsConfig(section.records, **options)
    report, made = own_records.convert(config, folder)
    if made:
        said = f"{own_records.describe(config)}\n\n{data_report.text(report)}"
        logging.info("%s: made of %s\n%s", folder, config.records, said)
    return folder


def _image_folder(section: DataConfig) -> pathlib.Path:
    return image_folders.path(section.data_dir, _dataset(section), section.images.name)


def _images(
    section: DataConfig, raw: pathlib.Path | None, dataset: store.Store
) -> image_folders.ImageStore:
    """The image folder of a dataset, made if it is not there, or if its images have changed."""
    folder, images = _image_folder(section), section.images
    if finished := (folder / "manifest.json").is_file():
        opened = image_folders.open(folder)
        names = ("encoder", "revision", "per_item", "layout", "dtype")
        image_folders.check_settings(opened, {name: getattr(images, name) for name in names})
    try:
        from xmc_jax.images import embed
    except ImportError as error:
        if not finished:
            raise
        logging.warning("%s: whether its images have changed cannot be known: %s", folder, error)
        return opened
    config = _images_config(section, raw)
    if finished:
        config = embed.as_made(config)
        if not images.source and (source := image_folders.read_origin(folder).get("source")):
            config = dataclasses.replace(config, source=source)
        if embed.is_current(config, dataset.raw_uids()):
            return image_folders.open(folder)
    try:
        uids = embed.read_uids(_dataset(section), raw, section.encoding)
        return image_folders.open(embed.make(config, uids))
    except ValueError as error:
        raise ValueError(f"{error}; to train on text alone, add the option text_only") from error


def _image_source(section: DataConfig, raw: pathlib.Path | None) -> pathlib.Path:
    """Where images are made from: what the config says, or the raw files."""
    return pathlib.Path(section.images.source or raw or bundled.path(_dataset(section)))


def _place(section: DataConfig, path: pathlib.Path) -> Any:
    from xmc_jax.images import image_sources

    return image_sources.Place(path, allow_paths=_allow_paths(section))


def _allow_paths(section: DataConfig) -> bool:
    """Whether tables may name images out of their folder.

    Those made of own records may: their paths were confined when the records were read.
    """
    images = section.images
    return images.allow_paths or not (section.records is None or images.source)


def _images_config(section: DataConfig, raw: pathlib.Path | None) -> Any:
    from xmc_jax.images import embed

    fields = dataclasses.asdict(section.images)
    fields |= {"source": _image_source(section, raw), "allow_paths": _allow_paths(section)}
    return embed.ImagesConfig(dataset=_dataset(section), data_dir=section.data_dir, **fields)


def pictures(config: RunConfig) -> Any:
    """Where the pictures of a config's items are, an `image_sources.Place`, to show some of them.

    None if the run trains on text alone. The place may be empty: a run needs only the vectors.
    """
    section = config.data
    if section.images.name is None:
        return None
    fetched = _image_folder(section).with_name(f"fetched-{section.images.name}")
    if (fetched / "report.json").is_file():
        return _place(section, fetched)
    return _place(section, _image_source(section, _raw(section)).expanduser())


def picture_files(config: RunConfig) -> dict[str, tuple[Any, list[str]]]:
    """Image files of a config's labels and training documents, and all these items' identifiers.

    Returns:
        "label", "train" -> an open source of images, and identifiers in its order.

    Raises:
        ValueError: the config has no images, or there are no files of them, but vectors, say.
        ImportError: the extra `vision` is not installed.
    """
    from xmc_jax.images import embed

    section, raw = config.data, _raw(config.data)
    if section.images.name is None:
        raise ValueError("data.images: expected images, found none in the config")
    images = _images_config(section, raw)
    source = images.fetched if images.fetched.is_dir() else pathlib.Path(images.source).expanduser()
    uids = embed.read_uids(_dataset(section), raw, section.encoding)
    return {
        split: (_place(section, source).open(split, uids[split]), uids[split])
        for split in ("label", "train")
    }


def order(config: RunConfig) -> str | None:
    """The order of text and images; None without images."""
    return None if config.data.images.name is None else config.fusion.order


def modules(config: RunConfig) -> Modules:
    """What the folder of a config's backbone says about pooling and prompts."""
    return hf_modules.read(_backbone(config))


def filled(config: RunConfig, said: Modules) -> RunConfig:
    """A config with the values of the fields that it leaves to the backbone's folder.

    `fusion.label_prefix` stays None where labels have the prompt of documents.

    Args:
        config: of the run.
        said: see `modules`.

    Raises:
        ValueError: the folder asks for a pooling that is not computed here.
    """
    document, label = encoder_prompts(config, said)
    prompts = {"prefix": config.fusion.prefix or "", "label_prefix": config.fusion.label_prefix}
    if not decodes(config):
        prompts = {"prefix": document, "label_prefix": None if label == document else label}
    pooling = config.encoder.pooling or said.pooling(prompt=bool(document or label))
    return config.replace(encoder={"pooling": pooling}, fusion=prompts)


def differences(config: RunConfig, said: Modules) -> list[str]:
    """Lines for the user: what the backbone's folder decides, or says in vain.

    Args:
        config: of the run.
        said: see `modules`.
    """
    whole, lines = filled(config, said), []
    pooling, prefix, label = whole.encoder.pooling, whole.fusion.prefix, whole.fusion.label_prefix
    used = (prefix, prefix if label is None else label)
    of_folder = (said.prompt("document"), said.prompt("label"))
    if config.encoder.pooling is None:
        if said.poolings and pooling != "mean":
            lines.append(f"encoder.pooling={pooling}, as {said.where} says")
    elif departs := said.departs(pooling, prompt=any(used)):
        lines.append(f"encoder.pooling={pooling}, where {said.where} has {departs}")
    begin = f"documents begin with {used[0]!r}, labels with {used[1]!r}"
    if used != of_folder and any(said.prompts.values()):
        lines.append(
            f"{begin} (fusion.prefix, fusion.label_prefix), where {said.where} has "
            f"{of_folder[0]!r} and {of_folder[1]!r}"
        )
    elif any(of_folder):
        lines.append(f"{begin}, as {said.where} says")
    elif any(said.prompts.values()):
        lines.append(
            f"no prompt, though {said.where} has some for {', '.join(said.prompts)}; set "
            "fusion.prefix to use one"
        )
    return lines


def encoder_prompts(config: RunConfig, said: Modules | None = None) -> tuple[str, str]:
    """The texts before those of documents and of labels; empty for decoders.

    Args:
        config: of the run.
        said: see `modules`; read if it is None.
    """
    if decodes(config):
        return "", ""
    prefix, label = config.fusion.prefix, config.fusion.label_prefix
    if prefix is None:
        said = modules(config) if said is None else said
        return said.prompt("document"), said.prompt("label") if label is None else label
    return prefix, prefix if label is None else label


def prompt_texts(config: RunConfig) -> dict[str, str]:
    """The prompts of a decoder as they are written in its config."""
    fusion = config.fusion
    return {
        "prefix": fusion.prefix or "",
        "image_prefix": fusion.image_prefix,
        "suffix": fusion.suffix,
    }


def _prompts(config: RunConfig) -> Prompts:
    """The prompts of a decoder as token ids; those of encoders are part of the texts."""
    texts, label = prompt_texts(config), config.fusion.label_prefix
    if not decodes(config):
        for name in ("image_prefix", "suffix"):
            if texts[name]:
                raise ValueError(
                    f"fusion.{name}: expected '', since encoders take no prompts but fusion.prefix "
                    f"and fusion.label_prefix, got {texts[name]!r}"
                )
        return Prompts()
    if label not in (None, texts["prefix"]):
        raise ValueError(
            "fusion.label_prefix: expected none of a decoder, whose documents and labels begin "
            f"with fusion.prefix, got {label!r}"
        )
    folder, asked_order = tokenizer_source(config).tokenizer, order(config)
    if (exported := prompts.read_settings(folder)) is not None:
        pooling = filled(config, modules(config)).encoder.pooling
        for field, trained, now in (
            ("encoder.pooling", exported.pooling, pooling),
            # Images may be new to it, or left out.
            ("fusion.order", exported.order, asked_order or exported.order),
        ):
            if trained not in (None, now):
                raise ValueError(
                    f"{folder}: expected {field} as it was trained with, {trained!r}, got "
                    f"{now!r}; set --config.{field}={trained}"
                )
    return prompts.tokenize(tokenizer.load(folder), folder, **texts, order=asked_order)


def decodes(config: RunConfig) -> bool:
    """Whether the backbone of a config is a decoder."""
    return backbone.is_decoder(hf.load_config(_backbone(config)))


def tokenizer_source(config: RunConfig) -> hf.ModelSource:
    """Where the tokenizer of a config lies: the backbone's own, or that of `data.tokenizer`."""
    if config.data.tokenizer is not None:
        return hf.resolve(config.data.tokenizer, weights=False)
    return _backbone(config)


def _backbone(config: RunConfig) -> hf.ModelSource:
    return hf.resolve(config.encoder.backbone, config.encoder.revision, weights=False)
