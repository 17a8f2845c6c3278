"""The memory that a plan says against what a fresh process takes when it runs the step."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# A child either compiles the step and says what it needs, or runs it, compiled before, and says by
# how much its memory grew from just before the first array of the run.
CHILD = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from configs import vixml
from xmc_jax.planning import plan, programs, topology
from xmc_jax.config import RunConfig
from xmc_jax.training.program import Program
from xmc_jax.data.types import DataShape

def memory(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024

what, size = sys.argv[1], json.loads(sys.argv[2])
fields = vixml.get_config("tiny,reference").to_dict()
fields["encoder"]["layers"] = size["layers"]
fields["train"] |= {"batch_size": size["batch"], "labels": "sampled"}
shape = DataShape(
    documents=size["documents"], test=100, labels=size["labels"], length=32,
    pairs=size["documents"], positives=(1,),
)
where = topology.find("cpu")
program = Program(RunConfig.from_dict(fields), shape, devices=where.devices)
(step,) = [each for each in programs.of(program) if each.name == programs.TRAIN_STEP]
if what == "plan":
    print(plan.compile_one(step, program, where).memory)
    sys.exit()
compiled = step.trace().lower().compile()
before = memory("VmRSS")

def fill(leaf):
    return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding)

state, frozen, batch = jax.tree.map(
    fill, (program.abstract, program.abstract_frozen, program.abstract_batch())
)
for _ in range(2):
    state, metrics = compiled(state, frozen, batch)
jax.block_until_ready(state)
print(memory("VmHWM") - before)
"""
SIZES = {
    "two GiB": {"layers": 1, "batch": 704, "documents": 4000, "labels": 2000},
    "more in the step": {"layers": 2, "batch": 512, "documents": 4000, "labels": 2000},
    "more in tables": {"layers": 1, "batch": 384, "documents": 900_000, "labels": 300_000},
}


@pytest.mark.scale
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_fresh_process_takes_what_the_plan_says(size, tmp_path):
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }

    def child(what: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, what, json.dumps(SIZES[size])],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    planned, grown = child("plan"), child("run")
    print(planned, grown, planned / grown)
    assert planned > 2 << 30
    assert planned == pytest.approx(grown, rel=0.15)
