"""Programs kept on disk: found again with the same results, and never in the way of a run."""

import json
import pathlib

import processes
import pytest

SOURCE = """
import sys
import jax, jax.numpy as jnp
from xmc_jax.config import RunConfig
from xmc_jax.runtime import compilation
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


STEP = """
import hashlib, json, sys
import jax, numpy as np
from xmc_jax.config import RunConfig
from xmc_jax.training import build
from xmc_jax.runtime import compilation
compilation.keep(sys.argv[1])
run = build.run(RunConfig.from_dict(json.loads(sys.argv[2])))
generator = np.random.default_rng(0)

def drawn(leaf):
    small = leaf.dtype.kind == "i"
    values = np.zeros(leaf.shape) if small else generator.normal(0, 0.02, leaf.shape)
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

state = jax.tree.map(drawn, run.abstract)
batch = run.put(run.sampler.build(np.arange(200, dtype=np.int32), 0, 0))
state, metrics = run.train_step(state, run.frozen, batch)
leaves = jax.device_get(jax.tree.leaves((state.params, metrics)))
print(hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest())
"""


@pytest.mark.reliability
def test_a_training_step_found_on_disk_has_the_bits_of_the_one_compiled(fields, tmp_path):
    arguments = ["-c", STEP, str(tmp_path), json.dumps(fields)]
    found = []
    for _ in range(2):
        with processes.started(1, arguments) as group:
            found += group.wait(240)
    assert [one.returncode for one in found] == [0, 0], found
    assert found[0].stdout == found[1].stdout
    assert list(tmp_path.glob("*/jit_train-*-cache"))
