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


class Judge:
    """Restores what is there, and counts what comes.

    Attributes:
        newest: the step that is to be damaged.
        before: the one before.
    """

    before, newest = 3, 4

    def __init__(self, workdir: pathlib.Path):
        damage.save(workdir, 1, 2, 3, 4)
        self._workdir = workdir
        self.counts = {"tried": 0, "noticed": 0, "step_before": 0, "newest": 0, "silent": 0}

    def restores(self, caplog) -> int | None:
        """The step that is restored, None if its state is not the one saved, bit for bit."""
        self.counts["tried"] += 1
        try:
            step = damage.newest(self._workdir)
        except AssertionError:
            self.counts["silent"] += 1
            return None
        self.counts["noticed"] += len(damage.said(caplog)) == 1
        self.counts["step_before"] += step == self.before
        self.counts["newest"] += step == self.newest
        return step


def test_flipped_bits(tmp_path, caplog, figures):
    judge, generator = Judge(tmp_path), np.random.default_rng(0)
    folder = tmp_path / "checkpoints" / str(judge.newest)
    names, hit = damage.files(folder), set()
    for _ in range(FLIPS):
        name = names[generator.integers(len(names))]
        path = folder / name
        bit = int(generator.integers(8 * path.stat().st_size))
        damage.flip(path, bit)
        assert judge.restores(caplog) == judge.before, (path, bit)
        damage.flip(path, bit)
        hit.add(name)
    assert judge.restores(caplog) == judge.newest and hit == set(names)
    expected = {"tried": FLIPS + 1, "noticed": FLIPS, "step_before": FLIPS, "newest": 1}
    assert judge.counts == expected | {"silent": 0}
    figures(**judge.counts, files=len(names))


@pytest.mark.parametrize("kind", ["truncated", "emptied", "deleted"])
def test_every_file(tmp_path, caplog, figures, kind):
    hurt = {"truncated": damage.truncate, "emptied": damage.empty, "deleted": pathlib.Path.unlink}
    judge = Judge(tmp_path)
    folder = tmp_path / "checkpoints" / str(judge.newest)
    names = damage.files(folder)
    for name in names:
        original = (folder / name).read_bytes()
        hurt[kind](folder / name)
        # Without these two, the other digests still prove the arrays.
        harmless = kind == "deleted" and name.name in ("committed.json", "evaluation.json")
        assert judge.restores(caplog) == (judge.newest if harmless else judge.before), name
        (folder / name).write_bytes(original)
    harmless = 2 * (kind == "deleted")
    assert judge.counts == {
        "tried": len(names),
        "noticed": len(names) - harmless,
        "step_before": len(names) - harmless,
        "newest": harmless,
        "silent": 0,
    }
    figures(**judge.counts, files=len(names))


def test_stray_folders(tmp_path, caplog, figures):
    judge = Judge(tmp_path)
    root = tmp_path / "checkpoints"
    strays = ["99", "98/state/d", "007", "12.damaged", "latest", "a b", "-1", "1e3", "97.tmp"]
    for name in strays:
        (root / name).mkdir(parents=True)
        assert judge.restores(caplog) == judge.newest, name
    for name in ("50", "51.json", "digests.json"):
        (root / name).write_text("a file")
        assert judge.restores(caplog) == judge.newest, name
    (root / "60").mkdir()
    (root / "60" / "file").write_text("in a folder")
    assert judge.restores(caplog) == judge.newest
    counts = judge.counts
    assert counts["tried"] == counts["newest"] == len(strays) + 4 and counts["silent"] == 0
    figures(**counts)


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
        print(json.dumps([step, [x.reason for x in checkpoints._found.values() if x.reason]]))
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
