"""A checkpoint that is not as it was written is never read; a full disk leaves the others whole."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import damage
import failing_calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_checkpoint

from xmc_jax.files import digests, workdirs
from xmc_jax.training import checkpoint, loop, proof, verify

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A workdir with checkpoints of the steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("made")
    damage.save(workdir, 1, 2)
    return workdir


@pytest.fixture
def workdir(made, tmp_path) -> pathlib.Path:
    """A copy of it to damage."""
    return shutil.copytree(made, tmp_path / "run")


def find(step: pathlib.Path, pattern: str) -> pathlib.Path:
    return sorted(step.glob(pattern))[0]


def bits(seed: int, count: int, step: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Random bits of random files: each file is as likely as any other."""
    generator, names = np.random.default_rng(seed), damage.files(step)
    chosen = [names[i] for i in generator.integers(len(names), size=count)]
    return [(name, int(generator.integers(8 * (step / name).stat().st_size))) for name in chosen]


def test_a_flipped_bit_anywhere_is_noticed(workdir, caplog):
    step = workdir / "checkpoints" / "2"
    tried = [(find(step, pattern).relative_to(step), 37) for pattern in KINDS]
    for name, bit in tried + bits(0, 10, step):
        damage.flip(step / name, bit)
        assert damage.newest(workdir) == 1, (name, bit)
        (line,) = damage.said(caplog)
        assert line.startswith(f"checkpoint {step}: skipped: ") and name.name in line
        damage.flip(step / name, bit)
    assert damage.newest(workdir) == 2 and damage.said(caplog) == []


# A file of each kind: what Orbax says of the step, its data, and what proves them.
KINDS = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "state/ocdbt.process_0/d/*",
    "state/d/*",
    "state/manifest.ocdbt",
    "evaluation.json",
    "history/metadata",
    "digests.json",
    "committed.json",
)


@pytest.mark.parametrize("pattern", KINDS)
def test_the_step_before_is_gone_on_from(workdir, caplog, pattern):
    """Truncated, emptied or deleted; read-only modes change nothing, a run replaces the step."""
    step, path = workdir / "checkpoints" / "2", find(workdir / "checkpoints" / "2", pattern)
    original = path.read_bytes()
    # As after a kill just behind the commit, or in the evaluation.
    harmless = pattern in ("committed.json", "evaluation.json")
    for hurt in (damage.truncate, damage.empty, pathlib.Path.unlink):
        hurt(path)
        before = damage.contents(workdir)
        deleted = hurt is pathlib.Path.unlink
        assert damage.newest(workdir) == (2 if harmless and deleted else 1)
        assert damage.contents(workdir) == before
        expected = [] if harmless and deleted else [rf"{step}: skipped: .*{path.name}.*expected"]
        for line, wanted in zip(damage.said(caplog), expected, strict=True):
            assert re.search(wanted, line)
        path.write_bytes(original)
    damage.truncate(path)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([1], 1, 1)
        assert f"{step}: skipped: " in damage.said(caplog)[0]
        damage.assert_restored(checkpoints, 1)
        checkpoints.save(2, damage.state(2), damage.HISTORY)
        checkpoints.save(3, damage.state(3), damage.HISTORY)
        assert checkpoints.steps() == [1, 2, 3]  # 1 has the best P@1; the damaged is not of the two
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"1", "2", "3", "2.damaged"}
    assert damage.newest(workdir) == 3 and damage.said(caplog) == []


@pytest.mark.parametrize("name", ["digests.json", "committed.json", "history/metadata"])
def test_a_pipe_is_not_waited_for(workdir, caplog, name):
    path = workdir / "checkpoints" / "2" / name
    path.unlink()
    os.mkfifo(path)
    assert damage.newest(workdir) == 1
    (line,) = damage.said(caplog)
    assert "/2: skipped: " in line and path.name in line


def test_a_damaged_step_that_is_asked_for_is_an_error(workdir):
    damage.truncate(find(workdir / "checkpoints" / "2", "state/d/*"))
    with (
        pytest.raises(ValueError, match=r"/2: expected a whole one, found damaged: state/d/") as no,
        checkpoint.Checkpoints(workdir, read_only=True) as checkpoints,
    ):
        checkpoints.restore(2, damage.abstract(damage.state(2)))
    assert "\n" not in str(no.value)
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.best() == 1  # 2 had the higher P@1
    assert loop.find(workdir) == loop.find(workdir, "best") == 1  # by sizes alone


def test_none_is_whole(workdir):
    for step in "12":
        damage.empty(workdir / "checkpoints" / step / "state" / "_METADATA")
    before = damage.contents(workdir)
    expected = r"expected a checkpoint that is whole, found none among \[1, 2\] .*_METADATA"
    with pytest.raises(ValueError, match=expected):
        damage.newest(workdir, read_only=False)
    with pytest.raises(ValueError, match=expected):
        damage.newest(workdir)
    assert damage.contents(workdir) == before


def test_what_is_no_checkpoint_is_not_taken_for_one(workdir, caplog):
    folder = workdir / "checkpoints"
    for name in (
        "30",
        "31/state/d",
        "007",
        "-3",
        "5.damaged",
        "best",
        "odd name",
        "\N{BLACK STAR}",
    ):
        (folder / name).mkdir(parents=True)
    for name in ("77", "8.partial", ".hidden"):
        (folder / name).write_text("a file")
    (folder / "2" / "state" / "notes.txt").write_text("a file more")
    assert workdirs.steps(workdir) == [1, 2]
    assert damage.newest(workdir) == 2 and damage.said(caplog) == []
    assert damage.newest(workdir, read_only=False) == 2
    assert [line.split(": ")[0] for line in damage.said(caplog)] == [
        str(folder / "30"),
        str(folder / "31"),
    ]
    shutil.rmtree(folder)
    (folder / "9").mkdir(parents=True)
    assert damage.newest(workdir) is damage.newest(workdir, read_only=False) is None


def test_foreign_and_other_formats_are_named(workdir, caplog):
    foreign = workdir / "checkpoints" / "5"
    shutil.copytree(workdir / "checkpoints" / "2", foreign)
    assert damage.newest(workdir) == 2  # renamed: its digests are of step 2
    assert "expected step 5, got 2" in damage.said(caplog)[0]
    shutil.rmtree(foreign)
    foreign.mkdir()
    (foreign / "_CHECKPOINT_METADATA").write_text('{"item_handlers": {"default": "a.Handler"}}')
    assert damage.newest(workdir) == 2
    assert "a checkpoint of xmc_jax with state and history, found" in damage.said(caplog)[0]
    shutil.rmtree(foreign)
    shutil.copytree(workdir / "checkpoints" / "2", foreign)
    manifest = json.loads((foreign / "digests.json").read_text())
    del manifest["sha256"]
    (foreign / "digests.json").write_text(proof._text(manifest | {"format": 3}))
    for read_only in (True, False):  # not skipped: what it holds may be worth more
        with pytest.raises(ValueError, match=r"/5: digests.json: expected format 2, got 3: a ch"):
            damage.newest(workdir, read_only)
    wanted = damage.abstract(damage.state(2))
    wanted["step"] = jax.ShapeDtypeStruct((3,), jnp.int32)
    expected = pytest.raises(ValueError, match=r"/2: .*step: expected int32\[3\], got int32\[\]$")
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints, expected:
        checkpoints.restore(2, wanted)


@pytest.mark.parametrize("version", [1, 2])
def test_old_checkpoints_are_read(version, tmp_path, caplog):
    workdir, step = tmp_path / "run", make_checkpoint.STEP
    shutil.copytree(GOLDEN / f"format{version}", workdir)
    expected = make_checkpoint.state()
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (step, step)
        restored, history = checkpoints.restore(step, damage.abstract(expected))
        contents = digests.of_arrays(checkpoints.arrays(step))
    assert history == make_checkpoint.HISTORY
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    unproven = ["checkpoint .*/7: read as it is: a checkpoint of format 1, which has no digests"]
    for line, wanted in zip(damage.said(caplog), unproven * (version == 1), strict=True):
        assert re.match(wanted, line)
    assert digests.combined(contents) == CONTENT
    if version == 1:  # what cannot be read is still said in one line
        damage.empty(workdir / "checkpoints/7/state/manifest.ocdbt")
        with (
            checkpoint.Checkpoints(workdir, read_only=True) as checkpoints,
            pytest.raises(ValueError, match=r"/7: expected one that can be read, found ") as no,
        ):
            checkpoints.restore(step, damage.abstract(expected))
        assert "\n" not in str(no.value)


CONTENT = "7f786dcd01c72c42df27612a470644cdc0e9ffebcfd65bec3366694d733918bc"


def test_digests_are_of_the_content(made, tmp_path, capsys):
    """Files differ from save to save, the digests of arrays do not, whatever the mesh."""
    damage.save(tmp_path, 1, 2)
    ours, theirs = (
        damage.contents(made / "checkpoints/2"),
        damage.contents(tmp_path / "checkpoints/2"),
    )
    assert ours.keys() != theirs.keys()
    lines = []
    for workdir in (made, tmp_path):
        verify.verify(verify.VerifyOptions(str(workdir), arrays=True))
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] and len(set(re.findall(r"content (\w{64})", lines[0]))) == 2
    bank = np.asarray(damage.state(2)["tables"]["bank"])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    split = jax.device_put(bank, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert digests.of_array("tables/bank", np.asarray(split)) in lines[0]
    other = bank.copy()
    other.view(np.uint8)[3, 3] ^= 1
    different = [("bank", other), ("tank", bank), ("bank", bank.T), ("bank", bank.view(np.int32))]
    found = {digests.of_array(name, array) for name, array in [("bank", bank), *different]}
    assert len(found) == 5
    swapped = bank.astype(bank.dtype.newbyteorder())
    assert digests.of_array("a", np.asfortranarray(swapped)) == digests.of_array("a", bank)
    damage.flip(find(tmp_path / "checkpoints/2", "state/d/*"), 5)
    with pytest.raises(ValueError, match=r"expected whole checkpoints, found others: \[2\]"):
        verify.verify(verify.VerifyOptions(str(tmp_path), arrays=False))
    assert "step 2: damaged: state/d/" in capsys.readouterr().out


# Arguments: a workdir, and what happens after the first save.
CHILD = """
import os, resource, subprocess, sys
sys.path.insert(0, "tests")
import damage, failing_calls, jax.numpy as jnp
from xmc_jax.training import checkpoint
workdir, how = sys.argv[1:]
mount = lambda *words: subprocess.run(["mount", *words], check=True)
if how in ("full", "read-only"):
    mount("-t", "tmpfs", "-o", "size=300k", "none", workdir)
damage.save(workdir, 1)
checkpoints = checkpoint.Checkpoints(workdir)
if how == "file size":  # of the data, the description, or what proves
    big, sizes = damage.state(2), (4000, 400, 1000)
elif how == "read-only":
    mount("-o", "remount,ro", workdir)
    big, sizes = damage.state(2), (None,)
elif how in failing_calls.KINDS:
    failing_calls.fail(how)
    big, sizes = damage.state(2), (None,)
else:
    big, sizes = damage.state(2) | {"big": jnp.arange(10**6) ** 2}, (None,)
for size in sizes:
    for ends in (checkpoints.wait, lambda: checkpoints.save(3, damage.state(3), damage.HISTORY)):
        if size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            checkpoints.save(2, big, damage.HISTORY)
            ends()
        except OSError as error:
            print(error)
        else:
            print("written")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert damage.newest(workdir) == 1
        assert checkpoints.steps() == [1], checkpoints.steps()
if how in ("full", "file size"):
    damage.save(workdir, 2)
    assert damage.newest(workdir) == 2
checkpoints.close()
print("whole")
"""


def failing(workdir: pathlib.Path, how: str, *before: str) -> list[str]:
    """What the child says; each line but the last is an error of a save."""
    workdir.mkdir()
    command = [*before, sys.executable, "-c", CHILD, str(workdir), how]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr[-3000:]
    *errors, last = child.stdout.splitlines()
    assert last == "whole"
    start = f"checkpoint {workdir}/checkpoints/2: could not be written: "
    assert errors and all(line.startswith(start) for line in errors)
    return errors


@pytest.mark.slow
def test_files_that_cannot_grow(tmp_path):
    """The error of a write in the background comes with the next call, and is not lost."""
    errors = failing(tmp_path / "run", "file size")
    assert len(errors) == 6 and all("File too large" in line for line in errors)


def can_mount() -> bool:
    words = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return (
        bool(shutil.which("unshare")) and not subprocess.run(words, capture_output=True).returncode
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, expected", [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_refuses(how, expected, tmp_path):
    if not can_mount():
        pytest.skip("no file system can be mounted here")
    errors = failing(tmp_path / "run", how, "unshare", "-rm")
    assert len(errors) == 2 and all(expected in line for line in errors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", failing_calls.KINDS)
def test_a_disk_that_is_worn_out(kind, tmp_path):
    """Any call that writes fails with EIO; with another disk in its place the run goes on."""
    if not can_filter():
        pytest.skip("system calls cannot be made to fail here")
    workdir = tmp_path / "run"
    errors = failing(workdir, kind)
    assert len(errors) == 2 and all("Input/output error" in line for line in errors)
    assert damage.newest(workdir) == 1
    damage.save(workdir, 2)
    assert damage.newest(workdir) == 2


def can_filter() -> bool:
    source = "import failing_calls; failing_calls.fail('fsync')"
    words = [sys.executable, "-c", source]
    return not subprocess.run(words, capture_output=True, cwd=ROOT / "tests").returncode


def test_a_step_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    """As of a run that goes on from just before a boundary, where its only checkpoint is."""

    def fail(folder, step):
        raise OSError(28, "No space left on device", str(folder))

    damage.save(tmp_path, 1)
    with monkeypatch.context() as full:
        full.setattr(proof, "write", fail)
        with pytest.raises(OSError, match=r"/1: could not be written: .*No space left"):
            damage.save(tmp_path, 1)
    assert damage.newest(tmp_path, read_only=False) == 1
    # Killed after the new one was committed and before the old one was removed.
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "1", checkpoints / ".1.old")
    assert damage.newest(tmp_path, read_only=False) == 1
    assert [path.name for path in checkpoints.iterdir()] == ["1"]
    (checkpoints / "1").rename(checkpoints / ".1.old")
    (checkpoints / "1").mkdir()
    (checkpoints / "1" / "half").write_text("written")
    assert damage.newest(tmp_path, read_only=False) == 1


def test_a_failed_write_ends_a_with_block(tmp_path, monkeypatch):
    """As of a loop that has nothing more to do: leaving it says so."""

    def fail(folder, step):
        raise PermissionError(13, "Permission denied", str(folder))

    damage.save(tmp_path, 1)
    monkeypatch.setattr(proof, "write", fail)
    with pytest.raises(OSError, match=r"/2: could not be written: \[Errno 13\] Permission denied"):
        damage.save(tmp_path, 2)
    assert damage.newest(tmp_path) == 1
