"""Real processes as one run: same batches, same training, checkpoints for any number of them."""

import copy
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import processes
import pytest

pytestmark = pytest.mark.slow

_TRAIN = """
import ast, pathlib
from xmc_jax.config import RunConfig
from xmc_jax.training import build
from xmc_jax.runtime import sharding
from xmc_jax.data import batches
from xmc_jax.training import curriculum, loop

fields, workdir, out = ast.literal_eval(pathlib.Path(sys.argv[1]).read_text()), *sys.argv[2:4]
run = build.run(RunConfig.from_dict(fields))
order = np.random.default_rng(0).permutation(run.data.num_documents).astype(np.int32)
order = batches.complete(order, fields["train"]["batch_size"])
local = [run.sampler.build(order, step, 7 + step, run.rows) for step in range(2)]
arrays = {"rows": run.rows} | {
    f"{step}/{jax.tree_util.keystr(path)}": leaf
    for step, batch in enumerate(local)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
}
np.savez(f"{out}-{jax.process_index()}.npz", **arrays)
start = run.initial_state().params
trained = loop.train(run, workdir)
arrays = {
    name + jax.tree_util.keystr(path): sharding.fetch(leaf)
    for name, tree in (("start", start), ("", trained.state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
}
if distributed.is_first():
    np.savez(out, **arrays)
    print(json.dumps(trained.evaluation.metrics))
"""


@pytest.fixture(scope="module")
def small(fields, tmp_path_factory) -> dict:
    """PRIME over two epochs of five steps, in random order; no dropout."""
    small = copy.deepcopy(fields)
    small["encoder"]["dropout"] = 0.0
    small["prime"]["dropout"] = 0.0
    small["curriculum"]["start"] = None  # rounding decides which side of a median a document is on
    small["train"] |= {"epochs": 2, "batch_size": 40, "checkpoint_every": 3, "log_every": 1}
    small["train"] |= {"positives_per_document": 2}
    small["train"] |= {"eval_every": 0, "zero_shot": False}  # evaluated at the end
    small["eval"]["augmented"] |= {"enabled": True}
    return small


def written(fields: dict, folder: pathlib.Path, name: str = "fields") -> str:
    path = folder / f"{name}.txt"
    path.write_text(repr(fields))
    return str(path)


def records(workdir) -> dict[int, dict]:
    """step -> what was recorded of it, but for times."""
    found: dict[int, dict] = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = {k: v for k, v in record.items() if k != "step" and not k.startswith("time/")}
        found.setdefault(record["step"], {}).update(values)
    return found


@dataclasses.dataclass(frozen=True)
class Trained:
    """What processes came to: each one's part of two batches, and the run's end."""

    batches: list[dict[str, np.ndarray]]
    state: dict[str, np.ndarray]
    records: dict[int, dict]
    metrics: dict[str, dict]


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def train(count, fields, folder, name, workdir=None, devices=1) -> Trained:
    """Trains in `count` processes."""
    workdir = workdir or folder / name
    out = folder / f"{name}.npz"
    path = written(fields, folder, name)
    done = processes.script(count, _TRAIN, path, str(workdir), str(out), devices=devices)
    parts = [arrays(folder / f"{name}.npz-{own}.npz") for own in range(count)]
    return Trained(parts, arrays(out), records(workdir), done[0].json())


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory):
    return train(1, small, tmp_path_factory.mktemp("alone"), "alone")


def assert_same_run(found, expected):
    """Losses to 1e-5, parameters to 1e-3 of the norm of all updates, metrics alike."""
    state, seen, want, wanted = found.state, found.records, expected.state, expected.records
    assert seen.keys() == wanted.keys()
    for step in seen:
        losses = {k: v for k, v in seen[step].items() if k.startswith("train/loss")}
        for name, value in losses.items():
            assert value == pytest.approx(wanted[step][name], rel=1e-5), (step, name)
    paths = [path for path in want if path.startswith(".params")]
    assert paths

    def norm(differences):
        return np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in differences))

    update = norm(want[path] - want[path.replace(".params", "start", 1)] for path in paths)
    assert norm(state[path] - want[path] for path in paths) <= 1e-3 * update
    for row, values in expected.metrics.items():
        assert found.metrics[row]["P@5"] == pytest.approx(values["P@5"], abs=0.01)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.scale)])
def several(request, small, tmp_path_factory):
    return train(request.param, small, tmp_path_factory.mktemp("several"), "several")


def test_processes_build_the_same_global_batches(alone, several):
    (whole,), parts = alone.batches, several.batches
    rows = np.concatenate([part["rows"] for part in parts])
    np.testing.assert_array_equal(np.sort(rows), whole["rows"])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    for name, array in whole.items():
        assert len(parts[0][name]) < len(array), name
    # Labels are dealt to the devices, so where they lie depends on how many devices there are.
    by_sample = [
        {
            name: array[batch[f"{name[0]}/.columns"]] if name.endswith(".label_ids") else array
            for name, array in batch.items()
            if name != "rows" and not name.endswith(".columns") and ".items." not in name
        }
        for batch in (joined, whole)
    ]
    for name, array in by_sample[1].items():
        np.testing.assert_array_equal(by_sample[0][name], array, err_msg=name)
    for number in {name[0] for name in by_sample[1]}:
        assert texts(joined, number) == texts(whole, number)


def texts(batch: dict[str, np.ndarray], number: str) -> list[list[int]]:
    """The tokens of all items of a batch, sorted."""
    tokens, segments = (batch[f"{number}/.items.{name}"] for name in ("tokens", "segments"))
    return sorted(
        row[segment == item].tolist()
        for row, segment in zip(tokens, segments)
        for item in range(segment.max() + 1)
    )


def test_processes_train_as_one_does(alone, several):
    assert_same_run(several, alone)


@pytest.mark.scale
def test_a_mesh_may_span_processes(small, alone, tmp_path):
    """Parameters split over processes, and a tensor axis across them."""
    fields = copy.deepcopy(small)
    fields["mesh"] = {"data": 1, "fsdp": 2, "tensor": 2}
    assert_same_run(train(2, fields, tmp_path, "mesh", devices=2), alone)


@pytest.mark.scale
def test_checkpoints_of_four_are_read_by_one_and_two(small, alone, tmp_path):
    clustered = copy.deepcopy(small)
    clustered["curriculum"]["start"] = 0
    first = copy.deepcopy(clustered)
    first["train"]["epochs"] = 1  # its end makes the leaves that order the second
    workdir = tmp_path / "run"
    train(4, first, tmp_path, "four", workdir)
    kept = {}
    for count in (1, 2):
        copied = tmp_path / f"copy{count}"
        shutil.copytree(workdir, copied)
        kept[count] = train(count, clustered, tmp_path, f"of{count}", copied)
    assert_same_run(kept[2], kept[1])
    assert kept[1].records.keys() == alone.records.keys()
