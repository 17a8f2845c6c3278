"""The command: `python -m xmc_jax.main --config=configs/vixml.py[:variant] [--config.a.b=value]`.

Modes:
    prepare   make the dataset folder and the image folder of the config, and say what is in them.
    train     the same if needed; train or go on with the run in --workdir, and evaluate it.
    evaluate  evaluate a checkpoint of --workdir; --config.eval.* may differ from training.
    embed     write the embeddings of documents and labels that the checkpoint gives.
    index     build the ScaNN index of its labels, save it, and measure its recall and speed.
    export    write its encoder as a folder for Hugging Face and sentence-transformers, or with
              --config.export.format=adapter its adapters as one for peft.
    plan      say what the run needs on --topology, and whether it fits; exit code 1 if not.
    serve     answer queries over HTTP from --artifact, what export wrote, with --serve.*; needs no
              --config.
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
from collections.abc import Iterator
from typing import Any, TypeVar

from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from xmc_jax import command
from xmc_jax.serve.config import ServeConfig

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :variant.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives, runs/<config.name> if not given; run again to go on."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["prepare", "train", "evaluate", "embed", "index", "export", "plan", "serve"],
    "What to do.",
)
_STEP = flags.DEFINE_string(
    "step", "latest", "Checkpoint of the modes other than train: latest, best (by P@1) or a step."
)
_ARTIFACT = flags.DEFINE_string(
    "artifact", None, "Exported folder that --mode=serve opens; <workdir>/export if not given."
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
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs, local or gs://, or off; the user's own if not given.",
)
_FAILED, _USAGE, _BY_SIGNAL = 1, 2, 128  # exit codes; of a signal, its number more
_OF_ARTIFACT = ("serve",)  # modes that need an exported folder and no config

Section = TypeVar("Section")


def _define(name: str, kind: type) -> None:
    """A flag --name.field for each field of a dataclass, described as its docstring does."""
    said = dict(re.findall(r"^ {8}(\w+): (.+?)(?=\n {8}\w+: |\n *\Z)", kind.__doc__, re.S | re.M))
    define = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple[str, ...]: flags.DEFINE_list,
    }
    for field in dataclasses.fields(kind):
        about = " ".join(said[field.name].split())
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        define[field.type](f"{name}.{field.name}", default, about)


def _given(name: str, kind: type[Section]) -> Section:
    """The dataclass of those flags.

    Raises:
        ValueError: a value that the field cannot have.
    """
    values = {
        field.name: flags.FLAGS[f"{name}.{field.name}"].value for field in dataclasses.fields(kind)
    }
    return kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in values.items()})


_define("serve", ServeConfig)


def main(argv: list[str]) -> int:
    """Runs the mode that the flags name; returns the exit code."""
    del argv
    # Imported here, so that a mistyped flag is answered at once.
    if _MODE.value == "serve":
        from xmc_jax.serve import command as serving

        serving.run(_artifact(), _given("serve", ServeConfig))
        return 0
    from xmc_jax import distributed, modes

    fields = _CONFIG.value.to_dict()
    asked = modes.Asked(
        fields=fields,
        workdir=epath.Path(_WORKDIR.value or f"runs/{fields['name']}"),
        step=_STEP.value,
        topology=_TOPOLOGY.value,
    )
    distributed.agree("--mode", [_MODE.value, str(asked.workdir), asked.step])
    distributed.agree("config", fields)
    return modes.run(_MODE.value, asked)


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
    if _MODE.value in _OF_ARTIFACT:
        _artifact()
        _given("serve", ServeConfig)
    elif config is None:
        raise ValueError("--config: expected a config file, e.g. --config=configs/vixml.py")
    return rest


def _artifact() -> str:
    """The folder of --artifact, or of the run that --workdir or --config name."""
    if _ARTIFACT.value or _WORKDIR.value:
        return _ARTIFACT.value or f"{_WORKDIR.value}/export"
    if _CONFIG.value is None:
        raise ValueError(
            "--artifact: expected an exported folder, e.g. --artifact=runs/first/export, got none"
        )
    return f"runs/{_CONFIG.value.name}/export"


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


def _start() -> None:
    """Makes this process one of a run's; only process 0 prints, the others' logs have a number."""
    from xmc_jax import compilation, distributed

    distributed.initialize(
        **_cluster(), timeout=_DISTRIBUTED_TIMEOUT.value, preemption=_MODE.value == "train"
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
    found = {name: importlib.metadata.version(name) for name in packages}
    return found | {"python": platform.python_version()}


class _Numbered(logging.PythonFormatter):
    """Log lines that begin with the number of the process."""

    def format(self, record: py_logging.LogRecord) -> str:
        from xmc_jax import distributed

        return f"[process {distributed.number()}] {super().format(record)}"


def _main(argv: list[str]) -> None:
    logging.set_verbosity(logging.INFO)
    # Orbax logs its inner workings through absl too; of other packages, errors are enough.
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno > py_logging.WARNING or "xmc_jax" in record.pathname
    )
    from xmc_jax import distributed

    try:
        distributed.check(**_cluster())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    try:
        _start()
        code = main(argv)
    except (ValueError, FloatingPointError, OSError) as error:
        code, said = _FAILED, str(error)
    except KeyboardInterrupt:
        code, said = _BY_SIGNAL + signal.SIGINT, "interrupted; run the same command again"
    else:
        distributed.finish()
        sys.exit(code)
    print(f"error: {said}", file=sys.stderr)
    distributed.fail(said, code)
    sys.exit(code)


def run() -> None:
    """The entry of the command."""
    command.keep_freed_memory()
    try:
        arguments = parse(sys.argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    app.run(_main, argv=arguments, flags_parser=lambda argv: argv)


if __name__ == "__main__":
    run()
