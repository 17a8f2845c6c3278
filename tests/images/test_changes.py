"""Image folders whose images change after they were made: by contents, not by names or times."""

import base64
import dataclasses
import errno
import io
import json
import logging
import os
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import write_faults
from PIL import Image

from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data import image_writer
from xmc_jax.data.store import SPLITS
from xmc_jax.files import atomic
from xmc_jax.images import changes, descriptor, embed, encoders, image_sources
from xmc_jax.images.embed import ImagesConfig

UIDS = {
    "train": [f"a{i}" for i in range(30)],
    "test": [f"b{i}" for i in range(5)],
    "label": [f"c{i}" for i in range(9)],
}
WRITE_FAULTS = (*write_faults.KINDS, "full disk in a file")
ITEMS = [uid for split in SPLITS for uid in UIDS[split]]


def picture(seed: int) -> bytes:
    """Of a few hundred bytes, always as many."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def overwrite(path: pathlib.Path, data: bytes) -> None:
    """As another program does, at another time."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_bytes(data)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Two pictures of every third item, one of the others; two are broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, uid in enumerate(ITEMS):
        for k in range(1 + (number % 3 == 0)):
            (folder / f"{uid}_{k}.bmp").write_bytes(picture(100 * number + k))
    (folder / "a3_1.bmp").write_bytes(b"broken")
    (folder / "c0_0.bmp").write_bytes(b"broken")
    return folder


class Means:
    """An encoder that costs nothing: the mean colour."""

    def __init__(self):
        self.identity = {"name": descriptor.NAME, "revision": None, "digest": "0"}
        self.processing = {"layout": "pad"}
        self.width, self.seen = 3, []

    def prepare(self, image: Image.Image) -> np.ndarray:
        self.seen.append(1)
        return np.asarray(image, np.float32).mean((0, 1))

    def embed(self, prepared) -> np.ndarray:
        return np.stack(prepared)


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Gets an entry for each image that is encoded."""
    encoder = Means()
    monkeypatch.setattr(encoders, "build", lambda *_: encoder)
    return encoder.seen


@pytest.fixture
def config(tmp_path, folder, encoded) -> ImagesConfig:
    return ImagesConfig(
        dataset="Toy",
        data_dir=tmp_path / "data",
        name="x",
        source=folder,
        encoder=descriptor.NAME,
        batch_size=4,
    )


def vectors(config: ImagesConfig) -> dict[str, np.ndarray]:
    """Identifier -> f16[m, E]."""
    opened = image_folders.open(config.folder, verify=True)
    return {
        uid: getattr(opened, split).rows[slice(*getattr(opened, split).indptr[i : i + 2])]
        for split in SPLITS
        for i, uid in enumerate(UIDS[split])
    }


def assert_made_of(config: ImagesConfig, folder: pathlib.Path) -> None:
    """The folder is the one that would be made of these pictures from the start."""
    other = dataclasses.replace(config, source=folder, name="straight")
    shutil.rmtree(other.folder, ignore_errors=True)
    embed.make(other, UIDS)
    for path in other.folder.iterdir():
        if path.name not in ("origin.json",):
            assert (config.folder / path.name).read_bytes() == path.read_bytes(), path.name


def replace_a_picture(folder):
    overwrite(folder / "a7_0.bmp", picture(9999))


def add_a_picture(folder):
    overwrite(folder / "a7_1.bmp", picture(9999))


def remove_one_of_two(folder):
    (folder / "a6_0.bmp").unlink()


def exchange_two_pictures(folder):
    one, other = folder / "a7_0.bmp", folder / "c8_0.bmp"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def mend_a_broken_picture(folder):
    overwrite(folder / "c0_0.bmp", picture(9999))


def break_a_picture(folder):
    overwrite(folder / "a7_0.bmp", b"no picture")


@pytest.mark.parametrize(
    ("change", "count"),
    [
        (replace_a_picture, 1),
        (add_a_picture, 2),
        (remove_one_of_two, 1),
        (exchange_two_pictures, 2),
        (mend_a_broken_picture, 1),
        (break_a_picture, 0),
    ],
)
def test_items_whose_pictures_changed_are_encoded_and_no_others(
    config, folder, encoded, change, count
):
    embed.make(config, UIDS)
    change(folder)
    encoded.clear()
    assert not embed.is_current(config, UIDS)
    embed.make(config, UIDS)
    assert len(encoded) == count
    assert embed.is_current(config, UIDS)
    assert_made_of(config, folder)


def test_pictures_that_were_only_touched_are_read_once(config, folder, encoded, monkeypatch):
    embed.make(config, UIDS)
    digest = image_folders.open(config.folder).digest
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    encoded.clear()
    embed.make(config, UIDS)
    assert not encoded and image_folders.open(config.folder).digest == digest
    monkeypatch.setattr(image_sources.ImageSource, "read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(changes, "_contents", lambda source, items, _: (items[:, None], items > 0))
    assert embed.is_current(config, UIDS)


def test_pictures_that_are_gone_keep_their_vectors(config, folder, encoded, caplog):
    embed.make(config, UIDS)
    before = vectors(config)
    for name in ("a5_0.bmp", "c3_0.bmp", "a3_0.bmp", "a3_1.bmp"):
        (folder / name).unlink()
    assert embed.is_current(config, UIDS)
    assert "the images of 3 items are not there any more" in caplog.text
    overwrite(folder / "a8_0.bmp", picture(9999))
    encoded.clear()
    embed.make(config, UIDS)
    assert len(encoded) == 1
    for uid, rows in vectors(config).items():
        assert np.array_equal(rows, before[uid]) == (uid != "a8"), uid
    failures = (config.folder / changes.FAILURES).read_text()
    assert '"uid": "a3", "k": 1' in failures and '"uid": "c0"' in failures
    shutil.rmtree(folder)
    caplog.clear()
    assert embed.is_current(config, UIDS)
    assert "are not there any more" in caplog.text and str(folder) in caplog.text


def test_the_same_pictures_may_lie_elsewhere(config, folder, encoded):
    embed.make(config, UIDS)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    moved = dataclasses.replace(config, source=elsewhere)
    encoded.clear()
    assert embed.is_current(moved, UIDS)
    assert image_folders.read_origin(config.folder)["source"] == str(elsewhere)
    other = shutil.copytree(elsewhere, folder)
    overwrite(other / "a7_0.bmp", picture(9999))
    with pytest.raises(ValueError) as error:
        embed.make(config, UIDS)
    assert not encoded and "\n" not in str(error.value)
    for part in (str(elsewhere), str(other), "1 item", "--overwrite", "--name"):
        assert part in str(error.value)
    embed.make(dataclasses.replace(config, overwrite=True), UIDS)
    assert len(encoded) == 1
    assert_made_of(config, other)


def table_of_base64(folder: pathlib.Path) -> pathlib.Path:
    with (table := folder.with_name("table.jsonl")).open("w") as file:
        for path in sorted(folder.iterdir()):
            data = base64.b64encode(path.read_bytes()).decode()
            file.write(json.dumps({"uid": path.name.split("_")[0], "base64": data}) + "\n")
    return table


def table_of_paths(folder: pathlib.Path) -> pathlib.Path:
    table = folder / "table.csv"
    names = sorted(path.name for path in folder.glob("*.bmp"))
    table.write_text("uid,path\n" + "".join(f"{n.split('_')[0]},{n}\n" for n in names))
    return table


def table_of_structs(folder: pathlib.Path) -> pathlib.Path:
    """Hugging Face's images, some in the table and some beside it."""
    paths = sorted(folder.glob("*.bmp"))
    cells = [
        {"bytes": path.read_bytes() if number % 2 else None, "path": path.name}
        for number, path in enumerate(paths)
    ]
    table = {"uid": [path.name.split("_")[0] for path in paths], "image": cells}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "table.parquet")
    return folder / "table.parquet"


@pytest.mark.parametrize("table", [table_of_base64, table_of_paths, table_of_structs])
def test_images_of_tables_are_compared_one_by_one(config, folder, encoded, table):
    config = dataclasses.replace(config, source=table(folder))
    embed.make(config, UIDS)
    assert embed.is_current(config, UIDS)
    name = sorted(path.name for path in folder.glob("a*.bmp"))[8]  # of structs, beside the table
    overwrite(folder / name, picture(9999))
    if table is table_of_base64:
        before = config.source.stat().st_mtime_ns
        table(folder)
        os.utime(config.source, ns=(before + 10**9, before + 10**9))
    count = len(list(folder.glob(f"{name.split('_')[0]}_*")))
    encoded.clear()
    embed.make(config, UIDS)
    assert len(encoded) == count
    assert_made_of(config, config.source)


def test_what_changes_while_it_is_interrupted_is_encoded_anew(config, folder, monkeypatch):
    whole, calls = image_writer.ImageWriter.extend, []

    def dying(writer, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        whole(writer, *arguments)
        writer.commit()

    monkeypatch.setattr(image_writer.ImageWriter, "extend", dying)
    with pytest.raises(KeyboardInterrupt):
        embed.make(config, UIDS)
    overwrite(folder / "a0_0.bmp", picture(9999))  # which is done
    embed.make(config, UIDS)
    assert_made_of(config, folder)


def earlier_version(config: ImagesConfig) -> None:
    """Makes a folder as it was written before contents were kept."""
    for pattern in ("*.contents.npy", "*.stamps.npy", "origin.json"):
        for path in config.folder.glob(pattern):
            path.unlink()
    path = config.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for split in SPLITS:
        del manifest["files"][f"{split}.contents.npy"]
    identity = {"kind": "files", "files": 40, "digest": "abc"}
    manifest["source"]["images"] = dict.fromkeys(SPLITS, identity)
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def test_a_folder_of_an_earlier_version_opens_and_says_what_is_not_known(
    config, folder, encoded, caplog
):
    embed.make(config, UIDS)
    earlier_version(config)
    before, digest = vectors(config), image_folders.open(config.folder).digest
    overwrite(folder / "a7_0.bmp", picture(9999))
    encoded.clear()
    for _ in range(2):
        caplog.clear()
        embed.make(config, UIDS)
        said = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 1 and "made by an earlier version" in said[0].getMessage()
    assert not encoded and image_folders.open(config.folder).digest == digest
    assert embed.is_current(config, UIDS)
    for uid, rows in vectors(config).items():
        np.testing.assert_array_equal(rows, before[uid])


def test_a_folder_that_may_not_be_written_to_is_read(config, folder, monkeypatch):
    embed.make(config, UIDS)
    os.utime(folder / "a7_0.bmp", ns=(1, 1))

    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(atomic, "replaced", refused)
    assert embed.is_current(config, UIDS)


@pytest.mark.parametrize("lost", ["a file", "its rows"])
def test_lost_stamps_cost_a_reading(config, encoded, lost):
    embed.make(config, UIDS)
    path = config.folder / "train.stamps.npy"
    before = path.read_bytes()
    path.unlink() if lost == "a file" else path.write_bytes(before[:-1])
    encoded.clear()
    assert embed.is_current(config, UIDS) and not encoded
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "renewed"),
    [
        ("kill", False),
        *((kind, True) for kind in WRITE_FAULTS),
        *(pytest.param(kind, False, marks=pytest.mark.reliability) for kind in WRITE_FAULTS[1:]),
    ],
)
def test_a_kill_and_a_full_disk_at_each_write(config, folder, monkeypatch, kind, renewed):
    """The folder is the old one or the new one, and the same command makes it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no moment of its own
    monkeypatch.setattr(image_writer, "_COMMIT_SECONDS", -1.0)
    config = dataclasses.replace(config, batch_size=20)
    data, old, saved = pathlib.Path(config.data_dir), None, folder.with_name("saved")
    saved.mkdir()
    if renewed:
        embed.make(config, UIDS)
        old = image_folders.open(config.folder).digest
        shutil.copytree(data, saved, dirs_exist_ok=True)
        replace_a_picture(folder)
        mend_a_broken_picture(folder)
    whole, flushes, fatal = atomic.to_disk, [], 0

    def fragile(file) -> None:
        flushes.append(1)
        if len(flushes) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(file)

    monkeypatch.setattr(atomic, "to_disk", fragile)
    shutil.copytree(saved, data, dirs_exist_ok=True)
    writes = write_faults.count(data, lambda: embed.make(config, UIDS))
    writes = len(flushes) if kind == "full disk in a file" else writes
    new = image_folders.open(config.folder).digest
    straight = {path.name: path.read_bytes() for path in config.folder.iterdir()}
    assert writes > 20 and new != old
    for number in range(0, writes, 3 if renewed else 1):
        shutil.rmtree(data)
        shutil.copytree(saved, data)
        flushes.clear()
        if kind in write_faults.KINDS:
            with write_faults.at(data, number, kind):
                embed.make(config, UIDS)
        else:
            fatal = number + 1
            with pytest.raises(OSError, match="No space left"):
                embed.make(config, UIDS)
            fatal = 0
        if renewed or config.folder.exists():
            assert image_folders.open(config.folder, verify=True).digest in (old, new)
        embed.make(config, UIDS)
        assert {path.name: path.read_bytes() for path in config.folder.iterdir()} == straight
        assert [path.name for path in config.folder.parent.iterdir()] == [config.folder.name]


def test_the_encoder_that_an_update_needs_is_said(config, folder, monkeypatch):
    """A folder is opened without its encoder; pictures that have changed need it."""
    embed.make(config, UIDS)
    manifest = config.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(descriptor.NAME, "/no/encoder"))
    config = dataclasses.replace(config, encoder="/no/encoder", batch_size=8)
    assert embed.is_current(config, UIDS)
    replace_a_picture(folder)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="/no/encoder: expected a folder with a model"):
        embed.make(config, UIDS)
