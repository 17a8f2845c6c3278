"""The command: `python -m xmc_jax.main --config=configs/vixml.py[:variant] [--config.a.b=value]`.

Modes:
    train     prepare the dataset if needed, train or go on with the run in --workdir, evaluate it.
    evaluate  evaluate a checkpoint of --workdir; --config.eval.* may differ from training.
    embed     write the embeddings of documents and labels that the checkpoint gives.
    index     build the ScaNN index of its labels, save it, and measure its recall and speed.
    export    write its encoder as a folder for Hugging Face and sentence-transformers, or with
              --config.export.format=adapter its adapters as one for peft.
"""

import ctypes
import difflib
import logging as py_logging
import os
import pathlib
import re
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :variant.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives, runs/<config.name> if not given; run again to go on."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "embed", "index", "export"], "What to do."
)
_STEP = flags.DEFINE_string(
    "step", "latest", "Checkpoint of the modes other than train: latest, best (by P@1) or a step."
)
_ROWS = {"plain": "trained", "augmented": "trained + augmented"}
_FAILED, _USAGE, _BY_SIGNAL = 1, 2, 128  # exit codes; of a signal, its number more


def main(argv: list[str]) -> int:
    """Runs the mode that the flags name; returns the exit code."""
    del argv
    # Imported here, so that a mistyped flag is answered at once.
    from xmc_jax import checkpoint
    from xmc_jax.retrieval import evaluate, scann
    from xmc_jax.training import loop
    from xmc_jax.training.config import RunConfig

    fields = _CONFIG.value.to_dict()
    mode, workdir = _MODE.value, epath.Path(_WORKDIR.value or f"runs/{fields['name']}")
    run = RunConfig.from_dict(fields)
    if mode != "train":
        checkpoint.read_config(workdir)  # an absent run is answered before anything is loaded
    program = build(fields)
    made_with = fields | {"provenance": program.provenance()}
    checkpoint.check_config(workdir, made_with, new=mode == "train")
    if mode == "train":
        try:
            trained = loop.train(program, workdir)
        except loop.Interrupted as interrupted:
            logging.info("%s", interrupted)
            return _BY_SIGNAL + interrupted.signum
        rows = {"zero-shot": trained.zero_shot} if trained.zero_shot else {}
        _report(workdir, trained.step, rows, trained.evaluation)
        return 0

    step, state = loop.restore(program, workdir, _STEP.value)
    if mode == "evaluate":
        # Apart from what training left: the settings may be others.
        _report(workdir / "evaluate", step, {}, program.evaluate(state))
    elif mode == "embed":
        folder = workdir / "embeddings" / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("test", "train"):
            program.embed(state.params, split, out=folder / f"{split}.npy")
        program.embed_index(state, out=folder / "label.npy")
        print(f"wrote test.npy, train.npy and label.npy to {folder}")
    elif mode == "index":
        labels, folder = program.embed_index(state), workdir / "index" / str(step)
        scann.ScannIndex.build(labels, run.eval.scann).save(folder)
        index = scann.ScannIndex.load(folder, labels)
        k = min(run.eval.k, len(labels))
        found = scann.compare(index, labels, program.embed(state.params, "test"), k)
        print(f"wrote {folder}\n{evaluate.format_index({'labels': found})}")
    elif mode == "export":
        print(f"wrote {export(fields, program, state, workdir)}")
    return 0


def build(fields: Mapping[str, Any]):
    """The program of a config, over its dataset folder, which is prepared if it is not there.

    Args:
        fields: a config as nested mappings.

    Raises:
        ValueError: as all that it is made of.
    """
    from xmc_jax.training.config import RunConfig
    from xmc_jax.training.program import Program

    return Program(RunConfig.from_dict(fields), open_data(fields), _prompts(fields))


def open_data(fields: Mapping[str, Any]):
    """The dataset folder of a config, prepared if it is not there."""
    from xmc_jax.data import prepare, store

    data, source = fields["data"], _tokenizer(fields)
    folder = prepare.prepare(
        prepare.PrepareConfig(
            dataset=data["dataset"],
            data_dir=data["data_dir"],
            tokenizer=str(source.folder),
            tokenizer_name=pathlib.PurePath(source.name).name,
            max_length=data["max_length"],
            raw=None if data["raw_dir"] == "bundled" else data["raw_dir"],
            special_tokens=not _decodes(fields),
            encoding=data["encoding"],
            text=data["text"],
            propensity=(data["propensity_a"], data["propensity_b"]),
            validation_fraction=data["validation_fraction"],
            seed=data["validation_seed"],
        )
    )
    return store.open(folder)


def _prompts(fields: Mapping[str, Any]):
    """The prompts of a config as token ids; none for encoders, which take none."""
    from xmc_jax.data import prompts, tokenizer
    from xmc_jax.types import Prompts

    texts = {name: fields["fusion"][name] for name in ("prefix", "image_prefix", "suffix")}
    if not _decodes(fields):
        given = [name for name, text in texts.items() if text]
        if given:
            raise ValueError(f"fusion.{given[0]}: expected '', encoders take no prompts, got text")
        return Prompts()
    folder = _tokenizer(fields).folder
    exported, pooling = prompts.read_settings(folder), fields["encoder"]["pooling"]
    if exported is not None and exported.pooling != pooling:
        raise ValueError(
            f"{folder}: expected the pooling it was trained with, {exported.pooling!r}, got "
            f"{pooling!r}; set --config.encoder.pooling={exported.pooling}"
        )
    return prompts.tokenize(tokenizer.load(folder), folder, **texts)


def _decodes(fields: Mapping[str, Any]) -> bool:
    from xmc_jax.models import backbone, hf

    encoder = fields["encoder"]
    source = hf.resolve(encoder["backbone"], encoder["revision"], weights=False)
    return backbone.is_decoder(hf.load_config(source))


def _tokenizer(fields: Mapping[str, Any]):
    """Where the tokenizer of a config lies: the backbone's own, or that of `data.tokenizer`."""
    from xmc_jax.models import hf

    name = fields["data"]["tokenizer"]
    if name is not None:
        return hf.resolve(name, weights=False)
    return hf.resolve(fields["encoder"]["backbone"], fields["encoder"]["revision"], weights=False)


def export(fields: Mapping[str, Any], program, state, workdir: epath.Path) -> epath.Path:
    """Writes the encoder, or its adapters, and its tokenizer.

    Args:
        fields: the config of the run.
        program: of the run.
        state: what to export.
        workdir: gets `export/`, or `export-adapter/`, which is returned.

    Raises:
        ValueError: adapters are asked for and there are none, or nothing to load them onto.
    """
    from xmc_jax.data import prompts, tokenizer
    from xmc_jax.models import hf_export

    config, around, T = program.config, program.model.prompts, fields["data"]["max_length"]
    folder = workdir / ("export-adapter" if config.export.format == "adapter" else "export")
    common = {
        "lora": config.encoder.lora,
        "pooling": config.encoder.pooling,
        "max_length": len(around.head) + T + len(around.tail),
    }
    params = program.backbone(state)
    if config.export.format == "adapter":
        if config.encoder.init == "random":
            raise ValueError(
                "export.format: expected 'merged' for a backbone with random weights, which nobody "
                "can load adapters onto, got 'adapter'"
            )
        hf_export.adapter(folder, params, program.sizes, source=program.source, **common)
    else:
        dtype = config.export.dtype
        hf_export.merged(folder, params, program.sizes, dtype=dtype, **common)
    source = _tokenizer(fields).folder
    if _decodes(fields):
        texts = {name: fields["fusion"][name] for name in ("prefix", "image_prefix", "suffix")}
        prompts.export(source, folder, pooling=config.encoder.pooling, max_length=T, **texts)
    else:
        tokenizer.copy(source, folder)
    return folder


def _report(workdir: epath.Path, step: int, rows: dict[str, Any], evaluation) -> None:
    """Writes metrics.json and predictions/<step>.npz; prints the table."""
    from xmc_jax.retrieval import evaluate

    evaluate.write(
        evaluation, workdir / "metrics.json", workdir / "predictions" / f"{step}.npz", rows
    )
    rows = rows | {_ROWS[name]: metrics for name, metrics in evaluation.metrics.items()}
    print(evaluate.format_table(rows))
    print()
    print(evaluate.format_full_table(rows))
    if evaluation.index:
        print()
        print(evaluate.format_index(evaluation.index))
    print(f"\nstep {step}; the same in {workdir / 'metrics.json'}")


def parse(argv: list[str]) -> list[str]:
    """Flags of the command line.

    Raises:
        ValueError: one line on what is wrong: an unknown flag, variant or config field, with the
            nearest one that exists, or a value that does not fit its field.
    """
    try:
        rest = flags.FLAGS(argv)
        config = _CONFIG.value
        if config is not None:
            config.to_dict()  # raises what loading raised
    except Exception as error:  # whatever the config file raises; said in one line
        raise ValueError(_explain(argv, error)) from error
    if len(rest) > 1:
        raise ValueError(f"command line: expected flags alone, got {rest[1]!r}")
    if config is None:
        raise ValueError("--config: expected a config file, e.g. --config=configs/vixml.py")
    return rest


def _explain(argv: list[str], error: Exception) -> str:
    """One line for what absl and ml_collections say in several, or in a traceback."""
    overrides = [match[1] for a in argv if (match := re.match(r"--config\.([\w.]+)", a))]
    file = next((match for a in argv if (match := re.match(r"--config=([^:]+):?(.*)", a))), None)
    if overrides and file and os.path.exists(file[1]):
        # The flags hold no config after a failure; this one is only read for its fields.
        get_config = runpy.run_path(file[1]).get("get_config", ConfigDict)
        known = list(_paths(get_config(file[2]) if file[2] else get_config()))
        for name in overrides:
            if known and name not in known:
                nearest = difflib.get_close_matches(name, known, 1, 0)[0]
                return f"--config.{name}: no such field; did you mean --config.{nearest}?"
    lines = str(error).strip().splitlines() or [repr(error)]
    if any("Traceback" in line for line in lines):  # of get_config; its last line is the error
        return lines[-1].partition(": ")[2]
    return " ".join(" ".join(lines).split())


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        yield prefix + name
        value = config.get_oneway_ref(name).get()
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")


def _main(argv: list[str]) -> None:
    logging.set_verbosity(logging.INFO)
    # Orbax logs its inner workings through absl too; of other packages, errors are enough.
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > py_logging.WARNING or "xmc_jax" in record.pathname
    )
    try:
        sys.exit(main(argv))
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_FAILED)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again", file=sys.stderr)
        sys.exit(_BY_SIGNAL + signal.SIGINT)


def _keep_freed_memory() -> None:
    """Lets glibc reuse the buffers of a step instead of returning them to the kernel after each.

    A step on CPU otherwise faults about 1.3 GB of pages in anew, an eighth of its time. The values
    are those of <malloc.h>: one arena, no allocation by mmap, no trimming.
    """
    c = ctypes.CDLL(None)
    if hasattr(c, "mallopt"):  # not in other C libraries
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1
        c.mallopt(m_arena_max, 1)
        c.mallopt(m_mmap_max, 0)
        c.mallopt(m_trim_threshold, 2**31 - 1)


def run() -> None:
    """The entry of the command."""
    _keep_freed_memory()
    try:
        arguments = parse(sys.argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    app.run(_main, argv=arguments, flags_parser=lambda argv: argv)


if __name__ == "__main__":
    run()
