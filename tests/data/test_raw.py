"""Readers of raw files on well-formed input, and their messages on the rest."""

import gzip
import json
import os
import pathlib
import time

import numpy as np
import pytest

from xmc_jax.data import raw
from xmc_jax.data.csr import Csr

MATRIX = "3 5\n4:1.00000 0:0.5\n\n2:1e0\n"


def write(path: pathlib.Path, text) -> pathlib.Path:
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["m.txt", "m.txt.gz"])
@pytest.mark.parametrize("change", [str, lambda t: t.replace("\n", "\r\n"), "\ufeff".__add__])
def test_label_matrix(tmp_path, name, change):
    matrix = raw.read_label_matrix(write(tmp_path / name, change(MATRIX)))
    assert (matrix.rows, matrix.columns) == (3, 5)
    np.testing.assert_array_equal(matrix.indptr, [0, 2, 2, 3])
    np.testing.assert_array_equal(matrix.indices, [4, 0, 2])
    np.testing.assert_array_equal(matrix.values, np.float32([1, 0.5, 1]))
    assert matrix.indptr.dtype == np.int64 and matrix.indices.dtype == np.int32


def test_label_matrix_spans_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_BLOCK", 2)
    lines = [f"{i}:1 {i + 1}:2" if i % 3 else "" for i in range(7)]
    matrix = raw.read_label_matrix(write(tmp_path / "m.txt", "\n".join(["7 8", *lines, ""])))
    np.testing.assert_array_equal(matrix.indptr, [0, 0, 2, 4, 4, 6, 8, 8])
    np.testing.assert_array_equal(matrix.indices, [1, 2, 2, 3, 4, 5, 5, 6])
    np.testing.assert_array_equal(matrix.values, [1, 2] * 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.txt:1: expected 'rows columns', two whole numbers, found ''"),
        ("3\n", "m.txt:1: expected 'rows columns', two whole numbers, found '3'"),
        ("4 5\n1:1\n", "m.txt: expected 4 rows as in the header, found 1"),
        ("1 5\n1:1\n2:1\n", "m.txt:3: expected 1 row as in the header, found '2:1'"),
        ("2 5\n1:1\n5:1\n", "m.txt:3: expected labels in [0, 5) with finite values, found '5:1'"),
        ("1 5\n-1:1\n", "m.txt:2: expected 'label:value' entries, found '-1:1'"),
        ("1 5\n1:1 2:nan\n", "m.txt:2: expected 'label:value' entries, found '2:nan'"),
        ("1 5\n1:1e999\n", "m.txt:2: expected labels in [0, 5) with finite values, found '1:inf'"),
        ("1 5\n1:1 2\n", "m.txt:2: expected 'label:value' entries, found '2'"),
        ("1 5\n1:1.2.3\n", "m.txt:2: expected 'label:value' entries, found '1:1.2.3'"),
    ],
)
def test_label_matrix_refusals(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        raw.read_label_matrix(write(tmp_path / "m.txt", text))
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_npz(tmp_path):
    import scipy.sparse

    dense = np.float64([[0, 2, 0], [0, 0, 0], [1, 0, 3]])
    path = tmp_path / "m.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(dense))
    matrix = raw.read_label_matrix(path)
    back = np.zeros((3, 3))
    back[matrix.row_ids(), matrix.indices] = matrix.values
    np.testing.assert_array_equal(back, dense)
    scipy.sparse.save_npz(path, scipy.sparse.csc_matrix(dense))
    with pytest.raises(ValueError, match=r"m\.npz: expected format csr, found b?'csc'"):
        raw.read_label_matrix(path)


def test_npz_pickles_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "m.npz"
    np.savez(
        path, **{k: np.array([Evil()]) for k in ("format", "shape", "indptr", "indices", "data")}
    )
    with pytest.raises(ValueError, match="without pickled objects"):
        raw.read_label_matrix(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["3 4", "3 4\n", "\ufeff3\t4\r\n", "\n3 4\n\n"])
def test_filter_of_one_line(tmp_path, text):
    pairs = raw.read_filter(write(tmp_path / "f.txt", text))
    np.testing.assert_array_equal(pairs, [[3, 4]])
    assert pairs.dtype == np.int32


def test_filter_empty_and_refusals(tmp_path):
    path = tmp_path / "f.txt"
    assert raw.read_filter(write(path, "")).shape == (0, 2)
    for text, message in [
        ("1 2\n1 -2\n", r"f\.txt:2: expected 'point label', found '1 -2'"),
        ("-1 2\n", r"f\.txt:1: expected 'point label', found '-1 2'"),
        ("1 2 3\n", r"f\.txt:1: expected 'point label', found '1 2 3'"),
        (
            "1 2\n\n4 2\n",
            r"f\.txt:3: expected a point in \[0, 4\) and a label in \[0, 9\), found '4 2'",
        ),
        ("1 99999999999999999999\n", r"f\.txt:1: .* found '1 9999"),
    ]:
        with pytest.raises(ValueError, match=message):
            raw.read_filter(write(path, text), num_points=4, num_labels=9)


def test_items_json(tmp_path):
    rows = [
        {
            "uid": "a",
            "title": "Crème",
            "content": "x\ny",
            "target_ind": [3, 1],
            "target_rel": [1, 1.0],
        },
        {"uid": "b", "title": "", "target_ind": []},
    ]
    text = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    items = raw.read_items(write(tmp_path / "trn.json.gz", text), num_labels=4)
    assert items.uids == ["a", "b"] and items.titles == ["Crème", ""]
    assert items.contents == ["x\ny", ""]
    np.testing.assert_array_equal(items.positives.indptr, [0, 2, 2])
    np.testing.assert_array_equal(items.positives.indices, [3, 1])
    assert items.positives.columns == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, found '{'"),
        ("[1]", "expected a JSON object, found '[1]'"),
        ("[" * 100_000, "expected a JSON object, found '[[["),
        ('{"uid": "a"}', "expected a text as title, found"),
        ('{"title": 3}', "expected a valid string as title, found"),
        ('{"title": "\\ud83d"}', "expected a JSON object, found"),
        ('{"title": "t", "target_ind": [9]}', "expected labels in [0, 9) as target_ind"),
        ('{"title": "t", "target_ind": [-1]}', "expected labels in [0, 9) as target_ind"),
        ('{"title": "t", "target_ind": [1.0]}', "expected a valid integer as target_ind.0"),
        ('{"title": "t", "target_ind": [true]}', "expected a valid integer as target_ind.0"),
        ('{"title": "t", "target_ind": [1], "target_rel": [NaN]}', "expected a finite number as"),
        ('{"title": "t", "target_ind": [1], "target_rel": []}', "expected 1 number as target_rel"),
    ],
)
def test_items_json_refusals(tmp_path, line, message):
    path = write(tmp_path / "trn.json", '{"title": "t", "target_ind": [1]}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        raw.read_items(path, num_labels=9)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_items_text(tmp_path):
    path = tmp_path / "lbl.raw.txt"
    items = raw.read_items(write(path, "B01->Red -> blue\nB02->Crème\n"))
    assert items.uids == ["B01", "B02"] and items.titles == ["Red -> blue", "Crème"]
    items = raw.read_items(write(path, "B01->Red\nno arrow\n"))
    assert items.uids == ["0", "1"] and items.titles == ["B01->Red", "no arrow"]
    assert items.positives is None
    write(path, "ok\nCrème\n".encode("latin-1"))
    assert raw.read_items(path, encoding="latin-1").titles == ["ok", "Crème"]
    with pytest.raises(
        ValueError, match=r"raw\.txt:2: expected utf-8 text, found byte 0xe8; if the"
    ):
        raw.read_items(path)


@pytest.mark.parametrize("cut", [0, 1, 5, -9, -1])
def test_cut_gzip(tmp_path, cut):
    path = tmp_path / "f.txt.gz"
    path.write_bytes(gzip.compress(b"1 2\n" * 1000)[:cut])
    with pytest.raises(ValueError, match=r"f\.txt\.gz: expected a whole gzip file"):
        raw.read_filter(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"f\.txt: cannot be read: No such file"):
        raw.read_filter(tmp_path / "f.txt")


def test_groups(tmp_path):
    path = tmp_path / "groups.tsv"
    assert raw.read_groups(write(path, "a\tx\nb\tx\r\n")) == {"a": "x", "b": "x"}
    with pytest.raises(ValueError, match=r"groups\.tsv:2: .*one group per uid"):
        raw.read_groups(write(path, "a\tx\na\ty\n"))


def test_csr():
    matrix = Csr(np.array([0, 3, 3, 5]), np.int32([4, 1, 4, 0, 2]), None, 5)
    np.testing.assert_array_equal(matrix.row_ids(), [0, 0, 0, 2, 2])
    taken = matrix.take(np.array([2, 1, 0, 2]))
    np.testing.assert_array_equal(taken.indptr, [0, 2, 2, 5, 7])
    np.testing.assert_array_equal(taken.indices, [0, 2, 4, 1, 4, 0, 2])
    unique = matrix.deduplicated()
    np.testing.assert_array_equal(unique.indptr, [0, 2, 2, 4])
    np.testing.assert_array_equal(unique.indices, [1, 4, 0, 2])
    assert unique.indices.dtype == np.int32 and unique.indptr.dtype == np.int64


def test_speed_on_published_files():
    root = pathlib.Path(__file__).parents[2]
    shared = pathlib.Path(os.environ.get("XMC_SHARED_DATA", root.parent / "shared" / "data"))
    folder = shared / "LF-AmazonTitles-131K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set XMC_SHARED_DATA to a folder that holds LF-AmazonTitles-131K")
    start = time.perf_counter()
    labels = raw.read_label_matrix(folder / "tst_X_Y.txt.gz")
    test = raw.read_filter(folder / "filter_labels_test.txt.gz", labels.rows, labels.columns)
    train = raw.read_filter(folder / "filter_labels_train.txt.gz", 294_805, labels.columns)
    elapsed = time.perf_counter() - start
    assert (labels.rows, labels.columns, len(labels.indices)) == (134_835, 131_073, 284_746)
    np.testing.assert_array_equal(
        np.bincount(labels.counts()), [0, 54_127, 38_371, 23_524, 12_200, 5_173, 1_440]
    )
    assert len(test) == 79_663 and len(np.unique(test[:, 0])) == 38_808
    assert np.bincount(test[:, 0]).max() == 51
    assert len(train) == 75_144
    assert elapsed < 5, f"expected under 5 s, took {elapsed:.1f}"
