"""The command: `python -m xmc_jax.main --config=configs/vixml.py[:variant] [--config.a.b=value]`.

Modes:
    prepare   make the dataset folder and the image folder of the config, and say what is in them.
    train     the same if needed; train or go on with the run in --workdir, and evaluate it.
    evaluate  evaluate a checkpoint of --workdir; --config.eval.* may differ from training.
    tune      choose the weights of retrieval-augmented inference on validation documents: those
              that the data name, else training documents that are held out, of a run without them
              that is trained first if there is none; evaluate and the other modes use the weights
              with --config.eval.augmented.weights=tuned.
    embed     write the embeddings of documents and labels that the checkpoint gives.
    index     build the ScaNN index of its labels, save it, and measure its recall and speed.
    export    write its encoder as a folder for Hugging Face and sentence-transformers, or with
              --config.export.format=adapter its adapters as one for peft.
    predict   rank labels for the documents of --input, of the exported model in --artifact.
    labels    add labels to the exported model in --artifact, change and remove some, without
              training: --labels.add, --labels.update and --labels.remove name files.
    report    write report.html of --workdir again, or of a run that is under way.
    plan      say what the run needs on --topology, and whether it fits; exit code 1 if not.
    serve     answer queries over HTTP from --artifact, what export wrote, with --serve.*; needs no
              --config.

The modes evaluate, tune, embed, index, export, predict, labels, report and serve take the config of
the run in --workdir if --config is not given.
"""

import dataclasses
import difflib
import importlib.metadata
import logging as py_logging
import os
import platform
import re
import runpy
import signal
import sys
import threading
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from xmc_jax.config import LabelsConfig, PredictConfig, RunConfig, ServeConfig
from xmc_jax.config.declare import options
from xmc_jax.runtime import command


def _settings(section: str, kind: type) -> Callable[[], Any]:
    """Defines a flag --section.field=value for each field of a section; returns what reads them."""
    define = {
        bool: flags.DEFINE_bool,
        float: flags.DEFINE_float,
        int: flags.DEFINE_integer,
        tuple: flags.DEFINE_list,
    }
    holders = {
        option.name: define.get(typing.get_origin(option.kind) or option.kind, flags.DEFINE_string)(
            f"{section}.{option.name}", option.default, option.text
        )
        for option in options(kind)
    }
    return lambda: kind(**{name: holder.value for name, holder in holders.items()})


_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with :variant; modes that read a run take the config of --workdir if not given.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives, runs/<config.name> if not given; run again to go on."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        *("prepare", "train", "evaluate", "tune", "embed", "index", "export", "predict"),
        *("labels", "serve", "report", "plan"),
    ],
    "What to do.",
)
_STEP = flags.DEFINE_string(
    "step", "latest", "Checkpoint of the modes other than train: latest, best (by P@1) or a step."
)
_ARTIFACT = flags.DEFINE_string(
    "artifact",
    None,
    "Of predict, labels and serve: what --mode=export wrote, <workdir>/export if not given; with "
    "it, neither --config nor --workdir is needed.",
)
_INPUT = flags.DEFINE_string(
    "input", None, "Of --mode=predict: documents, .jsonl, .csv or .parquet, or - for JSONL."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Of --mode=predict: ranked labels, .jsonl or .parquet, or - for JSONL."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Of --mode=predict: replace an --output that was made of others. Of --mode=export: replace a "
    "folder with changed labels or edited texts.",
)
_PREDICT = _settings("predict", PredictConfig)
_LABELS = _settings("labels", LabelsConfig)
_SERVE = _settings("serve", ServeConfig)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Of --mode=train: START:STOP; a trace of the steps from START to STOP, both included, is "
    "written to <workdir>/profile.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "cpu", "Of --mode=plan: cpu, cpu:8, gpu:h100x8, v5e:4x4, v5p:2x2x4, ..."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "off"], "auto: the processes of a cluster; off: this one alone."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where JAX does not find the processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator_address; from 0.")
_DISTRIBUTED_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "Seconds until all processes must have started.", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    10,
    "Seconds after which a host that no longer answers has failed, and the run ends on all.",
    lower_bound=4,
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs, local or gs://, or off; the user's own if not given.",
)
# What a flag takes, by what absl and Python say of a value that it does not.
_EXPECTED = {
    "invalid literal for int()": "a whole number, such as 1000",
    "Exceeds the limit": "a whole number of at most 4,300 digits",
    "could not convert string to float": "a number, such as 0.5",
    "Non-boolean argument": "true or false",
    "is not a dict": "fields of the section, such as --config.train.epochs=3",
}
_OF_ARTIFACT = ("predict", "labels", "serve")  # modes that need no config, but an exported model
_OF_RUN = (*_OF_ARTIFACT, "evaluate", "tune", "embed", "index", "export", "report")
_FAILED, _USAGE, _BY_SIGNAL = 1, 2, 128  # exit codes; of a signal, its number more


def main(argv: list[str]) -> int:
    """Runs the mode that the flags name; returns the exit code."""
    del argv
    # Imported here, so that a mistyped flag is answered at once.
    from xmc_jax import modes
    from xmc_jax.runtime import distributed

    if _WORKDIR.value == "":
        raise ValueError("--workdir: expected a folder, got none")
    config = _config()
    workdir = _WORKDIR.value or ("" if config is None else f"runs/{config.name}")
    invocation = modes.Invocation(
        config=config,
        workdir=epath.Path(workdir),
        step=_STEP.value,
        topology=_TOPOLOGY.value,
        recipe=None if _CONFIG.value is None else _recipe(),
        artifact=_ARTIFACT.value,
        input=_INPUT.value,
        output=_OUTPUT.value,
        overwrite=_OVERWRITE.value,
        predict=_PREDICT(),
        labels=_LABELS(),
        serve=_SERVE(),
        profile=_profile(),
    )
    distributed.agree("--mode", [_MODE.value, str(invocation.workdir), invocation.step])
    distributed.agree("config", config and dataclasses.asdict(config))
    return modes.run(_MODE.value, invocation)


def _config() -> RunConfig | None:
    """The config of --config, else of the run in --workdir; None with --artifact alone."""
    from xmc_jax.files import workdirs

    if _CONFIG.value is not None:
        return RunConfig.from_dict(_CONFIG.value.to_dict())
    if _ARTIFACT.value and _MODE.value in _OF_ARTIFACT:
        return None
    return workdirs.read_run_config(_WORKDIR.value)


def _recipe() -> RunConfig:
    """The config of --config before other flags changed it."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return RunConfig.from_dict(_loaded(file, variant).to_dict())


def _loaded(file: str, variant: str) -> ConfigDict:
    get_config = runpy.run_path(file).get("get_config", ConfigDict)
    return get_config(variant) if variant else get_config()


def parse(argv: list[str], closed: Collection[str] = ()) -> list[str]:
    """Flags of the command line.

    Args:
        argv: the command's name, then its flags.
        closed: standard streams that are closed, see `command.open_standard_streams`.

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
    of_artifact, of_run = _MODE.value in _OF_ARTIFACT, _MODE.value in _OF_RUN
    named = (of_artifact and _ARTIFACT.value) or (of_run and _WORKDIR.value)
    if config is None and not named:
        instead = ", or --workdir=FOLDER of a run" if of_run else ""
        instead += ", or --artifact=FOLDER, an exported model" if of_artifact else ""
        raise ValueError(
            f"--config: expected a config file, e.g. --config=configs/vixml.py{instead}"
        )
    if _MODE.value == "predict":
        for flag, stream in ((_INPUT, "stdin"), (_OUTPUT, "stdout")):
            if not flag.value:
                raise ValueError(f"--{flag.name}: expected a file, or -, got none")
            if flag.value == "-" and stream in closed:
                raise ValueError(f"--{flag.name}=-: expected an open {stream}, found it closed")
    _profile()  # raises what does not fit
    for settings in (_PREDICT, _LABELS, _SERVE):
        settings()  # raises what does not fit
    return rest


def _profile() -> tuple[int, int] | None:
    """The steps to trace, the first and the last.

    Raises:
        ValueError: they are none, or another mode than train is asked for.
    """
    if _PROFILE.value is None:
        return None
    if _MODE.value != "train":
        raise ValueError(f"--profile: expected --mode=train, got --mode={_MODE.value}")
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", _PROFILE.value)
    steps = match and (int(match[1]), int(match[2]))
    if not steps or not 1 <= steps[0] <= steps[1]:
        raise ValueError(
            "--profile: expected START:STOP, the first step to trace and the last, as 10:20, got "
            f"{_PROFILE.value!r:.60}"
        )
    return steps


def _explain(argv: list[str], error: Exception) -> str:
    """One line for what absl and ml_collections say in several, or in a traceback."""
    overrides = [match[1] for a in argv if (match := re.match(r"--config\.([\w.]+)", a))]
    file = next((match for a in argv if (match := re.match(r"--config=([^:]+):?(.*)", a))), None)
    if overrides and not file:
        return f"--config.{overrides[0]}: expected --config=FILE, which has this field, got none"
    if overrides and file and os.path.exists(file[1]):
        # The flags hold no config after a failure; this one is only read for its fields.
        known = list(_paths(_loaded(file[1], file[2])))
        for name in overrides:
            if known and name not in known:
                nearest = difflib.get_close_matches(name, known, 1, 0)[0]
                return f"--config.{name}: no such field; did you mean --config.{nearest}?"
    lines = str(error).strip().splitlines() or [repr(error)]
    if any("Traceback" in line for line in lines):  # of get_config; its last line is the error
        return lines[-1].partition(": ")[2]
    said = " ".join(" ".join(lines).split())
    if file and not os.path.isfile(file[1]):
        there = "a folder" if os.path.isdir(file[1]) else "none"
        return (
            f"--config={file[1]}: expected a config file, such as configs/vixml.py of a checkout, "
            f"found {there}"
        )
    if file and isinstance(error, SyntaxError):
        return f"--config={file[1]}: expected a config file in Python, found: {said}"
    if given := re.match(r"flag --([\w.]+)=(.*?): (.+)", said):
        name, value, reason = given.groups()
        expected = next((e for start, e in _EXPECTED.items() if start in reason), None)
        if expected is not None:
            return f"--{name}: expected {expected}, got {value:.60}"
    return said


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        yield prefix + name
        value = config.get_oneway_ref(name).get()
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")


def _start() -> None:
    """Makes this process one of a run's; only process 0 prints, the others' logs have a number."""
    from xmc_jax.runtime import compilation, distributed

    distributed.initialize(
        **_cluster(),
        timeout=_DISTRIBUTED_TIMEOUT.value,
        peer_timeout=_PEER_TIMEOUT.value,
        preemption=_MODE.value in ("train", "tune"),
    )
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, as long as the process
        logging.get_absl_handler().setFormatter(_Numbered())
    compilation.keep(_COMPILATION_CACHE.value)
    distributed.agree("package versions", _versions())


def _cluster() -> dict[str, Any]:
    return {
        "mode": _DISTRIBUTED.value,
        "coordinator_address": _COORDINATOR_ADDRESS.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }


def _versions() -> dict[str, str]:
    """What a program depends on: processes with other versions may not fit together."""
    packages = ("flax", "jax", "jaxlib", "ml_dtypes", "numpy", "optax", "orbax-checkpoint")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"python": platform.python_version()}


class _Numbered(logging.PythonFormatter):
    """Log lines that begin with the number of the process."""

    def format(self, record: py_logging.LogRecord) -> str:
        from xmc_jax.runtime import distributed

        return f"[process {distributed.number()}] {super().format(record)}"


def _is_for_users(record: py_logging.LogRecord) -> bool:
    """Whether a line is ours, or an error of another package.

    Orbax logs its inner workings through absl too, and with traces what it raises besides; of
    several writes that fail, asyncio logs those that it did not raise.
    """
    if record.pathname.startswith(os.path.dirname(__file__) + os.sep):
        return True
    if record.name == "asyncio" and "never retrieved" in record.getMessage():
        return False
    return record.levelno > py_logging.WARNING and "orbax" not in record.pathname


def _follows_failed_write(error: BaseException | None, trace: types.TracebackType | None) -> bool:
    """Whether a library's own thread or its cleaning up failed because a write did.

    The main thread says so in one line. Orbax waits for the first of its writes to fail, and the
    others find nobody to tell; tensorboardX tries once more as the process ends.
    """
    if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
        return True
    frames = traceback.extract_tb(trace)
    return isinstance(error, OSError) and any("tensorboardX" in x.filename for x in frames)


def _show_unraisable(unraisable: Any) -> None:
    if not _follows_failed_write(unraisable.exc_value, unraisable.exc_traceback):
        sys.__unraisablehook__(unraisable)


def _show_of_thread(thread_error: Any) -> None:
    if not _follows_failed_write(thread_error.exc_value, thread_error.exc_traceback):
        threading.__excepthook__(thread_error)


def _main(argv: list[str]) -> None:
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_for_users)
    sys.unraisablehook, threading.excepthook = _show_unraisable, _show_of_thread
    from xmc_jax.runtime import distributed, process_flags

    try:
        process_flags.check(**_cluster())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    try:
        _start()
        code = main(argv)
    except OSError as error:
        code, said = command.lost_output(error) or (_FAILED, command.explained(error))
    except (ValueError, FloatingPointError) as error:
        code, said = _FAILED, command.explained(error)
    except KeyboardInterrupt:
        code, said = _BY_SIGNAL + signal.SIGINT, "interrupted; run the same command again"
    else:
        code, said = command.lost_output() or (code, "")
    if not said:
        distributed.finish()
        sys.exit(code)
    print(f"error: {said}", file=sys.stderr)
    distributed.fail(said, code)
    sys.exit(code)


def run() -> None:
    """The entry of the command."""
    closed = command.open_standard_streams()
    command.keep_freed_memory()
    command.without_native_log()
    try:
        arguments = parse(sys.argv, closed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    app.run(_main, argv=arguments, flags_parser=lambda argv: argv)


if __name__ == "__main__":
    run()
