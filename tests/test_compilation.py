"""Programs kept on disk: found again with the same results, and never in the way of a run."""

import copy
import json
import pathlib

import numpy as np
import processes
import pytest

SOURCE = """
import sys
import jax, jax.numpy as jnp
from xmc_jax import compilation
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
)
compilation._MIN_SECONDS = 0
compilation.keep(sys.argv[1] if len(sys.argv) > 1 else None)

def f(x):
    return jnp.tanh(x @ x.T).sum(axis=0) + jax.random.normal(jax.random.key(0), (32,))

x = jnp.linspace(-1, 1, 32 * 7, dtype=jnp.float32).reshape(32, 7)
y = jax.jit(jax.value_and_grad(lambda x: f(x).sum()))(x)
print(len(hits), y[0].tobytes().hex(), y[1].tobytes().hex())
"""


def start(folder: pathlib.Path | None, **environment: str) -> tuple[int, str, str]:
    """Programs found, results and stderr of a process."""
    arguments = ["-c", SOURCE] + ([] if folder is None else [str(folder)])
    with processes.started(1, arguments, environment=environment) as group:
        (done,) = group.wait(60)
    assert done.returncode == 0, done.stderr
    hits, _, values = done.stdout.strip().partition(" ")
    return int(hits), values, done.stderr


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_computes_the_same(tmp_path):
    cold, warm, without = start(tmp_path), start(tmp_path), start("off")
    assert (cold[0], without[0]) == (0, 0)
    assert warm[0] > 0
    assert cold[1] == warm[1] == without[1]
    assert cold[2] == warm[2] == without[2] == ""
    (machine,) = tmp_path.iterdir()
    assert machine.name.startswith("jax-")


@pytest.mark.slow
def test_what_a_killed_process_left_is_compiled_anew(tmp_path):
    start(tmp_path)
    programs = sorted(tmp_path.glob("*/*-cache"))
    for program in programs:
        program.write_bytes(program.read_bytes()[:100])
        program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    hits, _, said = start(tmp_path)
    assert (hits, said) == (0, "")
    assert start(tmp_path)[0] == len(programs)


@pytest.mark.slow
def test_without_a_folder_to_write_to_there_is_one_line_and_a_result(tmp_path):
    (tmp_path / "file").touch()
    hits, values, said = start(tmp_path / "file" / "below")
    assert (hits, values) == (0, start("off")[1])
    assert said.count("\n") == 1
    assert "compiled programs are not kept" in said


@pytest.mark.slow
def test_by_default_the_folder_is_the_users_own(tmp_path):
    start(None, XDG_CACHE_HOME=str(tmp_path))
    (machine,) = (tmp_path / "xmc_jax" / "compiled").iterdir()
    assert list(machine.glob("*-cache"))
    assert machine.stat().st_mode & 0o077 == 0  # programs are code


@pytest.mark.slow
def test_a_run_with_kept_programs_has_the_bits_of_one_without(fields, tmp_path):
    fields = copy.deepcopy(fields) | {"name": "topics"}
    fields["train"] |= {"epochs": 1, "eval_every": 0}
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    found = []
    for name in ("cold", "warm"):
        flags = (f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / name}")
        processes.command(1, *flags, f"--compilation_cache={tmp_path / 'compiled'}")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records = [
            {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
            for line in lines
        ]
        with np.load(tmp_path / name / "predictions" / "5.npz", allow_pickle=False) as predictions:
            found.append((records, {key: predictions[key].tobytes() for key in predictions}))
    assert found[0] == found[1]
