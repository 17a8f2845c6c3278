"""Image folders: what is written, read, refused, and imported from published files."""

import errno
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import write_faults

from benchmarks import image_gather
from xmc_jax.data import image_import, image_maps, image_vectors, image_writer
from xmc_jax.data.store import SPLITS
from xmc_jax.files import atomic

ROOT = pathlib.Path(__file__).parents[2]
WIDTH = 6
ENCODER = {"name": "some/encoder", "revision": None, "digest": "abc"}
COUNTS = {"train": 23, "test": 5, "label": 11}


def make_items(seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Vectors of each item, 0 to 4 of them."""
    generator = np.random.default_rng(seed)
    return {
        split: [
            generator.standard_normal((generator.integers(5), WIDTH)).astype(np.float32)
            for _ in range(count)
        ]
        for split, count in COUNTS.items()
    }


def writer(folder, **changes) -> image_writer.ImageWriter:
    fields = {"counts": COUNTS, "width": WIDTH, "dataset": "Toy", "encoder": ENCODER}
    return image_writer.ImageWriter(folder, **fields | changes)


def write(folder, items, **changes) -> pathlib.Path:
    with writer(folder, **changes) as opened:
        for split in SPLITS:
            for item, vectors in enumerate(items[split]):
                opened.append(split, item, vectors)
        return opened.finish()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return write(tmp_path / "images-x", make_items())


# Reading


@pytest.mark.parametrize("limit", [1, 3, 9])
def test_gather_is_the_first_images_and_zeros(folder, limit):
    opened = image_vectors.open(folder, expect=COUNTS, verify=True)
    generator = np.random.default_rng(1)
    for split, items in make_items().items():
        rows = getattr(opened, split)
        assert len(rows) == len(items) and isinstance(rows.rows.base, np.memmap)
        ids = generator.integers(len(items), size=40).astype(np.int32)
        found, count = rows.gather(ids, limit)
        expected = np.zeros((40, limit, WIDTH), np.float16)
        for row, item in zip(expected, ids):
            row[: len(items[item])] = items[item][:limit]
        np.testing.assert_array_equal(found, expected)
        assert count.tolist() == [min(len(items[item]), limit) for item in ids]
        assert found.dtype == np.float16 and count.dtype == np.int32


def test_manifest(folder):
    opened = image_vectors.open(folder)
    assert opened.manifest["encoder"] == ENCODER | {"E": WIDTH} and opened.width == WIDTH
    assert opened.manifest["counts"] == COUNTS and opened.manifest["dataset"] == "Toy"
    for split, items in make_items().items():
        assert opened.manifest["images"][split] == sum(map(len, items))
        share = 100 * np.mean([len(vectors) > 0 for vectors in items])
        assert opened.shares[split] == pytest.approx(share, abs=1e-3)
    files = {f"{split}.{part}.npy" for split in SPLITS for part in ("rows", "indptr")}
    assert set(contents(folder)) == files | {"manifest.json"}
    for split in SPLITS:
        plain = np.load(folder / f"{split}.rows.npy"), np.load(folder / f"{split}.indptr.npy")
        np.testing.assert_array_equal(plain[0], getattr(opened, split).rows)
        assert plain[0].dtype == np.float16 and plain[1].dtype == np.int64


def test_sizes_types_and_offsets_are_checked(folder):
    with pytest.raises(ValueError, match=r"label items: expected 12, found 11"):
        image_vectors.open(folder, expect=COUNTS | {"label": 12})
    path = folder / "test.indptr.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=rf"indptr\.npy: bytes: expected {len(good)}, found \d+"):
        image_vectors.open(folder)
    np.save(path, np.zeros(6, np.float64))
    with pytest.raises(ValueError, match=r"indptr\.npy: dtype: expected int64, found float64"):
        image_vectors.open(folder)
    offsets = np.load(io.BytesIO(good))
    for at, value, message in (
        (0, 1, r"first and last offset: expected \(0, \d+\), found \(1, \d+\)"),
        (-1, 99, r"first and last offset: expected \(0, \d+\), found \(0, 99\)"),
        (2, -5, r"offset 2: expected \d+ or more, found -5"),
    ):
        changed = offsets.copy()
        changed[at] = value
        np.save(path, changed)
        with pytest.raises(ValueError, match=rf"test\.indptr\.npy: {message}"):
            image_vectors.open(folder)
    path.write_bytes(b"x" * len(good))
    with pytest.raises(ValueError, match="expected a NumPy array file, found a damaged one"):
        image_vectors.open(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"bytes: expected \d+, found 0"):
        image_vectors.open(folder)


def test_damaged_rows_are_found_on_request(folder):
    content = bytearray((folder / "label.rows.npy").read_bytes())
    content[-1] ^= 1
    (folder / "label.rows.npy").write_bytes(content)
    image_vectors.open(folder)
    with pytest.raises(ValueError, match=r"label\.rows\.npy: sha256: expected \w+, found \w+"):
        image_vectors.open(folder, verify=True)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"files": {}}'])
def test_manifest_refusals(folder, content):
    path = folder / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError,
        match=r"with a manifest\.json, found none that can be read|format: expected 1, found None",
    ):
        image_vectors.open(folder)


@pytest.mark.parametrize("dataset, name", [("a/b", "x"), ("..", "x"), ("", "x"), ("a", "x/y")])
def test_names_are_parts_of_a_path(dataset, name):
    with pytest.raises(ValueError, match="expected a name without slashes"):
        image_vectors.path("data", dataset, name)


# Writing


def test_append_and_extend_write_the_same(folder, tmp_path):
    items = make_items()
    with writer(tmp_path / "images-other") as opened:
        for split in reversed(SPLITS):
            opened.extend(
                split, 0, [len(v) for v in items[split][:3]], np.concatenate(items[split][:3])
            )
            for start in range(3, COUNTS[split], 4):
                block = items[split][start : start + 4]
                opened.extend(split, start, [len(v) for v in block], np.concatenate(block))
        assert opened.written == COUNTS and not opened.finished
        opened.finish()
        assert opened.finished
    assert contents(tmp_path / "images-other") == contents(folder)


def test_a_finished_folder_is_left_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with writer(folder) as opened:
        assert opened.written == COUNTS and opened.finished
        opened.commit()
        assert opened.finish() == folder
        with pytest.raises(ValueError, match="train: expected item 23 of 23, got 23"):
            opened.append("train", 23, np.zeros((1, WIDTH)))
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "Other"}, "dataset: 'Toy' there, 'Other' here"),
        ({"width": 7}, "E: 6 there, 7 here"),
        ({"encoder": ENCODER | {"digest": "d"}}, r"encoder\.digest: 'abc' there, 'd' here"),
        ({"counts": COUNTS | {"test": 6}}, r"counts\.test: 5 there, 6 here"),
        ({"source": {"limit": 3}}, r"source\.limit: None there, 3 here"),
    ],
)
def test_other_inputs_are_refused_until_overwrite(tmp_path, finished, change, message):
    items = make_items()
    place = tmp_path / "images-x"
    if finished:
        write(place, items)
    else:
        with writer(place) as opened:
            opened.append("train", 0, items["train"][0])
            opened.commit()
    with pytest.raises(ValueError, match=rf"{message}.*--name.*--overwrite"):
        writer(place, **change)
    with writer(place, overwrite=True, **change) as opened:
        assert not any(opened.written.values())


def test_inputs_with_something_missing_are_other_inputs(tmp_path):
    place = tmp_path / "images-x"
    files = {"a.parquet": 1, "b.parquet": 2}
    writer(place, source={"files": files}).close()
    with pytest.raises(ValueError, match=r"source\.files\.b\.parquet: 2 there, None here"):
        writer(place, source={"files": {"a.parquet": 1}})
    writer(place, source={"files": files}).close()


def test_a_full_disk_lets_go_of_the_folder(tmp_path):
    """What could not be written is given up; the next writer goes on after the last commit."""
    place = tmp_path / "images-x"
    opened = writer(place)
    opened.append("train", 0, np.ones((2, WIDTH)))
    opened.commit()
    for split in SPLITS:  # what waits in memory
        opened.append(split, opened.written[split], np.ones((1000, WIDTH)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, limit[1]))
    try:
        with pytest.raises(OSError):
            opened.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with writer(place) as again:
        assert again.written == {"train": 1, "test": 0, "label": 0}


def test_overwrite_goes_on_with_what_is_of_use(folder, tmp_path):
    items, place = make_items(), tmp_path / "images-y"
    with writer(place, overwrite=True) as opened:
        opened.append("train", 0, items["train"][0])
        opened.commit()
    with writer(place, overwrite=True) as opened:
        assert opened.written["train"] == 1
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with writer(folder, overwrite=True) as opened:
        assert opened.finished
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    straight = contents(folder)
    (folder / "label.rows.npy").write_bytes(straight["label.rows.npy"][:-1] + b"\xff")
    with writer(folder) as opened:
        assert opened.finished  # contents are looked at only with overwrite
    assert contents(write(folder, items, overwrite=True)) == straight


def test_a_folder_stays_until_the_new_one_is_whole(folder):
    before, items = contents(folder), make_items(1)
    with writer(folder) as opened:
        opened.renew()
        assert not opened.finished and not any(opened.written.values())
        opened.append("train", 0, items["train"][0])
        opened.commit()
    assert contents(folder) == before
    with writer(folder) as opened:
        opened.renew()
        assert opened.written["train"] == 1
        for split in SPLITS:
            for item in range(opened.written[split], COUNTS[split]):
                opened.append(split, item, items[split][item])
        opened.finish()
    assert contents(folder) == contents(write(folder.with_name("images-other"), items))
    assert not image_vectors.partial(folder).exists()


def test_what_else_is_in_a_folder_is_not_removed(folder):
    (folder / "manifest.json").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an image folder with a manifest\.json"):
        writer(folder)
    assert (folder / "notes.txt").exists()


def test_one_writer_at_a_time(tmp_path):
    with (
        writer(tmp_path / "images-x"),
        pytest.raises(ValueError, match="expected no other process, found process"),
    ):
        writer(tmp_path / "images-x")
    writer(tmp_path / "images-x").close()


@pytest.mark.parametrize(
    "value, dtype", [(np.nan, np.float32), (-np.inf, np.float32), (65520.0, np.float64)]
)
def test_numbers_that_do_not_fit_are_refused_by_place(tmp_path, value, dtype):
    with writer(tmp_path / "images-x") as opened:
        opened.append("test", 0, np.full((2, WIDTH), 65504, dtype))
        vectors = np.zeros((4, WIDTH), dtype)
        vectors[2, 5] = value
        with pytest.raises(
            ValueError, match=r"test: item 3: image 1: expected numbers within .*65504"
        ):
            opened.extend("test", 1, [1, 0, 3], vectors)
        assert opened.written == {"train": 0, "test": 1, "label": 0}
        opened.extend("test", 1, [1, 0, 3], np.zeros_like(vectors))


def test_a_half_number_given_as_such_is_kept(tmp_path):
    import ml_dtypes

    with writer(tmp_path / "images-x") as opened:
        for dtype in (np.float16, ml_dtypes.bfloat16):
            opened.append("train", opened.written["train"], np.full((1, WIDTH), 0.5, dtype))


def test_items_come_in_order_and_in_shape(tmp_path):
    with writer(tmp_path / "images-x") as opened:
        opened.append("train", 0, [])
        for item in (0, 2, -1):
            with pytest.raises(ValueError, match=rf"train: expected item 1 of 23, got {item}"):
                opened.append("train", item, [])
        with pytest.raises(ValueError, match="expected item 1 of 23, got 1 and 22 after it"):
            opened.extend("train", 1, [0] * 23, [])
        for shape in ((1, 5), (WIDTH,), (2, 1, WIDTH)):
            with pytest.raises(ValueError, match=r"train: item 1: expected vectors of shape \["):
                opened.append("train", 1, np.zeros(shape))
        with pytest.raises(ValueError, match=r"expected {'train': 23.*items, got {'train': 1"):
            opened.finish()
    with pytest.raises(ValueError, match="found an unfinished one"):
        image_vectors.open(tmp_path / "images-x")
    with pytest.raises(ValueError, match="counts of train, test and label"):
        writer(tmp_path / "images-y", counts={"train": 1})


def test_progress_that_does_not_fit_its_files_is_refused(tmp_path):
    place = tmp_path / "images-x"
    with writer(place) as opened:
        opened.append("train", 0, np.ones((3, WIDTH)))
        opened.commit()
    partial = image_vectors.partial(place)
    with (partial / "train.rows.npy").open("r+b") as file:
        file.truncate(150)
    with pytest.raises(ValueError, match=r"rows\.npy: bytes: expected at least 164 .* found 150"):
        writer(place)
    for damaged in ("{", '{"done": {"train": {}}}', "[]", '{"done": {"train": {"items": "x"}}}'):
        (partial / "progress.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"progress\.json: .*(JSON|done)"):
            writer(place)
    writer(place, overwrite=True).close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*write_faults.KINDS, "full disk in a file"])
def test_a_kill_and_a_full_disk_at_each_write(tmp_path, monkeypatch, kind):
    """What was made durable is gone on from, whatever lies behind it; the bytes are the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no moment of its own
    items, place = make_items(), tmp_path / "a" / "images-x"
    straight = contents(write(tmp_path / "straight", items))

    def act() -> None:
        with writer(place) as opened:
            for split in SPLITS:
                for item in range(opened.written[split], len(items[split])):
                    opened.append(split, item, items[split][item])
                    if item % 12 == 5:
                        opened.commit()
            opened.finish()

    flushes = []
    whole = atomic.to_disk

    def fragile(file) -> None:
        flushes.append(1)
        if len(flushes) == fatal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(file)

    monkeypatch.setattr(atomic, "to_disk", fragile)
    fatal = 0
    writes = write_faults.count(place.parent, act)
    writes = len(flushes) if kind == "full disk in a file" else writes
    assert contents(place) == straight and writes > 20
    for number in range(writes):
        shutil.rmtree(place.parent)
        flushes.clear()
        if kind in write_faults.KINDS:
            with write_faults.at(place.parent, number, kind):
                act()
        else:
            fatal = number + 1
            with pytest.raises(OSError, match="No space left"):
                act()
            fatal = 0
        for file in image_vectors.partial(place).glob("*.npy"):
            with file.open("ab") as torn:
                torn.write(b"torn")
        act()
        assert contents(place) == straight, number
        assert sorted(path.name for path in place.parent.iterdir()) == [place.name]


SMALL = image_gather.Settings(rows=300, width=8, batch=4, batches=3)


def test_the_benchmark_counts_what_it_gathers(tmp_path):
    place = tmp_path / "images-rows"
    image_gather.write(place, SMALL)
    written = image_vectors.open(place).manifest["images"]
    assert sum(written.values()) == 300
    found = image_gather.measure(place, SMALL, cold=True)
    assert found["items"] == 3 * 2 * 4 and found["items_per_second"] > 0
    assert found["anonymous_bytes"] == found["rss_anon"] + found["gather_peak"] > 1 << 20
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    image_gather.write(place, SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in place.iterdir()}
    rows = np.lib.format.open_memmap(place / "label.rows.npy", mode="r+")
    rows[:, 0] += 1
    del rows
    with pytest.raises(RuntimeError, match="expected the rows of"):
        image_gather.measure(place, SMALL, cold=True)


@pytest.mark.slow
def test_the_benchmark_runs_as_a_command(tmp_path):
    out = tmp_path / "out" / "x.json"
    flags = ("--rows=300", "--width=8", "--batch=4", "--batches=3", f"--out={out}")
    content = image_gather.main(flags)
    assert content == json.loads(out.read_text())
    assert list(content)[:2] == ["benchmark", "settings"] and content["results"]["images"] == 300
    assert content["results"]["cold"]["items"] == content["results"]["warm"]["items"] == 24


# Maps


def object_array(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def npy(pickled: bytes, shape: tuple = (2,), dtype: str = "|O") -> bytes:
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + pickled


def lists(found) -> list[list[int]]:
    return [found.indices[a:b].tolist() for a, b in zip(found.indptr, found.indptr[1:])]


VALUES = [-1, [3], [0, 1, 2], -1, [], [70_000, 5], [300], [2**31 - 1]]
ROWS = [[] if value == -1 else value for value in VALUES]


def save(values: list, protocol: int, home: bytes) -> bytes:
    """As np.save writes it: protocol 2 before NumPy 1.17, 4 in NumPy 2; another home in NumPy 1."""
    pickled = pickle.dumps(object_array(values), protocol)
    new = b"numpy._core.multiarray"
    if protocol < 4:
        pickled = pickled.replace(new, home)
    elif home != new:
        old = bytes([0x8C, len(new)]) + new  # within a frame, whose length nobody checks
        pickled = pickled.replace(old, bytes([0x8C, len(home)]) + home)
    return npy(pickled, (len(values),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("home", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_maps_as_numpy_writes_them(tmp_path, protocol, home):
    path = tmp_path / "map.npy"
    path.write_bytes(save(VALUES, protocol, home))
    assert lists(image_maps.read(path)) == ROWS
    np.save(path, object_array(VALUES))
    found = image_maps.read(path, 2**31)
    assert lists(found) == ROWS and found.columns == 2**31
    assert (found.indptr.dtype, found.indices.dtype) == (np.int64, np.int32)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("home", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_maps_of_arrays_and_of_numpy_numbers(tmp_path, protocol, home):
    path = tmp_path / "map.npy"
    values = [np.array([4, 200]), np.array([], np.int32), -1, [np.int64(7), 8], np.uint8([255])]
    values += [np.array([1], ">i4"), np.int32(-1), [np.int8(3)] * 3, np.arange(9, dtype=np.int8)]
    path.write_bytes(save(values, protocol, home))
    expected = [[4, 200], [], [], [7, 8], [255], [1], [], [3] * 3, list(range(9))]
    assert lists(image_maps.read(path)) == expected
    np.save(path, object_array(values))
    assert lists(image_maps.read(path)) == expected


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda i: np.arange(i % 3),
        lambda i: np.arange(i % 3, dtype=np.int8),
        lambda i: np.int8(-1),
        lambda i: [np.int32(i), np.int16(i)],
        lambda i: [],
    ],
)
def test_maps_of_nothing_but_small_things(tmp_path, protocol, make):
    """What bounds memory leaves room for the shortest way to write an item."""
    values = [make(i) for i in range(1000)]
    path = tmp_path / "map.npy"
    path.write_bytes(save(values, protocol, b"numpy._core.multiarray"))
    expected = [[] if np.ndim(value) == 0 else [int(row) for row in value] for value in values]
    assert lists(image_maps.read(path)) == expected


@pytest.mark.parametrize("order", ["C", "F"])
def test_maps_of_integers(tmp_path, order):
    path = tmp_path / "map.npy"
    np.save(path, np.array([5, -1, 0], np.int32))
    assert lists(image_maps.read(path, 6)) == [[5], [], [0]]
    np.save(path, np.array([[5, 3, -1], [-1, -1, -1], [0, 1, 2]], np.int64, order=order))
    assert lists(image_maps.read(path, 6)) == [[5, 3], [], [0, 1, 2]]
    np.save(path, np.array([5, -2]))
    with pytest.raises(ValueError, match="found row -2"):
        image_maps.read(path)
    np.save(path, np.array([200, 0], np.uint8))
    assert lists(image_maps.read(path)) == [[200], [0]]
    np.save(path, np.array([], np.int64))
    assert lists(image_maps.read(path)) == []


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CANARY: list[str] = []


class State:
    def __setstate__(self, state):
        CANARY.append(state)


def crafted(canary: pathlib.Path) -> dict[str, bytes]:
    """Files that would run something, or take memory or time without end, in a trusting reader."""
    touch = f"touch {canary}"
    array = pickle.dumps(object_array([-1, [1]]), 4)
    stated = State()
    stated.x = 1
    head = array[: array.index(b"]")]  # all up to the list of items
    deep = b"".join([b"(" * 200_000, b"t" * 200_000])
    numbers = pickle.dumps(np.arange(50_000), 4)
    rows = list(range(1000, 31_000))
    core, letters = b"cnumpy._core.multiarray\n", b"X" + struct.pack("<I", 50_000) + b"a" * 50_000
    encode = b"c_codecs\nencode\nq\x00(" + letters + b"X\x06\x00\x00\x00latin1tq\x01"
    loop = [1]
    loop.append(loop)
    return {
        "a command": npy(pickle.dumps(Call(os.system, touch))),
        "a command, protocol 0": npy(pickle.dumps(Call(os.system, touch), 0)),
        "in the array": npy(pickle.dumps(object_array([-1, Call(os.system, touch)]), 4)),
        "in a list": npy(pickle.dumps(object_array([-1, [1, Call(os.system, touch)]]), 4)),
        "a call of a call": npy(pickle.dumps(Call(getattr, Call(__import__, "os"), "system"))),
        "eval": npy(pickle.dumps(Call(eval, f"__import__('os').system({touch!r})"))),
        "numpy's own reader": npy(pickle.dumps(Call(np.load, str(canary), None, True))),
        "numpy's fromfile": npy(pickle.dumps(Call(np.fromfile, str(canary)))),
        "a class with a state": npy(pickle.dumps(stated)),
        "an instance": npy(b"(S'" + touch.encode() + b"'\nios\nsystem\n."),
        "an object": npy(b"(cos\nsystem\nS'" + touch.encode() + b"'\no."),
        "a new object": npy(b"\x80\x04cos\nsystem\n(\x8c\x04echot\x81."),
        "a persistent id": npy(b"Pcanary\n."),
        "an extension": npy(b"\x82\x01."),
        "a name in the module": npy(b"\x80\x04\x8c\x05numpy\x8c\x0aos.system2\x93."),
        "a name inside a name": npy(b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofil\x93."),
        "a huge array": npy(b"\x80\x04cnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01t\x85R."),
        "a huge dtype": npy(b"\x80\x04cnumpy\ndtype\n(X\x0a\x00\x00\x00V999999999\x89\x88tR."),
        "a huge memo": npy(b"\x80\x04]r\xff\xff\xff\x7f."),
        "huge bytes": npy(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."),
        "bytes that are not there": npy(b"\x80\x04B\xff\xff\xff\xff."),
        "a text that is not there": npy(b"\x80\x04X\xff\xff\xff\xff."),
        "a huge number": npy(b"\x80\x04\x8b\xff\xff\xff\x7f."),
        "a huge shape": npy(array, (10**12,)),
        "a negative shape": npy(array, (-2,)),
        "integers that are not there": npy(b"", (2**62,), "<i4"),
        "integers of no width": npy(b"", (10**12, 0), "<i4"),
        "too few integers": npy(bytes(12), (4,), "<i4"),
        "a cube of integers": npy(bytes(8), (2, 2, 2), "<i1"),
        "numbers": npy(bytes(16), (2,), "<f8"),
        "a damaged header": npy(array).replace(b"'shape': (2,)", b"'\\d' : -----"),
        "a deep header": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1",
        "a later version": npy(array).replace(b"NUMPY\x01", b"NUMPY\x03"),
        "an archive": b"PK\x03\x04" + bytes(100),
        "two dimensions": npy(array, (1, 2)),
        "many lists": npy(head + b"]" * 2000 + b"."),
        "one list for many": npy(pickle.dumps(object_array([[1] * 300] * 100), 4), (100,)),
        "a long list for many": npy(pickle.dumps(object_array([rows] * 9000), 4), (9000,)),
        "a text encoded again": npy(b"\x80\x02" + encode + b"R" + b"h\x00h\x01R" * 2000 + b"."),
        "a command, protocol 2": npy(pickle.dumps(Call(os.system, touch), 2)),
        "exec": npy(pickle.dumps(Call(exec, f"import os; os.system({touch!r})"))),
        "encode's neighbour": npy(b"c_codecs\nlookup\n(X\x03\x00\x00\x00hextR."),
        "another encoding": npy(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR."),
        "a list for a name": npy(b"\x80\x04\x8c\x05numpy]\x93."),
        "arrays without end": npy(
            b"\x80\x04" + core + b"_reconstruct\nq\x00(cnumpy\nndarray\nK\x00\x85C\x01btq\x01"
            b"R" + b"h\x00h\x01R" * 50_000 + b"."
        ),
        "a new object with names": npy(b"\x80\x04cos\nsystem\n)}\x92."),
        "a dictionary's items": npy(b"\x80\x04}(\x8c\x01aK\x01u."),
        "a memo that is not there": npy(b"\x80\x04h\x05."),
        "a memo before its turn": npy(b"\x80\x04]q\x05."),
        "a stack that is empty": npy(b"\x80\x04R."),
        "a mark that is not there": npy(b"\x80\x04K\x01t."),
        "an instruction cut short": npy(b"\x80\x04J\x01"),
        "no instruction to stop": npy(array[:-1]),
        "the same numbers again": npy(numbers[:-1] + b"h\x13b" * 50 + b"."),
        "depth": npy(b"\x80\x04" + deep + b"."),
        "tuples": npy(b"\x80\x04" + b")" * 100_000 + b"."),
        "much for few items": npy(head + b"K\x01" * 1_000_000 + b"."),
        "a list in itself": npy(pickle.dumps(object_array([loop, -1]), 4)),
        "an unmade array": npy(
            b"\x80\x04cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
            b"K\x00\x85C\x01bt\x52."
        ),
        "bytes for objects": npy(head + b"C\x08AAAAAAAAtb."),
        "text": npy(b"\x80\x04\x8c\x04abcd."),
        "nothing": npy(b""),
        "no pickle": npy(b"hello"),
        "no array": b"hello",
        "an empty file": b"",
        "more behind": npy(array + b"."),
        "another count": npy(array, (3,)),
        "None": npy(pickle.dumps(object_array([None, [1]]), 4)),
        "a negative row": npy(pickle.dumps(object_array([-1, [1, -1]]), 4)),
        "a bare row": npy(pickle.dumps(object_array([-1, 5]), 4)),
        "a truth": npy(pickle.dumps(object_array([-1, [True]]), 4)),
        "fractions": npy(pickle.dumps(object_array([-1, np.array([0.5])]), 4)),
        "a number of 9 bytes": npy(pickle.dumps(object_array([-1, [2**66]]), 4)),
        "a dictionary": npy(pickle.dumps({"a": 1}, 4)),
        "a list of objects": npy(pickle.dumps(object_array([-1, object_array([1])]), 4)),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", sorted(crafted(pathlib.Path("x"))))
def test_a_crafted_map_executes_nothing(tmp_path, case):
    canary = tmp_path / "canary"
    path = tmp_path / "map.npy"
    content = crafted(canary)[case]
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError) as raised:
        image_maps.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not canary.exists() and not CANARY
    assert peak < 2_000_000 + 40 * len(content)
    message = str(raised.value)
    assert message.startswith(f"{path}: expected -1 or row numbers for each item, found")
    assert message.endswith("; nothing in it was executed")
    assert "\n" not in message and len(message) < len(str(path)) + 400


def test_the_canary_would_sing(tmp_path):
    """Without this, the test above could pass because the crafted files do nothing."""
    canary = tmp_path / "canary"
    ways = ("a command", "a command, protocol 2", "in the array", "in a list", "eval", "exec")
    for case in (*ways, "an instance", "an object"):
        np.load(io.BytesIO(crafted(canary)[case]), allow_pickle=True)
        assert canary.exists(), case
        canary.unlink()


def test_damaged_maps_give_one_line_or_what_is_there(tmp_path):
    good = npy(pickle.dumps(object_array(VALUES + [np.arange(3), [np.int64(4)]]), 4), (10,))
    path = tmp_path / "map.npy"
    generator = np.random.default_rng(0)
    cut = [good[:length] for length in range(0, len(good), 3)]
    for _ in range(800):
        content = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            content[generator.integers(len(good))] = generator.integers(256)
        cut.append(bytes(content))
    refused = 0
    for content in cut:
        path.write_bytes(content)
        try:
            found = image_maps.read(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(str(path))
        else:
            assert found.rows <= 10 and (found.indices >= 0).all()
    assert refused > len(cut) // 2


def test_rows_that_are_not_there(tmp_path):
    path = tmp_path / "map.npy"
    np.save(path, object_array([[0], -1, [1, 9], [4]]))
    assert image_maps.read(path, 10).columns == 10
    with pytest.raises(ValueError, match=r"map\.npy: item 2: expected rows below 9, .* found 9"):
        image_maps.read(path, 9)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        image_maps.read(tmp_path / "none.npy")


# Import


@pytest.fixture
def published(tmp_path):
    """The layout of the published files; returns what is in them."""
    place = tmp_path / "published"
    place.mkdir()
    generator = np.random.default_rng(3)
    items = {}
    for split, rows_name, map_name, count in (
        ("train", "trn", "train", 9000),
        ("test", "tst", "test", 40),
        ("label", "lbl", "labels", 30),
    ):
        sizes = generator.integers(0, 4, count)
        rows = generator.standard_normal((sizes.sum(), 4)).astype(np.float32)
        order = generator.permutation(len(rows)).tolist()
        lists = [[order.pop() for _ in range(size)] or -1 for size in sizes]
        np.save(place / f"{rows_name}_embs_imgs_3_4_siglip2.npy", rows)
        np.save(place / f"{map_name}_imgs_384_3_map.npy", object_array(lists))
        items[split] = [rows[[] if rows_of == -1 else rows_of] for rows_of in lists]
    return place, items


def imported(place, data_dir, items, encoder="siglip2", name="x", **fields):
    uids = {split: [str(i) for i in range(len(vectors))] for split, vectors in items.items()}
    return image_import.import_published("Toy", data_dir, name, place, encoder, uids, **fields)


def check_imported(folder, items):
    opened = image_vectors.open(folder, verify=True)
    for split, vectors in items.items():
        found, count = getattr(opened, split).gather(np.arange(len(vectors)), 3)
        assert count.tolist() == [len(v) for v in vectors]
        for row, n, v in zip(found, count, vectors):
            np.testing.assert_array_equal(row[:n], v.astype(np.float16))
    return opened


def test_the_published_layout(published, tmp_path):
    place, items = published
    arguments = (place, tmp_path / "data", items)
    folder = imported(*arguments)
    assert folder == tmp_path / "data" / "Toy" / "images-x"
    opened = check_imported(folder, items)
    assert opened.encoder == "siglip2" and opened.width == 4
    assert opened.manifest["source"]["per_item"] == 3
    assert set(opened.manifest["source"]["uids"]) == set(items)
    lines = image_vectors.report(folder).splitlines()
    share = 100 * np.mean([len(v) > 0 for v in items["train"]])
    assert lines[0] == f"Toy in {folder}: siglip2, 4 wide"
    assert f"train  items 9,000  images {sum(map(len, items['train'])):,}" in lines[1]
    assert lines[1].endswith(f"with an image {share:.2f} %")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    imported(*arguments)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    add_tag(place, "minus")
    with pytest.raises(
        ValueError, match=r"encoder\.name: 'siglip2' there, 'minus' here; .* and 4 more"
    ):
        imported(*arguments, encoder="minus")
    imported(*arguments, encoder="minus", overwrite=True)
    assert image_vectors.open(folder).encoder == "minus"


def test_published_embeddings_are_compared_by_contents(published, tmp_path, monkeypatch, caplog):
    place, items = published
    folder = imported(place, tmp_path / "data", items)
    file = place / "trn_embs_imgs_3_4_siglip2.npy"
    before = file.read_bytes()
    os.utime(file, ns=(1, 1))
    assert image_import.is_current(image_vectors.open(folder), place)
    with monkeypatch.context() as patched:
        patched.setattr(image_import, "sha256", lambda _: pytest.fail("read again"))
        assert image_import.is_current(image_vectors.open(folder), place)
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"trn_embs\S*: expected .*sha256 .* found .*--overwrite"):
        image_import.is_current(image_vectors.open(folder), place)
    file.unlink()
    assert image_import.is_current(image_vectors.open(folder), place)
    assert "are not in" in caplog.text and str(place) in caplog.text


def test_which_encoders_a_folder_has_published_embeddings_of(published, tmp_path):
    place, _ = published
    assert image_import.published(place) == image_import.published(str(place)) == {"siglip2": 3}
    add_tag(place, "minus")
    assert image_import.published(place) == {"siglip2": 3, "minus": 3}
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "train_imgs_384_3_map.npy", np.zeros(3, int))
    assert not image_import.published(tmp_path / "other")
    for name in ("embs_imgs_1_256_pix.npy", "trn_embs_imgs_2_1152_siglip2.npy"):
        (tmp_path / "other" / name).write_bytes(b"")
    assert image_import.published(tmp_path / "other") == {
        "pix": 1,
        "google/siglip2-so400m-patch14-384": 2,
    }
    assert not image_import.published(tmp_path / "other" / "embs_imgs_1_256_pix.npy")
    assert not image_import.published(tmp_path / "none")


def test_counts_are_the_datasets(published, tmp_path):
    place, items = published
    wrong = items | {"test": items["test"] * 2}
    with pytest.raises(ValueError, match=r"maps of .*'test': 80.*, found .*'test': 40") as raised:
        imported(place, tmp_path / "d", wrong)
    assert str(raised.value).startswith(f"{place}: ") and not (tmp_path / "d").exists()


def test_a_crafted_map_is_not_imported(published, tmp_path):
    place, items = published
    canary = tmp_path / "canary"
    (place / "test_imgs_384_3_map.npy").write_bytes(crafted(canary)["in the array"])
    with pytest.raises(ValueError, match=r"test_imgs_384_3_map\.npy: .* was executed") as raised:
        imported(place, tmp_path / "d", items)
    assert "\n" not in str(raised.value)
    assert not canary.exists() and not (tmp_path / "d").exists()


def test_one_file_of_embeddings_for_all_splits(published, tmp_path):
    _, items = published
    (tmp_path / "one").mkdir()
    rows, first = [], 0
    for split, name in (("train", "trn"), ("test", "tst"), ("label", "lbl")):
        lists = []
        for vectors in items[split]:
            lists.append(list(range(first, first + len(vectors))) if len(vectors) else -1)
            first += len(vectors)
            rows.append(vectors)
        np.save(tmp_path / "one" / f"{name}_imgs_64_1_map.npy", object_array(lists))
    np.save(tmp_path / "one" / "embs_imgs_1_4_pix.npy", np.concatenate(rows).astype(np.float16))
    folder = imported(tmp_path / "one", tmp_path, items, encoder="pix")
    assert check_imported(folder, items).encoder == "pix"


def test_an_import_goes_on_after_an_interruption(published, tmp_path, monkeypatch):
    place, items = published
    straight = imported(place, tmp_path / "a", items)
    whole, calls = image_writer.ImageWriter.extend, []

    def interrupted(self, *arguments):
        calls.append(arguments[:2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(self, *arguments)
        self.commit()

    monkeypatch.setattr(image_writer.ImageWriter, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imported(place, tmp_path / "b", items)
    imported(place, tmp_path / "b", items)
    assert calls[2] == calls[3] == ("train", 8192)
    assert contents(tmp_path / "b" / "Toy" / "images-x") == contents(straight)


def test_known_datasets_have_known_counts_and_shares(tmp_path):
    """131K in full, two numbers wide; 79.45, 78.50 and 95.72 % of the items with an image."""
    known = {"train": (294_805, 0.7945), "test": (134_835, 0.7850), "label": (131_073, 0.9572)}

    def publish(split, count, share):
        name = {"train": "trn", "test": "tst", "label": "lbl"}[split]
        with_image = round(share * count)
        np.save(tmp_path / f"{name}_embs_imgs_3_2_siglip2.npy", np.zeros((with_image, 2), "f4"))
        index = np.full((count, 3), -1, np.int32)
        index[:with_image, 0] = np.arange(with_image)
        np.save(tmp_path / f"{name}_imgs_384_3_map.npy", index)

    def run(**counts):
        sizes = {split: count for split, (count, _) in known.items()} | counts
        uids = {split: list(map(str, range(size))) for split, size in sizes.items()}
        name = "LF-AmazonTitles-131K"
        return image_import.import_published(name, tmp_path, "x", tmp_path, "siglip2", uids)

    for split, (count, share) in known.items():
        publish(split, count, share + 0.0004)
    run()
    publish("test", 134_835, 0.7856)
    with pytest.raises(ValueError, match=r"published 78\.50 % of test items .*, found 78\.56 %"):
        run()
    publish("test", 134_834, 0.785)
    with pytest.raises(ValueError, match=r"published counts .*134835.*found .*134834"):
        run(test=134_834)


def rename(place, old, new):
    (place / old).rename(place / new)


def replace(place, name, array):
    np.save(place / name, array)


def add_tag(place, tag):
    for name in ("trn", "tst", "lbl"):
        rows = np.load(place / f"{name}_embs_imgs_3_4_siglip2.npy")
        np.save(place / f"{name}_embs_imgs_3_4_{tag}.npy", -rows)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: (p / "tst_embs_imgs_3_4_siglip2.npy").unlink(), "expected embeddings of test"),
        (lambda p: (p / "labels_imgs_384_3_map.npy").unlink(), "expected embeddings of label and"),
        (
            lambda p: rename(p, "trn_embs_imgs_3_4_siglip2.npy", "trn_embs_imgs_3_5_siglip2.npy"),
            "expected one set of",
        ),
        (
            lambda p: rename(p, "trn_embs_imgs_3_4_siglip2.npy", "trn_embs_imgs_2_4_siglip2.npy"),
            "of siglip2, found lbl_embs",
        ),
        (
            lambda p: replace(p, "tst_embs_imgs_3_4_siglip2.npy", np.zeros((99, 5), "f4")),
            r"expected floats of shape \[images, 4\], found float32 \[99, 5\]",
        ),
        (
            lambda p: replace(p, "tst_embs_imgs_3_4_siglip2.npy", np.zeros((99, 4), "i4")),
            "found int32",
        ),
        (
            lambda p: replace(p, "tst_embs_imgs_3_4_siglip2.npy", np.zeros((1, 4), "f4")),
            "expected rows below 1",
        ),
        (
            lambda p: np.save(p / "tst_embs_imgs_3_4_siglip2.npy", object_array([1, 2])),
            "expected a NumPy array of numbers",
        ),
        (
            lambda p: np.savez((p / "tst_embs_imgs_3_4_siglip2.npy").open("wb"), a=np.zeros(3)),
            "expected a NumPy array of numbers",
        ),
        (
            lambda p: (p / "tst_embs_imgs_3_4_siglip2.npy").write_bytes(npy(b"", (9, 4), "<f4")),
            "expected a NumPy array of numbers",
        ),
        (
            lambda p: replace(p, "tst_embs_imgs_3_4_siglip2.npy", np.full((99, 4), np.nan, "f4")),
            r"test: item \d+: image 0: expected numbers within .* got nan",
        ),
    ],
)
def test_published_files_that_do_not_fit(published, tmp_path, change, message):
    place, items = published
    change(place)
    with pytest.raises(ValueError, match=message) as raised:
        imported(place, tmp_path / "d", items)
    assert "\n" not in str(raised.value)
