"""A kill or a full disk at any write of an export, a change of labels, or a copy: old or new."""

import pathlib
import shutil

import pytest
import write_faults
from etils import epath

from xmc_jax.config import NewLabelsConfig
from xmc_jax.files import manifests
from xmc_jax.shipping import artifact, exporting, labels

pytestmark = pytest.mark.slow
KINDS = pytest.mark.parametrize("kind", write_faults.KINDS)
# At each write, or at some.
STEPS = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.reliability), 5])
GONE = labels.LabelChanges(remove=["topic3"])
OURS = "who ships this says so\n"


@pytest.fixture
def workdir(exported, tmp_path) -> pathlib.Path:
    """A folder with an exported one, whose licence somebody has edited."""
    shutil.copytree(exported.folder, tmp_path / "run" / "export")
    (tmp_path / "run" / "export" / "LICENSE.md").write_text(OURS)
    return tmp_path / "run"


def digest(folder: pathlib.Path) -> str:
    """Of an exported folder that is whole, as its manifest says."""
    return artifact.open(folder).digest


@KINDS
@STEPS
def test_labels_in_place(workdir, kind, step):
    folder, before = workdir / "export", shutil.copytree(workdir / "export", workdir / "before")
    writes = write_faults.count(folder, lambda: labels.change(folder, GONE, NewLabelsConfig()))
    assert writes > 40
    for number in range(0, writes, step):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        with write_faults.at(folder, number, kind):
            labels.change(folder, GONE, NewLabelsConfig())
        left = len(artifact.open(folder).labels)
        assert left in (39, 40) and (folder / "LICENSE.md").read_text() == OURS
        changes = GONE if left == 40 else labels.LabelChanges(remove=["topic4"])
        assert labels.change(folder, changes, NewLabelsConfig()).labels == left - 1
        parts = [path.name for path in folder.iterdir() if path.name.startswith("labels")]
        assert parts == [artifact.open(folder).manifest["labels"]["folder"]]
        assert not [name for name in manifests.names(folder) if "partial" in name or "lock" in name]


@KINDS
@STEPS
def test_labels_of_a_copy(workdir, kind, step):
    folder, out = workdir / "export", workdir / "changed"
    before = digest(folder)

    def copy():
        labels.change(folder, GONE, NewLabelsConfig(), out=out)

    writes = write_faults.count(workdir, copy)
    assert writes > 60
    for number in range(0, writes, step):
        shutil.rmtree(out, ignore_errors=True)
        with write_faults.at(workdir, number, kind):
            copy()
        assert digest(folder) == before
        if not out.exists():
            copy()
        assert len(artifact.open(out).labels) == 39 and (out / "LICENSE.md").read_text() == OURS
        assert {path.name for path in workdir.iterdir()} <= {"export", "changed", ".changed.lock"}


@KINDS
@STEPS
def test_export(exported, workdir, monkeypatch, kind, step):
    """Each attempt meets what those before it have left, and the last one gets through."""
    folder, before = workdir / "export", digest(workdir / "export")
    evaluation = exported.run.evaluate(exported.state)
    monkeypatch.setattr(exported.run, "evaluate", lambda *_: evaluation)

    def export():
        work = exported.run, 0, exported.state
        exporting.whole(*work, epath.Path(workdir), overwrite=True)

    writes = write_faults.count(workdir, export)
    assert writes > 80
    shutil.rmtree(folder)
    shutil.copytree(exported.folder, folder)
    (folder / "LICENSE.md").write_text(OURS)
    for number in range(0, writes, step):
        with write_faults.at(workdir, number, kind):
            export()
        if digest(folder) != before:
            break
        assert (folder / "LICENSE.md").read_text() == OURS
    assert number > 60 and digest(folder) != before
    export()
    assert digest(folder) and list(workdir.iterdir()) == [folder]
