"""Workdirs on gs://, through the real clients, of a store that can neither append nor rename."""

import copy
import importlib.util
import io
import json
import os
import pathlib
import re
import signal
import socket
import struct
import subprocess
import sys

import gcs_server
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import processes
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from xmc_jax.config import MeshConfig, ScannConfig
from xmc_jax.data import rows
from xmc_jax.data.types import NO_PROMPTS, Inputs
from xmc_jax.files import workdirs
from xmc_jax.models import bert, hf_export, hf_tensors
from xmc_jax.retrieval import encode, evaluate, saved_predictions
from xmc_jax.retrieval.scann import ScannIndex
from xmc_jax.runtime import metrics_log, sharding
from xmc_jax.shipping import replacing
from xmc_jax.training import checkpoint

if importlib.util.find_spec("gcsfs") is None:  # the environment comes before its import
    pytest.skip("gcsfs is not installed", allow_module_level=True)

ROOT = pathlib.Path(__file__).parents[1]
NO_HISTORY = {"records": [], "pending": []}


@pytest.fixture(scope="module")
def server():
    with gcs_server.Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def workdir(server, request):
    """A remote workdir of this test; nothing that was refused may have been tried."""
    yield epath.Path(f"gs://{gcs_server.BUCKET}/{request.node.originalname}")
    assert server.refused == []


def state(seed: int, shape=(64, 8)) -> dict[str, jax.Array]:
    generator = np.random.default_rng(seed)
    return {"step": jnp.int32(seed), "bank": jnp.asarray(generator.standard_normal(shape), "f4")}


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(folder, evaluated: dict[int, float | None]) -> None:
    with checkpoint.Checkpoints(folder) as checkpoints:
        for step, precision in evaluated.items():
            history = NO_HISTORY | {"records": [{"step": step}]}
            checkpoints.save(step, state(step), history)
            if precision is not None:
                checkpoints.add_evaluation(step, {"P@1": precision}, history)


def objects(server, folder: epath.Path) -> list[str]:
    prefix = f"{folder.parts[-1]}/"
    return [name.removeprefix(prefix) for name in server.names(prefix)]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "remote"])
def test_the_latest_and_the_best_checkpoint_outlive_a_restart(where, workdir, server, tmp_path):
    folder = tmp_path if where == "local" else workdir
    save(folder, {1: 0.5, 2: 0.9, 3: None})
    save(folder, {4: 0.7, 5: None})
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([2, 4, 5], 2, 5)
        restored, history = checkpoints.restore(2, abstract(state(2)))
    np.testing.assert_array_equal(restored["bank"], state(2)["bank"])
    assert history["records"] == [{"step": 2}]
    if where == "remote":
        assert {name.split("/")[1] for name in objects(server, workdir)} == {"2", "4", "5"}
        assert not (ROOT / "gs:").exists() and not pathlib.Path("gs:").exists()


def test_no_checkpoint_is_best_where_none_was_evaluated(tmp_path):
    save(tmp_path, {1: None, 2: None})
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.best() is None and checkpoints.latest() == 2


def test_a_checkpoint_is_there_once_its_commit_file_is(workdir, server):
    save(workdir, {1: None, 2: None})
    prefix = f"{workdir.name}/checkpoints/2/"
    written = [name for name in server.written if name.startswith(prefix)]
    digests, commit = (
        written.index(prefix + name) for name in ("digests.json", "commit_success.txt")
    )
    assert digests < commit and written[commit + 1 :] == [f"{prefix}committed.json"]
    del server.objects[f"{prefix}commit_success.txt"]  # as if killed just before
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state(7), NO_HISTORY)
        checkpoints.save(2, state(8), NO_HISTORY)  # replaces it
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(2, abstract(state(8)))
    np.testing.assert_array_equal(restored["bank"], state(8)["bank"])


def test_a_damaged_object_is_noticed_and_cleared_away(workdir, server):
    save(workdir, {1: 0.5, 2: None})
    data = next(name for name in server.names(f"{workdir.name}/checkpoints/2/state/d/"))
    server.objects[data] = server.objects[data]._replace(data=server.objects[data].data[:-1] + b"?")
    before = server.names(f"{workdir.name}/")
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (1, 1)
        assert "state/d/" in checkpoints.finding(2).reason
    assert server.names(f"{workdir.name}/") == before
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state(8), NO_HISTORY)
    assert data not in server.names(f"{workdir.name}/")
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == 2
        restored, _ = checkpoints.restore(2, abstract(state(8)))
    np.testing.assert_array_equal(restored["bank"], state(8)["bank"])


def test_a_workdir_goes_on_where_it_was_copied_to(workdir, server, tmp_path):
    save(workdir, {1: 0.5})
    for name in objects(server, workdir):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((workdir / name).read_bytes())
    save(tmp_path, {2: None})
    back = workdir.parent / f"{workdir.name}-back"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            (back / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
    for folder in (tmp_path, back):
        with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
            assert (checkpoints.steps(), checkpoints.best()) == ([1, 2], 1)
            for step in (1, 2):
                restored, _ = checkpoints.restore(step, abstract(state(step)))
                np.testing.assert_array_equal(restored["bank"], state(step)["bank"])


def test_a_config_counts_from_the_first_committed_checkpoint_on(workdir, server):
    workdirs.write_config(workdir, {"name": "first"})
    workdirs.check_config(workdir, {"name": "second"})
    save(workdir, {1: None})
    with pytest.raises(ValueError, match=r"name: 'first' there, 'second' here"):
        workdirs.check_config(workdir, {"name": "second"})
    workdirs.check_config(workdir, {"name": "first"})
    del server.objects[f"{workdir.name}/checkpoints/1/commit_success.txt"]
    workdirs.check_config(workdir, {"name": "second"})


@pytest.mark.parametrize(
    "folder, expected",
    [("s3://bucket/run", "a folder or gs://"), ("gs://bucket/run[1]", "a name without any of")],
)
def test_where_checkpoints_cannot_be_is_refused(folder, expected):
    with pytest.raises(ValueError, match=f"^{re.escape(folder)}: expected {expected}"):
        checkpoint.Checkpoints(folder)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^gs://bucket/run: .*pip install 'xmc_jax\[gcs\]'"):
        workdirs.check_config("gs://bucket/run", {})


def events(data: bytes) -> list[tuple[str, int, float]]:
    """(name, step, value) of the scalars in a TensorBoard file; a torn last record is left out."""
    found, file = [], io.BytesIO(data)
    while len(header := file.read(12)) == 12:
        record = file.read(struct.unpack("<Q", header[:8])[0])
        if len(file.read(4)) == 4:
            event = event_pb2.Event.FromString(record)
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def test_metrics_and_events_are_written_whole_each_time(workdir, server, monkeypatch):
    monkeypatch.setattr(metrics_log, "_FLUSH_SECONDS", -1)  # at every record
    versions: dict[str, list[bytes]] = {}

    def keep(name):
        if name in server.objects:
            versions.setdefault(name, []).append(server.objects[name].data)

    monkeypatch.setattr(server, "before_write", keep)
    clock = metrics_log.Clock()
    with metrics_log.Reporter(workdir, 1, 2, 4, clock) as reporter, clock.within("step"):
        for loss in (4.0, 3.0, 2.0):
            reporter.step({"loss": jnp.float32(loss), "violators": jnp.float32(0)}, 8)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 4), (2, 3), (3, 2)]
    (name,) = (n for n in objects(server, workdir) if n.startswith("tensorboard/events"))
    found = events((workdir / name).read_bytes())
    assert [(step, value) for tag, step, value in found if tag == "train/loss"] == [
        (1, 4),
        (2, 3),
        (3, 2),
    ]
    for written in (f"{workdir.name}/metrics.jsonl", f"{workdir.name}/{name}"):
        whole = server.objects[written].data
        assert len(versions[written]) >= 3
        assert all(whole.startswith(version) for version in versions[written])


class Texts:
    def __len__(self):
        return 5

    def own_tokens(self, ids, prompts):
        return np.full(len(ids), 2)

    def inputs(self, ids):
        return Inputs(np.stack([ids, ids], 1).astype(np.int32), np.full(len(ids), 2, np.int32))


def test_results_arrive_whole(workdir):
    """metrics.json, predictions, embeddings, an index and an export, over what was there."""
    found = evaluate.Evaluation(
        metrics={"plain": {"P@1": 0.5}},
        scores={"plain": np.ones((3, 2), np.float32)},
        ids={"plain": np.arange(6, dtype=np.int32).reshape(3, 2)},
        index={},
    )
    for _ in range(2):
        evaluate.write(found, workdir / "metrics.json", workdir / "predictions" / "1.npz")
    assert json.loads((workdir / "metrics.json").read_text()) == {"plain": {"P@1": 0.5}}
    predictions = np.load(io.BytesIO((workdir / "predictions" / "1.npz").read_bytes()))
    np.testing.assert_array_equal(predictions["plain_ids"], found.ids["plain"])
    read = saved_predictions.read(workdir / "predictions" / "1.npz", np.array([0, 2]), 3)
    np.testing.assert_array_equal(read["plain"].ids, found.ids["plain"][[0, 2]])

    out = workdir / "embeddings" / "1" / "test.npy"
    out.parent.mkdir(parents=True, exist_ok=True)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    layout = rows.layout(NO_PROMPTS, "image_text", "contiguous", 2, 0, None)
    items = encode.Items(Texts(), 2, one, layout)
    encode.to_file(jax.jit(lambda rows, ids: rows.tokens[rows.slots] * 1.5), items, out)
    written = np.load(io.BytesIO(out.read_bytes()))
    np.testing.assert_array_equal(written, 1.5 * np.arange(5)[:, None].repeat(2, 1))

    sizes = bert.BertConfig(hidden=8, layers=1, heads=2, ff=16, max_positions=8, vocab_size=16)
    params = {
        path: jnp.full(parameter.shape, 0.5, jnp.float32)
        for path, parameter in hf_tensors.layout(sizes).items()
    }
    for _ in range(2):
        hf_export.merged(workdir / "export", params, sizes, pooling="mean", max_length=8)
    names = {path.name for path in (workdir / "export").iterdir()}
    assert names >= {"model.safetensors", "config.json", "modules.json", "1_Pooling"}
    content = hf_export.safetensors.numpy.load((workdir / "export/model.safetensors").read_bytes())
    assert all((tensor == 0.5).all() for tensor in content.values())


def test_an_export_is_replaced_and_is_one_when_all_of_it_is_there(workdir, server):
    target = workdir / "export"
    for number in range(2):
        with replacing.replaced(target, replacing.RECORD, overwrite=False) as folder:
            (folder / f"model-{number}.safetensors").write_text(str(number))
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text("{}")
            replacing.record(folder)
        written = [name.partition("/export/")[2] for name in server.written if "/export/" in name]
        assert written[-1] == replacing.RECORD
        names = ["1_Pooling/config.json", replacing.RECORD, f"model-{number}.safetensors"]
        assert objects(server, workdir) == [f"export/{name}" for name in names]
    (target / "LICENSE.md").write_text("of people")
    refused = pytest.raises(ValueError, match=r"files of other origin: LICENSE\.md; move")
    with refused, replacing.replaced(target, replacing.RECORD, overwrite=False):
        pass


@pytest.mark.slow
def test_an_index_is_saved_and_loaded(workdir, server):
    pytest.importorskip("scann")
    database = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    index = ScannIndex.build(database, ScannConfig(brute_force_below=1, leaves=20))
    for _ in range(2):
        index.save(workdir / "index")
    written = [name for name in server.written if name.startswith(f"{workdir.name}/")]
    assert written[-1].endswith("/index.json")
    loaded = ScannIndex.load(workdir / "index", database)
    np.testing.assert_array_equal(
        loaded.search(database[:5], 3)[1], index.search(database[:5], 3)[1]
    )
    damaged = next(name for name in server.names(f"{workdir.name}/index/") if "dataset" in name)
    data = server.objects[damaged].data
    server.objects[damaged] = gcs_server.Object(data[:-1] + bytes([data[-1] ^ 1]), 1)
    with pytest.raises(ValueError, match=r"expected sha256 [0-9a-f]{64}, got another"):
        ScannIndex.load(workdir / "index", database)


def test_a_large_file_goes_in_parts_and_arrives_whole(workdir, tmp_path):
    """Past a few MB clients upload in parts, which become an object only all together."""
    data = np.random.default_rng(0).bytes(6 << 20)
    (tmp_path / "large").write_bytes(data)
    epath.Path(tmp_path / "large").copy(workdir / "large", overwrite=True)
    assert (workdir / "large").read_bytes() == data


CHILD = """
import os, sys
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
address, index, folder, other = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, index)
import numpy as np
from xmc_jax.training import checkpoint
from xmc_jax.runtime import metrics_log
from xmc_jax.runtime import sharding
from xmc_jax.files import workdirs
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
def put(array, *axes):
    array = np.asarray(array)
    sharding = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])
def state(seed):
    generator = np.random.default_rng(seed)
    return {
        "split": put(generator.standard_normal((256, 4096), np.float32), "data", "tensor"),
        "columns": put(generator.standard_normal((8, 64), np.float32), None, ("data", "tensor")),
        "whole": put(generator.integers(0, 99, 100, np.int32)),
    }
# Each process has a folder of its own for reports: nothing may come into the second one's.
def reporter():
    return metrics_log.Reporter((folder, other)[index], 2, 4, 8, metrics_log.Clock())
def history(reporter):
    with reporter.clock.within("step"):
        reporter.step({"loss": put(np.float32(2.5)), "violators": put(np.float32(0))}, 8)
    return reporter.history()
config = {"seed": 0}
workdirs.check_config(folder, config)
workdirs.write_config(folder, config)
with checkpoint.Checkpoints(folder) as checkpoints, reporter() as reports:
    checkpoints.save(1, state(1), history(reports))
    checkpoints.add_evaluation(1, {"P@1": 0.9}, reports.history())
    checkpoints.save(2, state(2), history(reports))
workdirs.check_config(folder, config)  # lists what is there, as a resumed run does
with checkpoint.Checkpoints(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2], checkpoints.steps()
    empty = {"records": [], "pending": []}
    for step, seed, precision in ((3, 3, 0.1), (4, 4, 0.2), (4, 5, 0.2)):  # the last replaces one
        checkpoints.save(step, state(seed), empty)
        checkpoints.add_evaluation(step, {"P@1": precision}, empty)
with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 3, 4], 1)
    expected = state(5)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in expected.items()
    }
    restored, _ = checkpoints.restore(4, abstract)
    for name, array in expected.items():
        for ours, theirs in zip(restored[name].addressable_shards, array.addressable_shards):
            np.testing.assert_array_equal(ours.data, theirs.data)
print("done", index)
"""


@pytest.mark.scale
def test_two_processes_write_what_one_process_reads(workdir, server):
    other = workdir.parent / f"{workdir.name}-other"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": processes.xla_flags(2),
        "PYTHONPATH": str(ROOT),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(index), str(workdir), str(other)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        for index, child in enumerate(children):
            out, errors = child.communicate(timeout=240)
            assert child.returncode == 0, errors[-4000:]
            assert f"done {index}" in out
    finally:
        for child in children:
            child.kill()
    # Hashed before each of two commits, compared with that by both together, and restored: each of
    # the two the half of `split` that its devices hold, and no more.
    split, prefix = 256 * 4096 * 4, f"{workdir.name}/checkpoints/4/state/"
    read = sum(size for name, size in server.read.items() if name.startswith(prefix))
    assert read < 4.25 * split
    assert not server.names(f"{other.name}/")
    assert len([n for n in objects(server, workdir) if n.startswith("tensorboard/")]) == 1
    assert {n.split("/")[1] for n in objects(server, workdir) if n.startswith("checkpoints")} == {
        "1",
        "3",
        "4",
    }
    generator = np.random.default_rng(5)
    expected = {
        "split": generator.standard_normal((256, 4096), np.float32),
        "columns": generator.standard_normal((8, 64), np.float32),
        "whole": generator.integers(0, 99, 100, np.int32),
    }
    for count in (1, 4):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), "x")
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        wanted = abstract(expected, sharding)
        columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        wanted["split"] = wanted["split"].update(sharding=columns)
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            restored, _ = checkpoints.restore(4, wanted)
            _, first = checkpoints.restore(1, wanted)
        for name, array in expected.items():
            np.testing.assert_array_equal(restored[name], array)
        assert first["pending"] == [{"loss": 2.5, "violators": 0.0}]


MODES = """
import sys
from xmc_jax import main
_, modes, *flags = sys.argv
for mode in modes.split(","):
    sys.argv = ["main", f"--mode={mode}", *flags]
    try:
        main.run()
    except SystemExit as end:
        assert not end.code, mode
"""


def start(*arguments: str) -> subprocess.Popen:
    """On one device, which compiles fastest."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": processes.xla_flags()},
    )


def command(*arguments: str) -> None:
    child = start(*arguments)
    errors = child.communicate()[1]
    assert child.returncode == 0, errors[-3000:]


def lines(path: epath.Path) -> list[dict]:
    """metrics.jsonl without the times."""
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.reliability
@pytest.mark.slow
def test_a_run_on_gs_is_the_local_run(fields, workdir, server, monkeypatch, tmp_path):
    """Interrupted, killed before a commit, resumed, evaluated, embedded, indexed, exported."""
    fields = copy.deepcopy(fields)
    fields["train"]["epochs"] = 2
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    config, main = f"--config={tmp_path / 'config.py'}", ("-m", "xmc_jax.main")
    local = epath.Path(tmp_path / "run")
    command(*main, config, f"--workdir={local}")

    def interrupted(number: int, when: str) -> int:
        """The exit code of a run that gets a signal while it writes an object of that name."""
        child, sent = start(*main, config, f"--workdir={workdir}"), []

        def kill(name):
            if name == f"{workdir.name}/{when}" and not sent:
                sent.append(name)
                child.send_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(server, "before_write", kill)
            errors = child.communicate()[1]
        assert sent, errors[-3000:]
        return child.returncode

    assert interrupted(signal.SIGTERM, "checkpoints/2/commit_success.txt") == 128 + signal.SIGTERM
    assert interrupted(signal.SIGKILL, "checkpoints/8/commit_success.txt") == -signal.SIGKILL
    command(*main, config, f"--workdir={workdir}")
    modes = ("-c", MODES, "evaluate,embed,index,export")
    # JAX joins a cluster once per process.
    command(*modes, config, "--distributed=off", f"--workdir={workdir}")
    assert lines(workdir / "metrics.jsonl") == lines(local / "metrics.jsonl")
    for name in ("config.json", "metrics.json"):
        assert (workdir / name).read_text() == (local / name).read_text()
    ours, theirs = ({}, {})
    for folder, arrays in ((workdir, ours), (local, theirs)):
        for name, row in (("0.npz", "zero-shot "), ("10.npz", "")):
            kept = np.load(io.BytesIO((folder / "predictions" / name).read_bytes()))
            arrays |= {f"{row}{key}": kept[key] for key in kept}
        with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
            arrays["kept"] = np.array([*checkpoints.steps(), checkpoints.best()])
        saved = ocp.StandardCheckpointer().restore(
            epath.Path(folder) / "checkpoints" / "10" / "state"
        )
        arrays |= {f"state/{name}": np.asarray(array) for name, array in saved.items()}
    assert len(ours) > 20
    np.testing.assert_equal(ours, theirs)

    evaluated = json.loads((workdir / "evaluate" / "metrics.json").read_text())["plain"]
    assert evaluated == json.loads((local / "metrics.json").read_text())["plain"]
    test, labels = (
        np.load(io.BytesIO((workdir / f"embeddings/10/{split}.npy").read_bytes()))
        for split in ("test", "label")
    )
    nearest = (test @ labels.T).argmax(1)
    assert (nearest == ours["plain_ids"][:, 0]).mean() > 0.9  # but for what the filter takes
    assert ScannIndex.load(workdir / "index/10", labels).count == len(labels)
    exported = {path.name for path in (workdir / "export").iterdir()}
    assert exported >= {"model.safetensors", "config.json", "tokenizer.json", "modules.json"}
    # One file of events for each start that came to train.
    assert sum(name.startswith("tensorboard/") for name in objects(server, workdir)) == 3
