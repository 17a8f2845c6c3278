"""Writes what `--mode=export` leaves: an encoder, its adapters, or a whole artifact."""

import dataclasses
import datetime
import importlib.metadata
import pathlib
import platform
import shutil
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from xmc_jax.data import prompts, texts, tokenizer
from xmc_jax.files import array_files
from xmc_jax.files.digests import sha256
from xmc_jax.models import hf, hf_export
from xmc_jax.retrieval import scann
from xmc_jax.runtime import sharding
from xmc_jax.shipping import cards, contents, packed_thumbnails, replacing
from xmc_jax.training import build
from xmc_jax.training.run import Run
from xmc_jax.training.state import TrainState

_VERSIONS = ("flax", "jax", "numpy", "safetensors", "scann", "tokenizers", "transformers")
_MOST_THUMBNAILS = 200_000  # of a kind, unless they are asked for: two kilobytes each
_VISION_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", hf.INDEX)


def encoder(
    run: Run,
    state: TrainState,
    workdir: epath.PathLike,
    overwrite: bool = False,
) -> epath.Path:
    """Writes the encoder, or its adapters, its projection of images, and its tokenizer.

    Args:
        workdir: gets `export/`, or `export-adapter/`, which is returned; see `replacing.replaced`.

    Raises:
        ValueError: adapters are asked for and there are none, or nothing to load them onto; or
            work of people would be lost.
    """
    is_adapter = run.config.export.format == "adapter"
    target = epath.Path(workdir) / ("export-adapter" if is_adapter else "export")
    with replacing.replaced(target, replacing.RECORD, overwrite) as folder:
        _encoder(folder, run, state)
        replacing.record(folder)
    return target


def whole(
    run: Run,
    step: int,
    state: TrainState,
    workdir: epath.PathLike,
    overwrite: bool = False,
) -> epath.Path:
    """Writes an artifact: see `artifact`. The model is evaluated as it is written.

    Args:
        workdir: gets `export/`, which is returned; see `replacing.replaced`.

    Raises:
        ValueError: an image encoder that is to be carried and is not there; or work of people
            would be lost.
    """
    target = epath.Path(workdir) / "export"
    with replacing.replaced(target, contents.MANIFEST, overwrite) as folder:
        _encoder(folder, run, state)
        _fill(folder, run, step, state)
    return target


def _encoder(folder: pathlib.Path, run: Run, state: TrainState) -> None:
    """Writes what `encoder` is for into a folder."""
    config, T = run.config, run.config.data.max_length
    outside = prompts.around_text(run.layout.prompts, build.order(config))
    common = {
        "lora": config.encoder.lora,
        "pooling": run.model.pooling,
        "prompts": run.data.prompts,
        "max_length": len(outside.head) + T + len(outside.tail),
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
        made_by = cards.public(run.data.images.manifest["encoder"])
        hf_export.projection(folder, params["projection"], made_by)
    source = build.tokenizer_source(config).tokenizer
    if build.decodes(config):
        prompts.export(
            source,
            folder,
            **build.prompt_texts(config),
            pooling=run.model.pooling,
            max_length=T,
            order=build.order(config),
        )
    else:
        tokenizer.export(source, folder, T)


def _fill(folder: pathlib.Path, run: Run, step: int, state: TrainState) -> None:
    """Everything but the encoder, the manifest last."""
    config, data = run.config.export, run.data
    # Exactly, and without the comparison with an index that is not shipped.
    config_exact = dataclasses.replace(run.config.eval, index="exact", compare_scann=False)
    label_texts = folder / "label_texts.npy"
    run.embed_to(state.params, "label", label_texts, pooled=True)
    embeddings = _labels(folder / "labels", run, state, label_texts)
    evaluation = run.evaluate(state, config_exact, embeddings)
    model = _model(folder, run)
    content: dict[str, Any] = {
        "name": run.config.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "dataset": {"name": data.name, "digest": data.digest, "report": data.manifest["report"]},
        "step": step,
        "model": dataclasses.asdict(model),
        "metrics": evaluation.metrics,
        "labels": None,
        "prototypes": None,
        "documents": None,
        "index": None,
        "thumbnails": None,
        "config": cards.public(dataclasses.asdict(run.config)),
    }
    content["labels"] = _part("labels", data.num_labels, model)
    if config.prototypes and run.model.prime is not None:
        _prototypes(folder / "prototypes", run, state, label_texts)
        content["prototypes"] = _part("prototypes", data.num_labels, model) | {
            "config": dataclasses.asdict(run.config.prime)
        }
    label_texts.unlink(missing_ok=True)
    mix = run.config.eval.augmented
    if config.documents:
        _documents(folder / "documents", run, state)
        content["documents"] = _part("documents", data.num_documents, model)
    content["ranking"] = dataclasses.asdict(
        dataclasses.replace(mix, enabled=mix.enabled and config.documents)
    )
    many = run.config.eval.scann.builds_tree(data.num_labels)
    if config.index == "scann" or (config.index == "auto" and many and scann.available()):
        content["index"] = _part("index", data.num_labels, model) | _index(
            folder / "index", run, state, embeddings
        )
    if config.thumbnails == "always" or (config.thumbnails == "auto" and data.images is not None):
        content["thumbnails"] = _thumbnails(folder / "thumbnails", run)
    texts_for_people = cards.make(content, run)
    for name, text in texts_for_people.items():
        (folder / name).write_text(text, encoding="utf-8")
    content["cards"] = {name: sha256(folder / name) for name in texts_for_people}
    contents.write_manifest(folder, content)


def _model(folder: pathlib.Path, run: Run) -> contents.ModelInput:
    images = None
    if run.data.images is not None:
        manifest = run.data.images.manifest
        made_by, source = manifest["encoder"], manifest["source"]
        processing = source.get("processing", {})
        options = run.config.data.images
        images = contents.ImageInput(
            encoder=made_by["name"],
            revision=made_by["revision"],
            digest=made_by["digest"],
            width=made_by["E"],
            per_item=run.data.train.per_item,
            layout=processing.get("layout", options.layout),
            alpha=source.get("alpha", "white"),
            dtype=processing.get("dtype", options.dtype),
            folder=None,
        )
        # A folder of this machine has no name by which others could find it.
        local = images.revision is None and pathlib.Path(images.encoder).is_dir()
        if run.config.export.vision == "carried" or local:
            images = dataclasses.replace(images, folder=_carry(folder, images))
        images = dataclasses.replace(images, encoder=cards.public(images.encoder))
    model, layout = run.model, run.layout
    return contents.ModelInput(
        digest=contents.digest_of_model(
            {
                path.relative_to(folder).as_posix(): sha256(path)
                for path in folder.rglob("*")
                if path.is_file()
            }
        ),
        width=run.sizes.width,
        max_length=run.config.data.max_length,
        special_tokens=run.data.special_tokens,
        prompts=layout.prompts,
        document_prompt=run.data.prompts[0],
        label_prompt=run.data.prompts[1],
        pooling=model.pooling,
        compute_dtype=model.compute_dtype,
        order=layout.order,
        positions=layout.positions,
        text=run.data.manifest["text"],
        images=images,
    )


def _carry(folder: pathlib.Path, images: contents.ImageInput) -> str | None:
    """Copies the image encoder; a descriptor has no files."""
    from xmc_jax.images import descriptor

    if images.encoder == descriptor.NAME:
        return None
    source = hf.resolve(images.encoder, images.revision)
    if source.digest != images.digest:
        raise ValueError(
            f"{images.encoder}: expected the image encoder of the run (sha256 "
            f"{images.digest[:12]}), found another (sha256 {source.digest[:12]})"
        )
    (folder / "vision").mkdir()
    for pattern in _VISION_FILES:
        for path in source.folder.glob(pattern):
            shutil.copyfile(path, folder / "vision" / path.name)
    return "vision"


def _labels(
    folder: pathlib.Path, run: Run, state: TrainState, label_texts: pathlib.Path
) -> np.ndarray:
    """Writes the labels, of their encoded texts; returns their embeddings, memory-mapped."""
    folder.mkdir()
    pooled = np.load(label_texts, mmap_mode="r", allow_pickle=False)
    run.index_to(state, pooled, folder / "embeddings.npy")
    array_files.save(folder / "frequency.npy", run.data.label_frequency.astype(np.int64))
    if run.prior is not None:
        array_files.save(folder / "prior.npy", np.asarray(run.prior, np.float64))
    texts.save(folder, "ids", run.data.uids("label"))
    texts.save(folder, "texts", run.data.texts("label"))
    return np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)


def _prototypes(
    folder: pathlib.Path, run: Run, state: TrainState, label_texts: pathlib.Path
) -> None:
    folder.mkdir()
    label_texts.rename(folder / "text.npy")
    array_files.save(folder / "centroids.npy", np.float32(sharding.fetch(state.tables.centroids)))
    free_vector_of = sharding.fetch(state.tables.free_vector_of)
    array_files.save(folder / "free_vector_of.npy", free_vector_of.astype(np.int32))
    params = run.merged(state)
    array_files.save(
        folder / "free_vectors.npy", np.float32(sharding.fetch(params["free_vectors"]))
    )
    hf_export.tree(folder / "combiner.safetensors", params.get("combiner", {}))


def _documents(folder: pathlib.Path, run: Run, state: TrainState) -> None:
    folder.mkdir()
    bank = sharding.fetch(state.tables.document_bank)
    array_files.save(folder / "embeddings.npy", np.asarray(bank, np.float32))
    positives = run.data.positives("train")
    array_files.save(folder / "positives.indptr.npy", positives.indptr.astype(np.int64))
    array_files.save(folder / "positives.indices.npy", positives.indices.astype(np.int32))
    texts.save(folder, "ids", run.data.uids("train"))
    texts.save(folder, "texts", run.data.texts("train"))


def _index(
    folder: pathlib.Path, run: Run, state: TrainState, embeddings: np.ndarray
) -> dict[str, Any]:
    """Writes the ScaNN index; returns its recall and the documents that measured it."""
    k = min(run.config.eval.k, len(embeddings))
    queries = run.embed(state.params, "test")
    index, measured = scann.build_measured(embeddings, run.config.eval.scann, queries, k)
    index.save(folder)
    logging.info("ScaNN finds %.2f %% of the exact %d", 100 * measured["recall"], k)
    return measured


def _thumbnails(folder: pathlib.Path, run: Run) -> dict[str, Any] | None:
    """Writes them; returns the folder and counts. None where there are no image files."""
    required = run.config.export.thumbnails == "always"
    try:
        from xmc_jax.images import thumbnails as item_thumbnails

        files = build.picture_files(run.config)
    except (ImportError, ValueError) as error:
        if required:
            raise ValueError(f"export.thumbnails: expected image files, found none: {error}") from (
                error
            )
        logging.info("no thumbnails, since there are no image files: %s", error)
        return None
    folder.mkdir()
    section: dict[str, Any] = {"folder": folder.name}
    splits = {"labels": "label", "documents": "train"}
    if not run.config.export.documents:
        del splits["documents"]
    for kind in packed_thumbnails.KINDS:
        section[kind] = 0
        source, uids = files.get(splits.get(kind), (None, ()))
        if len(uids) > _MOST_THUMBNAILS and not required:
            logging.info(
                "no thumbnails of %d %s; --config.export.thumbnails=always makes them",
                len(uids),
                kind,
            )
        elif uids:
            section[kind] = packed_thumbnails.save(folder, kind, item_thumbnails.make(source, uids))
    if not any(section[kind] for kind in packed_thumbnails.KINDS):
        folder.rmdir()
        return None
    return section


def _part(folder: str, count: int, model: contents.ModelInput) -> dict[str, Any]:
    return dataclasses.asdict(contents.Part(folder, count, model.digest))


def _versions() -> dict[str, str]:
    versions = {
        "xmc_jax": importlib.metadata.version("xmc_jax"),
        "python": platform.python_version(),
    }
    for name in _VERSIONS:
        if name != "scann" or scann.available():
            versions[name] = importlib.metadata.version(name)
    return versions
