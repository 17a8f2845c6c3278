"""What the recipes of the paper need on slices of TPUs, compiled by libtpu where it is installed.

Without any TPU. One process at a time can use libtpu, so each plan is made in one of its own.
"""

import importlib.util
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
CHILD = """
import json, sys
from configs import vixml
from xmc_jax.planning import plan, programs, shape, topology
from xmc_jax.config import RunConfig
from xmc_jax.training.program import Program

variant, name, model, changes, only = json.loads(sys.argv[1])
fields = vixml.get_config(variant).to_dict()
fields["encoder"]["backbone"] = model
for section, values in changes.items():
    fields[section] |= values
where = topology.find(name)
prompts, _ = shape.prompts(RunConfig.from_dict(fields))
data, _ = shape.of(RunConfig.from_dict(fields))
program = Program(RunConfig.from_dict(fields), data, prompts, where.devices)
found = [
    plan.compile_one(each, program, where)
    for each in programs.of(program)
    if only is None or each.name in only
]
print(json.dumps({
    "tokens": data.length + len(prompts.head + prompts.middle + prompts.tail)
        + data.images_per_item,
    "room": where.memory,
    "memory": {each.name: each.memory for each in found},
    "compiled": all(each.costs is not None for each in found),
    "loops": sum(each.costs.unknown_loops for each in found if each.costs),
}))
"""
SHARDED = {"mesh": {"data": 1, "fsdp": 16, "tensor": 1}}

pytestmark = [
    pytest.mark.scale,
    pytest.mark.slow,
    pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed: pip install libtpu"),
]


def planned(tmp_path, variant, name, model, only=None, **changes) -> dict:
    shutil.copy(ROOT / f"tests/models/published/{model}.json", tmp_path / "config.json")
    arguments = [variant, name, str(tmp_path), SHARDED | changes, only]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_seven_billion_parameters_need_half_of_a_small_slice(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = planned(
        tmp_path,
        "qwen25_7b/amazontitles_131k",
        "v5e:4x4",
        "qwen2.5-7b-instruct",
        only=["train_step"],
        data={"max_length": 38},
        encoder={"remat": "nothing_saveable"},
        train={"batch_size": 2048, "n_chunks": 4},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found["tokens"] == 48
    assert found["loops"] == 0
    assert found["memory"]["train_step"] <= 8 << 30
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 2 * 180  # three minutes on two cores


@pytest.mark.parametrize(
    "variant, name, model",
    [
        ("qwen25_3b/amazontitles_1_3m", "v5e:4x4", "qwen2.5-3b-instruct"),
        ("qwen25_7b/amazontitles_1_3m", "v5p:2x2x4", "qwen2.5-7b-instruct"),
    ],
)
def test_runs_over_millions_of_labels_fit(tmp_path, variant, name, model):
    found = planned(tmp_path, variant, name, model)
    assert found["compiled"]
    assert max(found["memory"].values()) <= found["room"], found["memory"]
