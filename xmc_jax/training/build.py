"""What a config names, found and opened: data, images, prompts, and the run over them."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from xmc_jax.config import RunConfig
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
    fields: Mapping[str, Any],
    devices: Sequence[jax.Device] | None = None,
    workdir: epath.PathLike | None = None,
) -> Run:
    """The run of a config, over its data, which is prepared if it is not there.

    Args:
        fields: a config as nested mappings.
        devices: what it runs on; all devices of all processes by default.
        workdir: where tuned weights are, if the config asks for them.

    Raises:
        ValueError: as all that it is made of; there are no tuned weights.
    """
    config = RunConfig.from_dict(fields)
    encoder = config.encoder
    if encoder.init == "pretrained":  # before the data are prepared, which may take hours
        hf_weights.check(hf.resolve(encoder.backbone, encoder.revision), encoder.layers)
    opened = data(fields)
    if config.eval.augmented.weights == "tuned":
        chosen = workdir and tuned.read(workdir, fields, opened, config.eval.augmented)
        if chosen is None:
            raise ValueError(
                f"eval.augmented.weights: expected {tuned.FILE} in {workdir or 'a workdir'}, "
                "found none; make it with --mode=tune"
            )
        config = dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, augmented=chosen)
        )
    return Run(config, opened, _prompts(fields), devices)


def data(fields: Mapping[str, Any]) -> store.Store:
    """The dataset folder of a config, with its image folder; what is not there is made."""
    return distributed.first_then_others("data", lambda: _data(fields))


def names_validation(fields: Mapping[str, Any]) -> bool:
    """Whether the raw files of a config name validation documents; records are converted."""
    section = fields["data"]
    raw = distributed.first_then_others("raw", lambda: _raw(section))
    return raw is not None and raw_folder.names_validation(raw)


def pictures(fields: Mapping[str, Any]) -> Any:
    """Where the pictures of a config's items are, a `vision.sources.Place`, to show some of them.

    None where it trains on text alone. There may be none, as where vectors were published, or none
    any more: a run needs no more than the vectors.
    """
    section = fields["data"]
    asked = section["images"]
    if asked["name"] is None:
        return None
    folder = image_folders.path(section["data_dir"], _dataset(section), asked["name"])
    fetched = folder.with_name(f"fetched-{asked['name']}")
    if (fetched / "report.json").is_file():
        return _place(section, fetched)
    return _place(section, _image_source(section, _raw(section)).expanduser())


def _data(fields: Mapping[str, Any]) -> store.Store:
    section, source = fields["data"], tokenizer_source(fields)
    raw = _raw(section)
    opened = store.open(
        prepare.prepare(
            prepare.PrepareConfig(
                dataset=_dataset(section),
                data_dir=section["data_dir"],
                tokenizer=str(source.tokenizer),
                tokenizer_name=pathlib.PurePath(source.name).name,
                max_length=section["max_length"],
                raw=raw,
                special_tokens=not decodes(fields),
                prompts=encoder_prompts(fields),
                encoding=section["encoding"],
                text=section["text"],
                propensity=(section["propensity_a"], section["propensity_b"]),
                validation_fraction=section["validation_fraction"],
                seed=section["validation_seed"],
            )
        )
    )
    if section["images"]["name"] is None:
        return opened
    return opened.with_images(_images(section, raw, opened), section["images"]["per_item"])


def _dataset(section: Mapping[str, Any]) -> str:
    """The dataset's name; of synthetic ones with what they follow from."""
    if section["records"] is not None or section["raw_dir"] != SYNTHETIC:
        return section["dataset"]
    made = section["synthetic"]
    return f"{section['dataset']}-{made['documents']}x{made['labels']}-seed{made['seed']}"


def _raw(section: Mapping[str, Any]) -> pathlib.Path | None:
    """The folder of the raw files, None for bundled ones; of records and synthetic ones, made."""
    if section["records"] is not None:
        return _of_records(section)
    if not section["raw_dir"]:
        raise ValueError(
            "data.records: expected a folder with train.* and labels.*, or a file, got none; "
            "--config.data.records=path, or --config.data.raw_dir=path for raw files"
        )
    if section["raw_dir"] == BUNDLED:
        return None
    if section["raw_dir"] != SYNTHETIC:
        return pathlib.Path(section["raw_dir"])
    folder = pathlib.Path(section["data_dir"]) / _dataset(section) / "raw"
    folder.parent.mkdir(parents=True, exist_ok=True)
    product_set.generate(product_set.SyntheticConfig(**section["synthetic"]), folder)
    return folder


def _of_records(section: Mapping[str, Any]) -> pathlib.Path:
    if section["encoding"] != "utf-8":
        raise ValueError(
            f"data.encoding: expected utf-8, as records are, got {section['encoding']!r}"
        )
    folder = own_records.folder(section["data_dir"], section["dataset"])
    config = own_records.RecordsConfig(section["records"], **section["records_options"])
    report, made = own_records.convert(config, folder)
    if made:
        said = f"{own_records.describe(config)}\n\n{data_report.text(report)}"
        logging.info("%s: made of %s\n%s", folder, config.records, said)
    return folder


def _images(
    section: Mapping[str, Any], raw: pathlib.Path | None, dataset: store.Store
) -> image_folders.ImageStore:
    """The image folder of a dataset, made if it is not there, or if its images have changed."""
    asked, name = section["images"], _dataset(section)
    folder = image_folders.path(section["data_dir"], name, asked["name"])
    if finished := (folder / "manifest.json").is_file():
        opened = image_folders.open(folder)
        fields = ("encoder", "revision", "per_item", "layout", "dtype")
        image_folders.check_settings(opened, {field: asked[field] for field in fields})
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
        if not asked["source"] and (source := image_folders.read_origin(folder).get("source")):
            config = dataclasses.replace(config, source=source)
        if embed.is_current(config, dataset.raw_uids()):
            return image_folders.open(folder)
    try:
        return image_folders.open(
            embed.make(config, embed.read_uids(name, raw, section["encoding"]))
        )
    except ValueError as error:
        raise ValueError(f"{error}; to train on text alone, add the option text_only") from error


def _image_source(section: Mapping[str, Any], raw: pathlib.Path | None) -> pathlib.Path:
    """Where images are made from: what the config says, or the raw files."""
    return pathlib.Path(section["images"]["source"] or raw or bundled.path(_dataset(section)))


def _place(section: Mapping[str, Any], path: pathlib.Path) -> Any:
    from xmc_jax.images import image_sources

    return image_sources.Place(path, allow_paths=_allow_paths(section))


def _allow_paths(section: Mapping[str, Any]) -> bool:
    """Whether tables may name images out of their folder.

    Those made of own records may: their paths were confined when the records were read.
    """
    images = section["images"]
    return images.get("allow_paths", False) or not (section["records"] is None or images["source"])


def _images_config(section: Mapping[str, Any], raw: pathlib.Path | None) -> Any:
    from xmc_jax.images import embed

    return embed.ImagesConfig(
        dataset=_dataset(section),
        data_dir=section["data_dir"],
        **section["images"]
        | {"source": _image_source(section, raw), "allow_paths": _allow_paths(section)},
    )


def picture_files(fields: Mapping[str, Any]) -> dict[str, tuple[Any, list[str]]]:
    """Image files of a config's labels and training documents, and all these items' identifiers.

    Returns:
        "label", "train" -> `vision.sources.Source` and identifiers, in its order.

    Raises:
        ValueError: the config has no images, or there are no files of them, but vectors, say.
        ImportError: the extra `vision` is not installed.
    """
    from xmc_jax.images import embed

    section, raw = fields["data"], _raw(fields["data"])
    if section["images"]["name"] is None:
        raise ValueError("data.images: expected images, found none in the config")
    config = _images_config(section, raw)
    source = config.fetched if config.fetched.is_dir() else pathlib.Path(config.source).expanduser()
    uids = embed.read_uids(_dataset(section), raw, section["encoding"])
    return {
        split: (_place(section, source).open(split, uids[split]), uids[split])
        for split in ("label", "train")
    }


def order(fields: Mapping[str, Any]) -> str | None:
    """Of text and images; None without images."""
    return None if fields["data"]["images"]["name"] is None else fields["fusion"]["order"]


def modules(fields: Mapping[str, Any]) -> Modules:
    """What the folder of a config's backbone says about pooling and prompts."""
    return hf_modules.read(_backbone(fields))


def filled(fields: Mapping[str, Any], said: Modules) -> dict[str, Any]:
    """A config with the values of the fields that it leaves to the backbone's folder.

    `fusion.label_prefix` stays None where labels have the prompt of documents.

    Args:
        fields: a config as nested mappings.
        said: see `modules`.

    Raises:
        ValueError: the folder asks for a pooling that is not computed here.
    """
    document, label = encoder_prompts(fields, said)
    encoder, fusion = fields["encoder"], fields["fusion"]
    prompts = {"prefix": fusion["prefix"] or "", "label_prefix": fusion.get("label_prefix")}
    if not decodes(fields):
        prompts = {"prefix": document, "label_prefix": None if label == document else label}
    pooling = encoder["pooling"] or said.pooling(prompt=bool(document or label))
    return {
        **fields,
        "encoder": {**encoder, "pooling": pooling},
        "fusion": {**fusion, **prompts},
    }


def differences(fields: Mapping[str, Any], said: Modules) -> list[str]:
    """Lines for the user: what the backbone's folder decides, or says in vain.

    Args:
        fields: see `filled`.
        said: see `modules`.
    """
    whole, lines = filled(fields, said), []
    pooling, prefix = whole["encoder"]["pooling"], whole["fusion"]["prefix"]
    label = whole["fusion"]["label_prefix"]
    used = (prefix, prefix if label is None else label)
    of_folder = (said.prompt("document"), said.prompt("label"))
    if fields["encoder"]["pooling"] is None:
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


def encoder_prompts(fields: Mapping[str, Any], said: Modules | None = None) -> tuple[str, str]:
    """What is put before the texts of documents and of labels; nothing for decoders.

    Args:
        fields: see `filled`.
        said: see `modules`; read if it is None.
    """
    if decodes(fields):
        return "", ""
    prefix, label = fields["fusion"]["prefix"], fields["fusion"].get("label_prefix")
    if prefix is None:
        said = modules(fields) if said is None else said
        return said.prompt("document"), said.prompt("label") if label is None else label
    return prefix, prefix if label is None else label


def prompt_texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """The prompts of a decoder as they are written in its config."""
    return {name: fields["fusion"][name] or "" for name in ("prefix", "image_prefix", "suffix")}


def _prompts(fields: Mapping[str, Any]) -> Prompts:
    """The prompts of a decoder as token ids; those of encoders are part of the texts."""
    texts = prompt_texts(fields)
    if not decodes(fields):
        given = [name for name in ("image_prefix", "suffix") if texts[name]]
        if given:
            raise ValueError(
                f"fusion.{given[0]}: expected '', since encoders take no prompts but fusion.prefix "
                f"and fusion.label_prefix, got {texts[given[0]]!r}"
            )
        return Prompts()
    if fields["fusion"].get("label_prefix") not in (None, texts["prefix"]):
        raise ValueError(
            "fusion.label_prefix: expected none of a decoder, whose documents and labels begin "
            f"with fusion.prefix, got {fields['fusion']['label_prefix']!r}"
        )
    folder = tokenizer_source(fields).tokenizer
    exported, asked_order = prompts.read_settings(folder), order(fields)
    if exported is not None:
        for field, trained, asked in (
            (
                "encoder.pooling",
                exported.pooling,
                filled(fields, modules(fields))["encoder"]["pooling"],
            ),
            # Images may be new to it, or left out.
            ("fusion.order", exported.order, asked_order or exported.order),
        ):
            if trained not in (None, asked):
                raise ValueError(
                    f"{folder}: expected {field} as it was trained with, {trained!r}, got "
                    f"{asked!r}; set --config.{field}={trained}"
                )
    return prompts.tokenize(tokenizer.load(folder), folder, **texts, order=asked_order)


def decodes(fields: Mapping[str, Any]) -> bool:
    """Whether the backbone of a config is a decoder."""
    return backbone.is_decoder(hf.load_config(_backbone(fields)))


def tokenizer_source(fields: Mapping[str, Any]) -> hf.ModelSource:
    """Where the tokenizer of a config lies: the backbone's own, or that of `data.tokenizer`."""
    name = fields["data"]["tokenizer"]
    if name is not None:
        return hf.resolve(name, weights=False)
    return _backbone(fields)


def _backbone(fields: Mapping[str, Any]) -> hf.ModelSource:
    encoder = fields["encoder"]
    return hf.resolve(encoder["backbone"], encoder["revision"], weights=False)
