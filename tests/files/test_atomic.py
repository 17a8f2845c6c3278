"""Files and folders appear whole or not at all, whatever ends the write."""

import errno
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from xmc_jax.files import atomic, manifests


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "file.json"
    atomic.write(path, "first é")
    atomic.write(path, b"second")
    assert path.read_bytes() == b"second"
    assert _names(path.parent) == ["file.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refused_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    atomic.write(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_an_error_within_the_block_leaves_the_old_folder(tmp_path):
    target = tmp_path / "folder"
    with atomic.replaced_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic.replaced_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert _names(tmp_path) == ["folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchanged", lambda *_: False)
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic.replaced_folder(target) as folder:
            (folder / text).mkdir()
            (folder / text / "file").write_text(text)
    assert _names(target) == ["new"]
    assert (target / "new" / "file").read_text() == "new"
    assert _names(tmp_path) == ["folder"]


def test_a_killed_process_leaves_the_old_folder_and_the_next_call_cleans_up(tmp_path):
    target = tmp_path / "folder"
    with atomic.replaced_folder(target) as folder:
        (folder / "a").write_text("old")
    script = textwrap.dedent(f"""
        import os, pathlib, signal
        from xmc_jax.files import atomic
        with atomic.replaced_folder(pathlib.Path({str(target)!r})) as folder:
            (folder / "b").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert _names(target) == ["a"]
    with atomic.replaced_folder(target) as folder:
        (folder / "c").write_text("new")
    assert _names(target) == ["c"]
    assert _names(tmp_path) == ["folder"]


def test_what_a_manifest_says_of_a_changed_folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_text("12345")
    (tmp_path / "b").write_text("12345")
    recorded = manifests.files(tmp_path)
    assert list(recorded) == ["b", "part/a"]
    assert manifests.damage(tmp_path, recorded) is None
    (tmp_path / "part" / "a").write_text("1234")
    assert "expected 5 bytes, found 4" in manifests.damage(tmp_path, recorded)
    (tmp_path / "part" / "a").write_text("12354")
    assert "expected sha256" in manifests.damage(tmp_path, recorded)
    (tmp_path / "part" / "a").unlink()
    assert "found no file" in manifests.damage(tmp_path, recorded)


def test_differences_name_the_field_and_both_values():
    then, now = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": "x"}
    assert manifests.difference(then, now) == [
        "a.c: 2 there, 3 here",
        "d: None there, 'x' here",
    ]
