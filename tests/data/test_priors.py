"""Priors of labels, from files written here and from training frequency."""

import gzip
import pathlib

import numpy as np
import pytest

from xmc_jax.data import priors
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Split, Store, lines

UIDS = ["a", "b c", "d", " é"]


@pytest.fixture
def store(tmp_path) -> Store:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "label.uids.txt").write_bytes(lines(UIDS))
    splits = {
        name: Split(np.zeros((n, 2), np.int32), np.ones(n, np.uint16))
        for name, n in (("train", 3), ("test", 1), ("label", len(UIDS)))
    }
    positives = Csr(np.array([0, 2, 3, 4]), np.array([0, 3, 3, 3], np.int32), None, len(UIDS))
    return Store(
        folder=folder,
        manifest={},
        digest="",
        _positives={"train": positives},
        _filter={},
        **splits,
    )


TSV = "e\u0301\t2.5\na\t1e3\n\nb c \t0\nunknown\t-0.0\nd\t7\n"
CSV = "name,prior,id\n?,2.5,é\n?,1e3,a\n,,\n?,0,b c\n?,7,d\n"
JSONL = """{"prior": 2.5, "id": "é"}\r
{"id": "a", "prior": 1000, "name": "more"}
{"id": "unknown", "prior": 3}
{"id": "b c", "prior": false}
{"id": "d", "prior": "7"}"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.tsv", TSV),
        ("p.txt", TSV),
        ("p.jsonl", JSONL),
        ("p.TSV.gz", TSV),
        ("p.jsonl.gz", JSONL),
        ("p.csv", TSV.replace("\t", ",")),
        ("p.csv", CSV),
        ("p.csv", CSV.replace(",", ";")),
        ("p.tsv", CSV.replace(",", "\t")),
    ],
)
def test_files_of_any_order(store, tmp_path, name, text):
    path, content = tmp_path / name, text.encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    prior = priors.read(str(path), store)
    assert prior.dtype == np.float64
    np.testing.assert_array_equal(prior, [1000, 0, 7, 2.5])


def test_labels_of_one_id_have_one_number(store, tmp_path):
    (store.folder / "label.uids.txt").write_bytes(lines(["a", "b", "a", "b"]))
    (tmp_path / "p.tsv").write_text("b\t2\na\t1\n")
    np.testing.assert_array_equal(priors.read(str(tmp_path / "p.tsv"), store), [1, 2, 1, 2])


def test_frequency_leaves_labels_without_documents(store):
    np.testing.assert_array_equal(priors.read("frequency", store), [2, 1, 1, 4])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.tsv", TSV.replace("a\t1e3\n", ""), r"p.tsv: expected a number for each of 4 labels"),
        ("p.tsv", "", r"found none for 4, the first 'a'"),
        ("p.tsv", TSV + "a\t1\n", r"p.tsv:7: expected a label once, found 'a' again"),
        (
            "p.tsv",
            "a\t-1\n",
            r"p.tsv:1: expected a finite number of at least 0 as prior, found '-1'",
        ),
        (
            "p.tsv",
            "\na\tnan\n",
            r"p.tsv:2: expected a finite number of at least 0 as prior, found 'nan'",
        ),
        ("p.tsv", "a 1\n", r"p.tsv:1: expected 2 cells, .* found 1"),
        ("p.tsv", "a\tmany\n", r"p.tsv:1: expected a finite number"),
        ("p.jsonl", '{"id": "a"}\n', r"p.jsonl: expected columns id and prior, found id"),
        ("p.jsonl", '{"id": [], "prior": 1}\n', r"p.jsonl:1: expected an id"),
        ("p.jsonl", '{"id": "a", "prior": []}\n', r"p.jsonl:1: expected a finite number"),
        ("p.jsonl", "a\t1\n", r"p.jsonl:1: expected a JSON object"),
        ("p.jsonl", '{"id": "a", "prior": 1' + 400 * "0" + "}", r"at least 0 as prior, found 1000"),
        ("p.md", "a,1\n", r"p.md: expected a name ending in .jsonl"),
        ("q.tsv", None, r"eval.augmented.prior: expected a file or 'frequency', found no file"),
    ],
)
def test_bad_files_are_answered_in_one_line(store, tmp_path, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        priors.read(str(path), store)
    assert "\n" not in str(error.value)


def test_other_encodings_are_named(store, tmp_path):
    path = pathlib.Path(tmp_path / "p.tsv")
    path.write_bytes(b"a\t1\n\xe9\t1\n")
    with pytest.raises(ValueError, match=r"p.tsv:2: expected UTF-8, found byte 0xe9"):
        priors.read(str(path), store)
