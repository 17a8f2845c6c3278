"""Every kind of damage to the newest checkpoint, at length: none is read, none is a traceback."""

import copy
import json
import pathlib
import shutil

import damage
import numpy as np
import processes
import pytest

from xmc_jax.training import checkpoint

pytestmark = pytest.mark.reliability
FLIPS = 300


@pytest.fixture(scope="module")
def short(fields) -> dict:
    """A run of two epochs of five steps."""
    short = copy.deepcopy(fields)
    short["train"] |= {"epochs": 2, "eval_every": 0, "zero_shot": False, "checkpoint_every": 3}
    return short


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory) -> pathlib.Path:
    """The workdir of such a run, by the command."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    processes.command(1, processes.config(short, workdir.parent), f"--workdir={workdir}")
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of it to damage."""
    return shutil.copytree(trained, tmp_path / "run")


BEFORE, NEWEST = 3, 4  # saved steps; the newest is damaged


def restored(workdir: pathlib.Path, caplog) -> int:
    """The step that is restored, bit for bit as it was saved; a warning names a damaged one."""
    step = damage.newest(workdir)
    assert len(damage.said(caplog)) == (step == BEFORE)
    return step


def test_flipped_bits(tmp_path, caplog):
    damage.save(tmp_path, 1, 2, BEFORE, NEWEST)
    folder, generator = tmp_path / "checkpoints" / str(NEWEST), np.random.default_rng(0)
    names, hit = damage.files(folder), set()
    for _ in range(FLIPS):
        name = names[generator.integers(len(names))]
        path = folder / name
        bit = int(generator.integers(8 * path.stat().st_size))
        damage.flip(path, bit)
        assert restored(tmp_path, caplog) == BEFORE, (path, bit)
        damage.flip(path, bit)
        hit.add(name)
    assert restored(tmp_path, caplog) == NEWEST and hit == set(names)


@pytest.mark.parametrize(
    "hurt", [damage.truncate, damage.empty, pathlib.Path.unlink], ids=["cut", "empty", "gone"]
)
def test_every_file(tmp_path, caplog, hurt):
    damage.save(tmp_path, 1, 2, BEFORE, NEWEST)
    folder = tmp_path / "checkpoints" / str(NEWEST)
    for name in damage.files(folder):
        original = (folder / name).read_bytes()
        hurt(folder / name)
        # Without these two, the other digests still prove the arrays.
        harmless = hurt is pathlib.Path.unlink and name.name in (
            "committed.json",
            "evaluation.json",
        )
        assert restored(tmp_path, caplog) == (NEWEST if harmless else BEFORE), name
        (folder / name).write_bytes(original)


def test_stray_folders(tmp_path, caplog):
    damage.save(tmp_path, 1, 2, BEFORE, NEWEST)
    root = tmp_path / "checkpoints"
    for name in ("99", "98/state/d", "007", "12.damaged", "latest", "a b", "-1", "1e3", "97.tmp"):
        (root / name).mkdir(parents=True)
        assert restored(tmp_path, caplog) == NEWEST, name
    for name in ("50", "51.json", "digests.json"):
        (root / name).write_text("a file")
        assert restored(tmp_path, caplog) == NEWEST, name
    (root / "60").mkdir()
    (root / "60" / "file").write_text("in a folder")
    assert damage.newest(tmp_path) == NEWEST


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_the_command_goes_on(mode, short, trained, workdir, tmp_path):
    """Training ends with the bits of the run that was not damaged; evaluation is of its step."""
    step = workdir / "checkpoints" / "10"
    damage.flip(sorted((step / "state/ocdbt.process_0/d").iterdir())[0], 100)
    before = damage.contents(workdir / "checkpoints")
    flags = (processes.config(short, tmp_path), f"--mode={mode}", f"--workdir={workdir}")
    (done,) = processes.command(1, *flags)
    skipped = [line for line in done.stderr.splitlines() if f"checkpoint {step}: " in line]
    assert len(skipped) == 1 and "Traceback" not in done.stderr
    if mode == "evaluate":
        assert damage.contents(workdir / "checkpoints") == before
    else:
        assert (workdir / "checkpoints" / "10.damaged").exists()
        assert content(workdir, 10) == content(trained, 10)
    (refused,) = processes.command(
        1, *(flags[0], "--mode=evaluate", "--step=10.damaged", flags[2]), check=False
    )
    assert refused.returncode == 1 and refused.error()


def content(workdir: pathlib.Path, step: int) -> list[tuple[str, bytes]]:
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        return [(name, array.tobytes()) for name, array in checkpoints.arrays(step)]


def test_the_command_refuses(short, workdir, tmp_path):
    """A damaged step that is named, none that is whole, and files that cannot grow."""
    flags = (processes.config(short, tmp_path), f"--workdir={workdir}")
    root = workdir / "checkpoints"
    damage.truncate(root / "10" / "history" / "metadata")
    (done,) = processes.command(1, *flags, "--mode=evaluate", "--step=10", check=False)
    assert done.returncode == 1 and "/10: expected a whole one" in done.error()
    for step in root.iterdir():
        damage.empty(step / "state" / "manifest.ocdbt")
    before = damage.contents(root)
    for mode in ("train", "evaluate"):
        (done,) = processes.command(1, *flags, f"--mode={mode}", check=False)
        assert done.returncode == 1 and "expected a checkpoint that is whole" in done.stderr
        assert done.error()
    assert damage.contents(root) == before


REFUSED = """
import resource, sys
sys.path.insert(0, "tests")
import failing_calls
from xmc_jax import main
from xmc_jax.training import proof

how = sys.argv.pop(1)
if how == "limit":  # of a file's size
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
else:  # from the second checkpoint on
    write, calls = proof.write, []
    def failing(folder, step):
        calls.append(step)
        if len(calls) == 2:
            failing_calls.fail(how)
        write(folder, step)
    proof.write = failing
sys.argv[0] = "main"
main.run()
"""


@pytest.mark.parametrize("how, left", [("limit", None), ("fsync", 5), ("rename", 3)])
def test_the_command_cannot_write(short, trained, tmp_path, how, left):
    """A write that fails in the background ends the run with one line; what was whole is.

    Programs are compiled, by the run that nothing disturbed: they are larger than the limit.
    """
    workdir = tmp_path / "run"
    flags = (processes.config(short, tmp_path), f"--workdir={workdir}")
    with processes.started(1, ["-c", REFUSED, how, *flags]) as group:
        (done,) = group.wait(300)
    assert done.returncode == 1 and "could not be written" in done.error()
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest() == left
    processes.command(1, *flags)
    assert content(workdir, 10) == content(trained, 10)


_CHOOSE = """
sys.path.insert(0, "tests")
import damage
from xmc_jax.training import checkpoint
workdir = sys.argv[1]
mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
for read_only in (True, False):
    with checkpoint.Checkpoints(workdir, read_only=read_only) as checkpoints:
        step = checkpoints.latest()
        damage.assert_restored(checkpoints, step, everywhere)
        print(json.dumps([step, [x.reason for x in checkpoints._findings.values() if x.reason]]))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_processes_choose_the_same(count, tmp_path):
    """Each reads a share of the files: one of them alone sees the damage."""
    damage.save(tmp_path, 1, 2)
    step = tmp_path / "checkpoints" / "2"
    proven = [name for name in damage.files(step) if name.parts[0] in ("state", "history")]
    chosen = proven[:: len(proven) // 3]
    for name in chosen:
        original = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{name.name}")
        damage.flip(original / "checkpoints" / "2" / name, 9)
        done = processes.script(count, _CHOOSE, str(original))
        lines = [one.stdout.splitlines()[-2:] for one in done]  # Gloo says something before
        assert all(line == lines[0] for line in lines)
        for line in lines[0]:
            found, reasons = json.loads(line)
            assert found == 1 and len(reasons) == 1 and str(name) in reasons[0]
        assert (original / "checkpoints" / "2.damaged").exists()
