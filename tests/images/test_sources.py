"""Images of items from folders, tables, base64 lines and indexed tables; from any item on."""

import base64
import csv
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
import unicodedata

import numpy as np
import pytest

from xmc_jax.data import image_import
from xmc_jax.data import image_vectors as image_folders
from xmc_jax.data.image_vectors import STAMP
from xmc_jax.data.tables import parquet_tables
from xmc_jax.images import image_sources

ROOT = pathlib.Path(__file__).parents[2]
UIDS = ["b", "a", "x.1", "a_1", "007", "é ü", "none", "zz"]
# What each item has; the bytes need not be pictures here.
IMAGES = {
    "b": [b"b0"],
    "a": [b"a0", b"a1", b"a2"],
    "x.1": [b"x0", b"x1"],
    "a_1": [b"u0"],
    "007": [b"\x00\xff" * 50],
    "é ü": [b"e0", b"e1"],
    "zz": [b"z%d" % k for k in range(12)],
}
EXPECTED = [
    (item, k, data) for item, uid in enumerate(UIDS) for k, data in enumerate(IMAGES.get(uid, []))
]


def first(limit: int, item: int = 0) -> list:
    return [found for found in EXPECTED if found[1] < limit and found[0] >= item]


def rows() -> list[tuple[str, bytes]]:
    return [(uid, data) for uid in UIDS for data in IMAGES.get(uid, [])]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parquet(path, columns: dict, **options) -> pathlib.Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


def fetched(folder):
    """What `vision.fetch` makes; where it failed there are no bytes."""
    (folder / "images").mkdir()
    taken = [(uid, k, data) for uid, k, data in spread() for _ in range(2)]
    for number in range(0, len(taken), 10):
        part = taken[number : number + 10]
        failed = [at % 2 == 0 for at in range(len(part))]
        columns = {
            "id": [uid for uid, _, _ in part],
            "k": [k for _, k, _ in part],
            "bytes": [None if f else data for f, (_, _, data) in zip(failed, part)],
            "error": ["status: 404" if f else None for f in failed],
        }
        parquet(folder / "images" / f"{number // 10:05d}.parquet", columns)
    for name in ("failures.jsonl", "inputs.json", "report.json"):
        (folder / name).write_text("{}")
    return folder


def spread() -> list[tuple[str, int, bytes]]:
    """Items in another order, an item's images in theirs."""
    found = [(uid, k, data) for uid in UIDS for k, data in enumerate(IMAGES.get(uid, []))]
    return sorted(found, key=lambda image: (image[1], -UIDS.index(image[0])))


def object_array(values: list) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def image_files(folder: pathlib.Path) -> pathlib.Path:
    """One flat folder; b by its bare uid, x.1 in a folder of its own."""
    folder.mkdir(parents=True)
    (folder / "x.1").mkdir()
    for uid, images in IMAGES.items():
        for k, data in enumerate(images):
            name = {"b": "b", "x.1": f"x.1/{k}.png"}.get(uid, f"{uid}_{k}.jpg")
            (folder / name).write_bytes(data)
    os.rename(folder / "a_0.jpg", folder / "a.webp")  # the one without a number comes first
    os.rename(folder / "a_1_0.jpg", folder / "a_1.png")  # not the second image of a
    os.rename(folder / "a_1.jpg", folder / "a_01.jpg")
    for other in (".DS_Store", "stranger.png", "Thumbs.db", "b_x.png"):
        (folder / other).write_bytes(b"no")
    return folder


def table_parquet(folder, order=None, **options):
    taken = rows() if order is None else [rows()[i] for i in order]
    uids, data = zip(*taken)
    columns = {"uid": list(uids), "bytes": list(data), "more": [1] * len(uids)}
    return parquet(folder / "t.parquet", columns, **options)


def table_lists(folder):
    columns = {"id": [*UIDS, "other"], "image": [IMAGES.get(uid) for uid in UIDS] + [[b"?"]]}
    return parquet(folder / "t.parquet", columns)


def table_structs(folder):
    (folder / "x0.png").write_bytes(b"x0")
    images = [{"bytes": d, "path": "?"} if d != b"x0" else {"path": "x0.png"} for _, d in rows()]
    return parquet(folder / "t.parquet", {"uid": [u for u, _ in rows()], "image": images})


def table_by_index(folder):
    columns = {"index": [UIDS.index(u) for u, _ in rows()], "base64": [text(d) for _, d in rows()]}
    return parquet(folder / "t.parquet", columns)


def table_paths(folder):
    for number, (_, data) in enumerate(rows()):
        (folder / f"{number}.jpg").write_bytes(data)
    paths = [f"{number}.jpg" for number in range(len(rows()))]
    paths[3] = str(folder / paths[3])
    return parquet(folder / "t.parquet", {"uid": [u for u, _ in rows()], "path": paths})


def shards(folder):
    """Several Parquet files of a split beside another's."""
    pyarrow = pytest.importorskip("pyarrow")
    half = len(rows()) // 2
    for number, part in enumerate((rows()[:0], rows()[:half], rows()[half:])):
        uids = pyarrow.array([uid for uid, _ in part], pyarrow.string())
        data = pyarrow.array([data for _, data in part], pyarrow.large_binary())
        parquet(folder / f"test-{number:05d}.parquet", {"uid": uids, "bytes": data})
    parquet(folder / "trn.parquet", {"uid": ["b"], "bytes": [b"wrong"]})
    return folder


def table_jsonl(folder):
    lines = [json.dumps({"uid": "other", "n": 1})]
    for uid in reversed(UIDS):
        images = [text(data) for data in IMAGES.get(uid, [])]
        lines.append(json.dumps({"uid": uid, "base64": images if len(images) != 1 else images[0]}))
        lines.append("")
    (folder / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return folder / "t.jsonl"


def table_csv(folder):
    with open(folder / "tst.csv", "w", encoding="utf-8-sig", newline="") as file:
        out = csv.writer(file)
        out.writerow(["note", "uid", "base64"])
        for uid, data in rows():
            out.writerow(['two\nlines, "quoted"', uid, "data:image/png;base64," + text(data)])
            file.write("\n")
            out.writerow(["without an image", uid, ""])
    return folder


def table_gzip(folder):
    path = table_jsonl(folder)
    (folder / "T.JSONL.GZ").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return folder


def table_utf16(folder):
    """As Excel writes "Unicode text"; keys with blanks around them and in the form NFD."""
    lines = ["uid\tbase64"]
    lines += [f" {unicodedata.normalize('NFD', uid)} \t{text(data)}" for uid, data in rows()]
    return write(folder / "t.csv", "\r\n".join(lines).encode("utf-16"))


def table_list(folder):
    listed = [{"uid": uid, "base64": text(data)} for uid, data in rows()]
    return write(folder / "t.json", json.dumps(listed, indent=1).encode())


def binary(folder):
    """ViXML's layout: rows in the order of arrival, a list of rows or -1 per item."""
    generator = np.random.default_rng(0)
    places = generator.permutation(len(rows())).tolist()
    lines: list[str] = [""] * len(rows())
    lists, at = [], iter(places)
    for uid in UIDS:
        found = []
        for data in IMAGES.get(uid, []):
            found.append(next(at))
            lines[found[-1]] = text(data) + "\n"
        lists.append(found or -1)
    (folder / "test_imgs_384_3.bin").write_text("".join(lines))
    np.save(folder / "test_imgs_384_3_map.npy", object_array(lists))
    (folder / "train_imgs_384_3.bin").write_text("?")
    parquet(folder / "img_urls.parquet", {"id": UIDS, "url": UIDS})
    return folder


def binary_file(folder):
    return binary(folder) / "test_imgs_384_3.bin"


KINDS = {
    "files": lambda p: image_files(p / "f"),
    "files of a split": lambda p: image_files(p / "f" / "test").parent,
    "Parquet": table_parquet,
    "Parquet, row groups of two": lambda p: table_parquet(p, row_group_size=2),
    "Parquet of lists": table_lists,
    "Parquet of structs": table_structs,
    "Parquet by index": table_by_index,
    "Parquet of paths": table_paths,
    "Parquet in parts": shards,
    "what fetch makes": fetched,
    "JSONL": table_jsonl,
    "CSV": table_csv,
    "gzip in capitals": table_gzip,
    "tabs in UTF-16": table_utf16,
    "one JSON list": table_list,
    "base64 lines": binary,
    "base64 lines, the file": binary_file,
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_each_kind(tmp_path, kind):
    place = KINDS[kind](tmp_path)
    source = image_sources.open(place, "test", UIDS)
    assert len(source) == len(UIDS) and source.items_with_images >= len(IMAGES)
    for limit in (1, 2, 3, 20):
        for item in range(len(UIDS) + 1):
            rest = np.arange(item, len(UIDS))
            assert list(source.read(limit, rest)) == first(limit, item), (limit, item)
        some = np.array([0, 3, 4])
        taken = [found for found in first(limit) if found[0] in some]
        assert list(source.read(limit, some)) == taken
    assert list(source.read(0)) == []
    stamps = source.stamps()
    assert stamps.shape == (len(UIDS), STAMP) and stamps.any(1).tolist() == [
        bool(count) for count in source.listed.counts()
    ]
    np.testing.assert_array_equal(stamps, image_sources.open(place, "test", UIDS).stamps())
    for path in place.rglob("*") if place.is_dir() else [place]:
        os.utime(path, ns=(1, 1))
    changed = (image_sources.open(place, "test", UIDS).stamps() != stamps).any(1)
    np.testing.assert_array_equal(changed, stamps.any(1))


def test_an_unfinished_fetch_is_refused(tmp_path):
    (fetched(tmp_path) / "report.json").unlink()
    with pytest.raises(ValueError, match="found an unfinished folder; run the same"):
        image_sources.open(tmp_path, "test", UIDS)


def test_what_could_not_be_fetched_is_not_listed(tmp_path):
    source = image_sources.open(fetched(tmp_path), "test", [*UIDS, "nobody"])
    assert source.items_with_images == len(IMAGES)
    assert source.listed.counts().tolist() == [*(len(IMAGES.get(uid, [])) for uid in UIDS), 0]


def test_empty_cells_do_not_begin_the_file_again(tmp_path, monkeypatch):
    """Where the first K of an item are null, others are read; the file is still read forwards."""
    count, begun = 200, []
    columns = {
        "index": np.repeat(np.arange(count), 3).tolist(),
        "bytes": [None, b"a", b"b"] * count,
    }
    path = parquet(tmp_path / "t.parquet", columns, row_group_size=30)
    whole = parquet_tables.ParquetTable.batches
    monkeypatch.setattr(
        parquet_tables.ParquetTable,
        "batches",
        lambda self, *arguments: begun.append(arguments) or whole(self, *arguments),
    )
    source = image_sources.open(path, "test", [str(i) for i in range(count)])
    begun.clear()
    assert list(source.read(2)) == [(i, k, b"ab"[k : k + 1]) for i in range(count) for k in (0, 1)]
    assert len(begun) == 2  # the first two of every item, and what is read in their stead


def test_the_layout_of_the_debian_icons(tmp_path):
    """Embeddings in ViXML's files and pictures with an index in one folder; both can be had."""
    indices = {"trn": [2, -1, 0, 2], "tst": [-1, 1], "lbl": [1, -1, -1]}
    data = [b"p0", b"p1", b"p2"]
    columns = {"row": [0, 1, 2], "icon": ["x", "y", "z"], "png": data}
    parquet(tmp_path / "images.parquet", columns)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "embs_imgs_1_4_pix.npy", rows)
    for prefix, index in indices.items():
        np.save(tmp_path / f"{prefix}_img_index.npy", np.array(index, np.int32))
        lists = [-1 if row < 0 else [row] for row in index]
        np.save(tmp_path / f"{prefix}_imgs_64_1_map.npy", object_array(lists))
    uids = {"train": list("abcd"), "test": list("ef"), "label": list("ghi")}
    folder = image_import.import_published("Icons", tmp_path / "out", "p", tmp_path, "pix", uids)
    store = image_folders.open(folder, verify=True)
    for (split, vectors), index in zip(
        (("train", store.train), ("test", store.test), ("label", store.label)), indices.values()
    ):
        found, count = vectors.gather(np.arange(len(index)), 2)
        assert count.tolist() == [int(row >= 0) for row in index]
        np.testing.assert_array_equal(
            found[:, 0], [rows[i] if i >= 0 else rows[0] * 0 for i in index]
        )
        source = image_sources.open(tmp_path, split, [str(i) for i in range(len(index))])
        assert list(source.read(3)) == [
            (i, 0, data[row]) for i, row in enumerate(index) if row >= 0
        ]


def test_lists_in_lists_are_no_images(tmp_path):
    deep = "[" * 900 + "]" * 900
    path = write(
        tmp_path / "t.jsonl",
        b'{"uid": "a", "base64": ["%s", %s, {"bytes": {}}, 7]}'
        % (text(b"good").encode(), deep.encode()),
    )
    assert [image for *_, image in image_sources.open(path, "test", ["a"]).read(9)] == [
        b"good",
        "a cell of type list in column base64",
        "a cell of type int in column base64",
    ]


def test_hidden_files_are_nobodys(tmp_path):
    table_jsonl(tmp_path)
    write(tmp_path / "._t.jsonl", b"\0")
    assert list(image_sources.open(tmp_path, "test", UIDS).read(3)) == first(3)


def test_indexed_rows(tmp_path):
    """The layout of MM-DebianTitles-3K: a picture may belong to several items."""
    parquet(tmp_path / "images.parquet", {"row": [0, 1, 2], "png": [b"p0", b"p1", b"p2"]})
    np.save(tmp_path / "tst_img_index.npy", np.array([2, -1, 0, 2], np.int32))
    source = image_sources.open(tmp_path, "test", list("abcd"))
    assert list(source.read(3)) == [(0, 0, b"p2"), (2, 0, b"p0"), (3, 0, b"p2")]
    assert list(source.read(3, np.arange(2, 4))) == [(2, 0, b"p0"), (3, 0, b"p2")]
    with pytest.raises(ValueError, match="expected 3 items, as the split has, got 4"):
        image_sources.open(tmp_path, "test", list("abc"))
    np.save(tmp_path / "tst_img_index.npy", np.array([3], np.int32))
    with pytest.raises(ValueError, match="item 0: expected rows below 3"):
        image_sources.open(tmp_path, "test", ["a"])


def test_files_by_index(tmp_path):
    for name in ("0.png", "2_1.png", "2_0.png", "3.png", "007.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    source = image_sources.open(tmp_path, "label", ["b", "c", "d"], by="index")
    assert list(source.read(9)) == [(0, 0, b"0.png"), (2, 0, b"2_0.png"), (2, 1, b"2_1.png")]
    assert list(image_sources.open(tmp_path, "label", ["b", "007"]).read(9, np.array([1]))) == [
        (1, 0, b"007.png")
    ]


def entries_that_are_no_images(folder: pathlib.Path) -> pathlib.Path:
    (folder / "a.png").write_bytes(b"a")
    (folder / "b").mkdir()
    (folder / "b" / "1.png").write_bytes(b"b")
    (folder / "b" / "small").mkdir()
    os.mkfifo(folder / "other.png")
    (folder / "loop").symlink_to("loop")
    (folder / "e\u0301").symlink_to("nowhere")
    (folder / ".hidden").write_bytes(b"")
    return folder


def splits_in_capitals(folder: pathlib.Path) -> pathlib.Path:
    for split in ("Train", "TEST", "Labels"):
        (folder / split).mkdir()
    (folder / "TEST" / "a.PNG").write_bytes(b"a")
    (folder / "TEST" / "b_1.JPeG").write_bytes(b"b")
    return folder


def pictures_beside_a_table_of_items(folder: pathlib.Path) -> pathlib.Path:
    (folder / "products.csv").write_bytes(b"id,title\na,tea\n")
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n')
    (folder / "a.png").write_bytes(b"a")
    (folder / "b.png").write_bytes(b"b")
    return folder


def a_table_of_images_beside_another(folder: pathlib.Path) -> pathlib.Path:
    (folder / "products.csv").write_bytes(b"id,title\na,tea\n")
    (folder / "Pictures.CSV").write_bytes(f"id,base64\na,{text(b'a')}\nb,{text(b'b')}\n".encode())
    return folder


def paths_of_other_systems(folder: pathlib.Path) -> pathlib.Path:
    (folder / "sub").mkdir()
    (folder / "sub" / "1.png").write_bytes(b"a")
    (folder / "e\u0301.png").write_bytes(b"b")
    lines = ['{"uid": "a", "path": " sub\\\\1.png "}', '{"uid": "b", "path": "\u00e9.png"}']
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        entries_that_are_no_images,
        splits_in_capitals,
        pictures_beside_a_table_of_items,
        a_table_of_images_beside_another,
        paths_of_other_systems,
    ],
)
def test_folders_as_people_have_them(tmp_path, make):
    found = list(image_sources.open(make(tmp_path), "test", ["a", "b", "c"]).read(2))
    assert found == [(0, 0, b"a"), (1, 0, b"b")]


def test_items_of_the_same_uid_have_the_same_images(tmp_path):
    source = image_sources.open(table_jsonl(tmp_path), "train", ["b", "zz", "b", "nobody"])
    assert list(source.read(1)) == [(0, 0, b"b0"), (1, 0, b"z0"), (2, 0, b"b0")]


@pytest.mark.parametrize("seed", range(4))
def test_a_table_in_any_order(tmp_path, monkeypatch, seed):
    """Rows are reordered in steps; a step that would hold too much is taken in halves."""
    generator = np.random.default_rng(seed)
    monkeypatch.setattr(parquet_tables, "_FIRST_ROWS", int(generator.integers(2, 9)))
    monkeypatch.setattr(parquet_tables, "_HELD_ROWS", int(generator.integers(2, 9)))
    monkeypatch.setattr(parquet_tables, "_HELD_BYTES", int(generator.integers(1, 200)))
    monkeypatch.setattr(parquet_tables, "_BATCH_BYTES", int(generator.integers(1, 100)))
    order = generator.permutation(len(rows()))
    place = table_parquet(tmp_path, order, row_group_size=int(generator.integers(1, 9)))
    source = image_sources.open(place, "test", UIDS)
    by_uid = {uid: [rows()[i][1] for i in order if rows()[i][0] == uid] for uid in UIDS}
    expected = [(i, k, d) for i, uid in enumerate(UIDS) for k, d in enumerate(by_uid[uid])]
    assert list(source.read(99)) == expected
    assert list(source.read(99, np.arange(3, len(UIDS)))) == [
        found for found in expected if found[0] >= 3
    ]


def test_why_an_image_is_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "good").write_bytes(b"good")
    (tmp_path / "large").write_bytes(bytes(101))
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    cells = ["good", "gone/x.jpg", "large", "empty", "folder", "pipe", "a\0b", None, "good"]
    path = parquet(tmp_path / "t.parquet", {"index": [0] * 7 + [1] * 2, "path": cells})
    source = image_sources.open(path, "test", ["u", "v"], max_bytes=100)
    assert list(source.read(9)) == [
        (0, 0, b"good"),
        (0, 1, "no such file or directory: gone/x.jpg"),
        (0, 2, "101 bytes, more than 100"),
        (0, 3, "an empty file: empty"),
        (0, 4, "not a file: folder"),
        (0, 5, "not a file: pipe"),
        (0, 6, r"not a path: 'a\x00b'"),
        (1, 0, b"good"),
    ]
    assert list(source.read(2)) == [*list(source.read(9))[:2], (1, 0, b"good")]
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "u.png").write_bytes(bytes(101))
    files = image_sources.open(tmp_path / "files", "test", ["u"], max_bytes=100)
    assert list(files.read(3)) == [(0, 0, "101 bytes, more than 100")]


def table_jsonl_of_paths(folder: pathlib.Path, names: list[str]) -> pathlib.Path:
    lines = [json.dumps({"index": 0, "path": name}) + "\n" for name in names]
    return write(folder / "t.jsonl", "".join(lines).encode())


def table_parquet_of_structs(folder: pathlib.Path, names: list[str]) -> pathlib.Path:
    cells = [{"bytes": None, "path": name} for name in names]
    return parquet(folder / "t.parquet", {"index": [0] * len(names), "image": cells})


@pytest.mark.parametrize("make", [table_jsonl_of_paths, table_parquet_of_structs])
def test_paths_of_a_table_stay_in_its_folder_unless_allowed(tmp_path, make):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "link").symlink_to("../secret")
    (tmp_path / "t" / "good").write_bytes(b"good")
    names = ["../secret", str(tmp_path / "secret"), "link", "sub/../good"]
    (tmp_path / "t" / "sub").mkdir()
    place = make(tmp_path / "t", names)
    found = [image for *_, image in image_sources.open(place, "test", ["u"]).read(9)]
    assert found[-1] == b"good"
    for name, reason in zip(names[:-1], found):
        assert reason.startswith(f"'{name}': expected a path within the folder of its table")
    allowed = image_sources.Place(place, allow_paths=True).open("test", ["u"])
    assert [image for *_, image in allowed.read(9)] == [*[b"secret"] * 3, b"good"]


@pytest.mark.parametrize("kind", ["bytes", "base64"])
def test_bytes_that_are_no_image_file(tmp_path, kind):
    data = [b"x" * 100, b"x" * 101, b""]
    cells = [text(d) if kind == "base64" else d for d in data]
    cells += ["%%%", "é"] if kind == "base64" else []
    path = parquet(tmp_path / "t.parquet", {"index": [0] * len(cells), kind: cells})
    found = [image for *_, image in image_sources.open(path, "test", ["u"], max_bytes=100).read(9)]
    assert found[0] == data[0]
    if kind == "bytes":
        assert found[1:] == ["101 bytes, more than 100", "no bytes"]
    else:
        assert found[1:] == [data[1], "not base64", "not base64"]  # decoding looks at it again
    lines = tmp_path / "test_imgs_1_1.bin"
    lines.write_text("%%\n\n" + text(b"y" * 2000) + "\n" + text(b"y"))
    np.save(tmp_path / "test_imgs_1_1_map.npy", np.array([[0, 1, 2, 3]]))
    found = [image for *_, image in image_sources.open(lines, "test", ["u"], max_bytes=100).read(9)]
    assert found == ["not base64", "no bytes", "a line of 2669 bytes, more than 1157", b"y"]


def write(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "none", "expected a file or folder of images, found none"),
        (lambda p: write(p / "x.zip", b""), "found another file; unpack archives"),
        (lambda p: write(p / "x.parquet", b"PAR1"), "expected a Parquet file, found a damaged one"),
        (
            lambda p: write(p / "x.jsonl", b""),
            "expected a column uid, id, index and one .* found none",
        ),
        (lambda p: write(p / "x.jsonl", b'{"uid": 1}'), "expected a column uid, id, index and one"),
        (
            lambda p: write(p / "x.jsonl", b'{"uid": "a", "path": "b"}\n{'),
            r"x\.jsonl:2: expected a JSON object",
        ),
        (
            lambda p: write(p / "x.jsonl", b'{"uid": "a", "path": "b"}\n[]'),
            ":2: expected a JSON object",
        ),
        (
            lambda p: write(p / "x.jsonl", b'{"uid": [1], "path": "b"}'),
            r"x\.jsonl:1: column uid: .* found \[1\]",
        ),
        (
            lambda p: write(p / "x.jsonl", b'{"path": "b", "uid": null}'),
            "1: column uid: .* found nothing",
        ),
        (lambda p: write(p / "x.jsonl", b'{"id": "a", "url": "http"}'), "xmc_jax.images.fetch"),
        (lambda p: write(p / "x.csv", b"uid,urls\na,b\n"), "found their URLs; download them first"),
        (
            lambda p: write(p / "x.csv", b"index,path\n0,b\n3,b\n"),
            "x.csv:3: column index: expected a number below 2",
        ),
        (
            lambda p: write(p / "x.csv", b"index,path\n-1,b\n"),
            "x.csv:2: column index: expected a number below 2",
        ),
        (lambda p: write(p / "x.csv", b'uid,path\n"a,b'), r"x\.csv:2: expected CSV, found a quote"),
        (lambda p: write(p / "x.csv", b"uid,path\n\xff,b"), r"x\.csv:2: expected UTF-8"),
        (lambda p: write(p / "x.bin", b"aaaa\n"), r"expected x_map\.npy beside it, found none"),
        (
            lambda p: [write(p / f"test_imgs_{n}_3.bin", b"") for n in (1, 2)] and p,
            "expected one .bin of test, found test_imgs_1_3.bin, test_imgs_2_3.bin",
        ),
        (lambda p: [write(p / n, b"") for n in ("a.csv", "b.csv")] and p, "found a.csv, b.csv"),
        (lambda p: [write(p / n, b"") for n in ("a.csv", "b.parquet")] and p, "a damaged one"),
        (lambda p: write(p / "train.csv", b"").parent, "one table of test, .* found train.csv"),
        (lambda p: (p / "train").mkdir() or p, "expected a folder test, as another split has"),
    ],
)
def test_places_that_hold_something_else(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        image_sources.open(make(tmp_path), "test", ["a", "b"])
    assert "\n" not in str(raised.value)


def test_arguments_and_maps_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="expected split train, test or label by uid or index"):
        image_sources.open(tmp_path, "valid", [])
    with pytest.raises(ValueError, match="got 'test' by 'name'"):
        image_sources.open(tmp_path, "test", [], by="name")
    write(tmp_path / "x.bin", b"aaaa\naaaa")
    np.save(tmp_path / "x_map.npy", object_array([[2], -1]))
    with pytest.raises(ValueError, match="item 0: expected rows below 2"):
        image_sources.open(tmp_path / "x.bin", "test", ["a", "b"])
    np.save(tmp_path / "x_map.npy", object_array([[1], -1]))
    with pytest.raises(ValueError, match="expected 3 items, as the split has, got 2"):
        image_sources.open(tmp_path / "x.bin", "test", ["a", "b", "c"])
    assert list(image_sources.open(tmp_path / "x.bin", "test", ["a", "b"]).read(1)) == [
        (0, 0, b"i\xa6\x9a")
    ]


def test_damage_inside_a_parquet_file_is_said(tmp_path):
    path = table_parquet(tmp_path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = content.index(b"z5") - 40
    content[start : start + 60] = bytes(range(60))
    path.write_bytes(content)
    try:
        found = list(image_sources.open(path, "test", UIDS).read(99))
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert found != EXPECTED


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = table_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'pip install "xmc_jax\[vision\]"'):
        image_sources.open(path, "test", UIDS)
    assert list(image_sources.open(image_files(tmp_path / "f"), "test", UIDS).read(3)) == first(3)


def test_pyarrow_is_imported_only_for_parquet(tmp_path):
    image_files(tmp_path / "f")
    code = (
        "import sys; from xmc_jax.images import image_sources; "
        f"assert list(image_sources.open({str(tmp_path / 'f')!r}, 'test', ['b']).read(1)); "
        "assert 'pyarrow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    """100 MB of images in one row group, and as many in one file of lines; far less is held."""
    pyarrow = pytest.importorskip("pyarrow")
    size, count = 200_000, 500
    data = [bytes([i % 256]) * size for i in range(count)]
    uids = [str(i) for i in range(count)]
    path = parquet(
        tmp_path / "t.parquet",
        {"uid": uids, "bytes": data},
        compression="none",
        use_dictionary=False,
        write_batch_size=8,  # else it makes one page of up to 1,024 images
    )
    with open(tmp_path / "x.bin", "wb") as file:
        file.writelines(base64.b64encode(image) + b"\n" for image in data)
    np.save(tmp_path / "x_map.npy", np.arange(count)[::-1])
    del data
    arrow = pyarrow.default_memory_pool()
    before, arrow_peak = arrow.bytes_allocated(), 0
    tracemalloc.start()
    for source, backwards in ((path, False), (tmp_path / "x.bin", True)):
        for item, k, image in image_sources.open(source, "test", uids).read(3):
            number = count - 1 - item if backwards else item
            assert k == 0 and len(image) == size and image[0] == number % 256
            arrow_peak = max(arrow_peak, arrow.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6 and arrow_peak < 25e6
