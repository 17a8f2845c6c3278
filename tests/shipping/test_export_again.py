"""What people did to an exported folder is not lost when the model is exported again."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from xmc_jax.config import NewLabelsConfig
from xmc_jax.files import atomic
from xmc_jax.shipping import artifact, contents, exporting, labels, replacing

pytestmark = pytest.mark.slow


@pytest.fixture
def workdir(exported, tmp_path) -> pathlib.Path:
    shutil.copytree(exported.folder, tmp_path / "export")
    return tmp_path


def again(exported, workdir: pathlib.Path, **options) -> None:
    exporting.whole(exported.run, 0, exported.state, epath.Path(workdir), **options)


def change_labels(folder: pathlib.Path) -> None:
    for name in ("topic3", "topic4"):
        labels.change(folder, labels.LabelChanges(remove=[name]), NewLabelsConfig())


def forget_digests(folder: pathlib.Path) -> None:
    """As an earlier version wrote it."""
    path = folder / contents.MANIFEST
    content = json.loads(path.read_text())
    del content["cards"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("touch", "said"),
    [
        (change_labels, r"changed labels \(0 added, 0 updated, 2 removed\); move the folder away"),
        (lambda f: (f / "LICENSE.md").write_text("ours"), "found an edited LICENSE.md; move"),
        (
            lambda f: [(f / f"{name}.txt").touch() for name in "abcdefg"],
            r"files of other origin: a\.txt, b\.txt, c\.txt, d\.txt, e\.txt and 2 more; move",
        ),
        (
            forget_digests,
            r"found DATA_CARD\.md, LICENSE\.md, README\.md, perhaps edited \(no digests",
        ),
        (lambda f: (f / "artifact.json").write_text("{"), r"artifact\.json that cannot be read \("),
        (
            lambda f: (f / "artifact.json").unlink(),
            r"no exported folder but 1_Pooling/config\.json, DATA",
        ),
    ],
)
def test_what_would_be_lost_is_said_and_stays(exported, workdir, touch, said):
    folder = workdir / "export"
    touch(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=said) as refused:
        again(exported, workdir)
    assert "\n" not in str(refused.value) and "--overwrite" in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert list(workdir.iterdir()) == [folder]


def test_nothing_is_lost_where_nobody_did_anything(exported, workdir):
    """Labels that were changed are lost with --overwrite alone; what commands leave is none's."""
    folder = workdir / "export"
    (folder / "labels-2").mkdir()
    (folder / "labels-2" / "ids.npy").touch()
    (folder / ".README.md.partial").touch()
    (folder / "DATA_CARD.md").unlink()
    again(exported, workdir)
    assert (folder / "DATA_CARD.md").exists() and not (folder / "labels-2").exists()
    change_labels(folder)
    again(exported, workdir, overwrite=True)
    assert len(artifact.open(folder).labels) == 40
    assert list(workdir.iterdir()) == [folder]


def test_the_old_folder_stays_until_the_new_one_is_whole(exported, workdir, monkeypatch):
    move, moved = atomic.move_folder, []

    def watched(source, target):
        for folder in (source, target):
            if target.name == "export":
                moved.append(len(artifact.open(folder).labels))
        move(source, target)

    monkeypatch.setattr(atomic, "move_folder", watched)
    again(exported, workdir)
    assert moved == [40, 40]


def test_a_folder_of_files_is_known_by_their_digests(tmp_path):
    """As of adapters, which are no artifact."""
    target = epath.Path(tmp_path / "export-adapter")
    for number in range(2):
        with replacing.replaced(target, replacing.RECORD, overwrite=False) as folder:
            (folder / "adapter.safetensors").write_text(str(number))
            replacing.record(folder)
    (tmp_path / "export-adapter" / "adapter.safetensors").write_text("edited")
    (tmp_path / "export-adapter" / "README.md").write_text("of people")
    said = r"an edited adapter\.safetensors; files of other origin: README\.md; move"
    with (
        pytest.raises(ValueError, match=said),
        replacing.replaced(target, replacing.RECORD, overwrite=False),
    ):
        pass


def test_what_people_do_meanwhile_is_not_lost(tmp_path):
    target = epath.Path(tmp_path / "export")
    refused = pytest.raises(ValueError, match=r"no exported folder but notes\.txt; move")
    with refused, replacing.replaced(target, replacing.RECORD, overwrite=False):
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "notes.txt").touch()
    assert (tmp_path / "export" / "notes.txt").exists()
