"""What a config names, found and opened: data, images, prompts, the run over them, exports."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from xmc_jax import distributed
from xmc_jax.data import bundled, prepare, prompts, store, synthetic, tokenizer
from xmc_jax.data import images as image_folders
from xmc_jax.models import backbone, hf, hf_export
from xmc_jax.retrieval import tuning
from xmc_jax.training.config import RunConfig
from xmc_jax.training.run import Run
from xmc_jax.types import Prompts, TrainState

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
    config, opened = RunConfig.from_dict(fields), data(fields)
    if config.eval.augmented.weights == "tuned":
        tuned = workdir and tuning.read(workdir, fields, opened, config.eval.augmented)
        if tuned is None:
            raise ValueError(
                f"eval.augmented.weights: expected {tuning.FILE} in {workdir or 'a workdir'}, "
                "found none; make it with --mode=tune"
            )
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, augmented=tuned))
    return Run(config, opened, _prompts(fields), devices)


def data(fields: Mapping[str, Any]) -> store.Store:
    """The dataset folder of a config, with its image folder; what is not there is made."""
    return distributed.first_then_others("data", lambda: _data(fields))


def export(
    fields: Mapping[str, Any], run: Run, state: TrainState, workdir: epath.Path
) -> epath.Path:
    """Writes the encoder, or its adapters, its projection of images, and its tokenizer.

    Args:
        fields: the config of the run.
        run: see `Run`.
        state: what to export.
        workdir: gets `export/`, or `export-adapter/`, which is returned.

    Raises:
        ValueError: adapters are asked for and there are none, or nothing to load them onto.
    """
    config, T = run.config, fields["data"]["max_length"]
    around = prompts.around_text(run.model.prompts, _order(fields))
    folder = workdir / ("export-adapter" if config.export.format == "adapter" else "export")
    common = {
        "lora": config.encoder.lora,
        "pooling": config.encoder.pooling,
        "max_length": len(around.head) + T + len(around.tail),
    }
    params = run.merged(state)
    if config.export.format == "adapter":
        if config.encoder.init == "random":
            raise ValueError(
                "export.format: expected 'merged' for a backbone with random weights, which nobody "
                "can load adapters onto, got 'adapter'"
            )
        hf_export.adapter(folder, params["backbone"], run.sizes, source=run.source, **common)
    else:
        dtype = config.export.dtype
        hf_export.merged(folder, params["backbone"], run.sizes, dtype=dtype, **common)
    if "projection" in params:
        encoder = run.data.images.manifest["encoder"]
        hf_export.projection(folder, params["projection"], encoder)
    source = _tokenizer(fields).folder
    if _decodes(fields):
        prompts.export(
            source,
            folder,
            **_prompt_texts(fields),
            pooling=config.encoder.pooling,
            max_length=T,
            order=_order(fields),
        )
    else:
        tokenizer.copy(source, folder)
    return folder


def _data(fields: Mapping[str, Any]) -> store.Store:
    section, source = fields["data"], _tokenizer(fields)
    opened = store.open(
        prepare.prepare(
            prepare.PrepareConfig(
                dataset=_dataset(section),
                data_dir=section["data_dir"],
                tokenizer=str(source.folder),
                tokenizer_name=pathlib.PurePath(source.name).name,
                max_length=section["max_length"],
                raw=_raw(section),
                special_tokens=not _decodes(fields),
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
    return opened.with_images(_images(section), section["images"]["per_item"])


def _dataset(section: Mapping[str, Any]) -> str:
    """The dataset's name; of synthetic ones with what they follow from."""
    if section["raw_dir"] != SYNTHETIC:
        return section["dataset"]
    made = section["synthetic"]
    return f"{section['dataset']}-{made['documents']}x{made['labels']}-seed{made['seed']}"


def _raw(section: Mapping[str, Any]) -> pathlib.Path | None:
    """The folder of the raw files, None for the bundled ones; synthetic ones are made."""
    if section["raw_dir"] == BUNDLED:
        return None
    if section["raw_dir"] != SYNTHETIC:
        return pathlib.Path(section["raw_dir"])
    folder = pathlib.Path(section["data_dir"]) / _dataset(section) / "raw"
    folder.parent.mkdir(parents=True, exist_ok=True)
    synthetic.generate(synthetic.SyntheticConfig(**section["synthetic"]), folder)
    return folder


def _images(section: Mapping[str, Any]) -> image_folders.ImageStore:
    """The image folder of a dataset, made if it is not there."""
    from xmc_jax.vision import embed  # what it imports is an extra

    asked, raw, dataset = section["images"], _raw(section), _dataset(section)
    config = embed.ImagesConfig(
        dataset=dataset,
        data_dir=section["data_dir"],
        **asked | {"source": asked["source"] or raw or bundled.path(dataset)},
    )
    if not (config.folder / "manifest.json").is_file():
        uids = embed.read_uids(dataset, raw, section["encoding"])
        try:
            embed.make(config, uids)
        except ValueError as error:
            raise ValueError(
                f"{error}; to train on text alone, add the option text_only"
            ) from error
    opened = image_folders.open(config.folder)
    for field, found, fits in (
        ("encoder", opened.encoder, opened.encoder == config.encoder),
        ("per_item", k := opened.manifest["source"]["per_item"], k >= config.per_item),
    ):
        if not fits:
            raise ValueError(
                f"{config.folder}: expected data.images.{field} = {asked[field]}, found one made "
                f"with {found}; set that, or another --config.data.images.name"
            )
    return opened


def _order(fields: Mapping[str, Any]) -> str | None:
    """Of text and images; None without images."""
    return None if fields["data"]["images"]["name"] is None else fields["fusion"]["order"]


def _prompt_texts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: fields["fusion"][name] for name in ("prefix", "image_prefix", "suffix")}


def _prompts(fields: Mapping[str, Any]) -> Prompts:
    """The prompts of a config as token ids; none for encoders, which take none."""
    texts = _prompt_texts(fields)
    if not _decodes(fields):
        given = [name for name, text in texts.items() if text]
        if given:
            raise ValueError(f"fusion.{given[0]}: expected '', encoders take no prompts, got text")
        return Prompts()
    folder = _tokenizer(fields).folder
    exported, order = prompts.read_settings(folder), _order(fields)
    if exported is not None:
        for field, trained, asked in (
            ("encoder.pooling", exported.pooling, fields["encoder"]["pooling"]),
            # Images may be new to it, or left out.
            ("fusion.order", exported.order, order or exported.order),
        ):
            if trained not in (None, asked):
                raise ValueError(
                    f"{folder}: expected {field} as it was trained with, {trained!r}, got "
                    f"{asked!r}; set --config.{field}={trained}"
                )
    return prompts.tokenize(tokenizer.load(folder), folder, **texts, order=order)


def _decodes(fields: Mapping[str, Any]) -> bool:
    encoder = fields["encoder"]
    source = hf.resolve(encoder["backbone"], encoder["revision"], weights=False)
    return backbone.is_decoder(hf.load_config(source))


def _tokenizer(fields: Mapping[str, Any]) -> hf.Source:
    """Where the tokenizer of a config lies: the backbone's own, or that of `data.tokenizer`."""
    name = fields["data"]["tokenizer"]
    if name is not None:
        return hf.resolve(name, weights=False)
    return hf.resolve(fields["encoder"]["backbone"], fields["encoder"]["revision"], weights=False)
