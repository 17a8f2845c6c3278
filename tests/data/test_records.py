"""Own records: the same whatever the format; split, checked, counted; bad ones in one line."""

import collections
import csv
import gzip
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tracemalloc

import hypothesis
import numpy as np
import pytest
import write_faults
from hypothesis import strategies as st

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import bundled, holdout, prepare, raw, raw_folder, store
from xmc_jax.data.records import data_report, own_records
from xmc_jax.data.records.own_records import RecordsConfig
from xmc_jax.data.tables import cell_values, table_format
from xmc_jax.files import manifests
from xmc_jax.training import build

pa = pytest.importorskip("pyarrow", reason="Parquet needs the extra vision")
pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra vision")

ROOT = pathlib.Path(__file__).parents[2]
DEBIAN = "LF-DebianTitles-3K"
KINDS = ("jsonl", "csv", "parquet")
settings = hypothesis.settings(
    max_examples=30,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """A table of rows that all have the same keys, as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        return path
    text = io.StringIO()
    if ".csv" in path.name:
        writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for row in rows:
            lists = {key: json.dumps(v) for key, v in row.items() if isinstance(v, list)}
            writer.writerow(row | lists)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rewrite(folder: pathlib.Path, out: pathlib.Path, kind: str) -> pathlib.Path:
    """Raw Extreme Classification files with groups as records of a kind, labels named by ids."""
    labels = raw.read_items(folder / "lbl.json.gz")
    groups = raw.read_groups(folder / "groups.tsv.gz")
    for split, name in (("train", "trn"), ("test", "tst")):
        items = raw.read_items(folder / f"{name}.json.gz", num_labels=len(labels.uids))
        filtered: list[list[str]] = [[] for _ in items.uids]
        for document, label in raw.read_filter(folder / f"filter_labels_{split}.txt").tolist():
            filtered[document].append(labels.uids[label])
        ids = np.split(items.positives.indices, items.positives.indptr[1:-1])
        rows = [
            {
                "id": uid,
                "text": title,
                "labels": [labels.uids[i] for i in own],
                "filter": "|".join(not_own),
                "group": groups[uid],
            }
            for uid, title, own, not_own in zip(items.uids, items.titles, ids, filtered)
        ]
        write(out / f"{split}.{kind}", rows)
    rows = [{"id": uid, "text": title} for uid, title in zip(labels.uids, labels.titles)]
    write(out / f"labels.{kind}", rows)
    return out


def contents(folder: pathlib.Path, *but: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in but}


def convert(folder: pathlib.Path, out: pathlib.Path, **options) -> dict:
    """The report."""
    return own_records.convert(RecordsConfig(folder, **options), out)[0]


def read(folder: pathlib.Path) -> raw_folder.RawDataset:
    return raw_folder.read(raw_folder.find(folder), "Own", "utf-8")


# The same data in any format


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """The bundled dataset, rewritten as records of each kind."""
    folder = tmp_path_factory.mktemp("debian")
    return {kind: rewrite(bundled.path(DEBIAN), folder / kind, kind) for kind in KINDS}


def prepared(out: pathlib.Path, *flags: str) -> pathlib.Path:
    assert prepare.main([f"--dataset={DEBIAN}", f"--out={out}", "--max_length=24", *flags]) == 0
    return out / DEBIAN / "minilm-l6-packaged-24"


@pytest.mark.slow
def test_real_data_as_records_is_the_same_dataset(debian, tmp_path, capsys):
    expected = contents(prepared(tmp_path / "bundled"))
    found, raws = {}, {}
    for kind, folder in debian.items():
        found[kind] = contents(prepared(tmp_path / kind, f"--records={folder}"))
        raws[kind] = contents(tmp_path / kind / DEBIAN / "raw", "records.json")
        assert (
            "pairs of a document and a label         23,428       3,618" in capsys.readouterr().out
        )
    assert found["jsonl"] == found["csv"] == found["parquet"]
    assert raws["jsonl"] == raws["csv"] == raws["parquet"]
    names = {name for name, content in expected.items() if found["csv"].get(name) != content}
    assert found["csv"].keys() == expected.keys() and names == {"manifest.json"}
    manifests = [json.loads(one["manifest.json"]) for one in (expected, found["csv"])]
    files = {role: one["name"] for role, one in manifests[1]["raw"].items()}
    assert files == {
        "train": "trn.json",
        "test": "tst.json",
        "label": "lbl.json",
        "filter": "filter_labels_test.txt",
        "groups": "groups.tsv",
    }
    for manifest in manifests:
        del manifest["raw"]
    assert manifests[0] == manifests[1]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ids = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), min_size=1, max_size=6
)
ids = ids.map(cell_values.normal).filter(bool)


@st.composite
def datasets(draw):
    """Labels, documents for training and, perhaps, for testing."""
    names = draw(st.lists(ids, min_size=1, max_size=5, unique=True))
    labels = [{"id": name, "title": draw(texts), "content": draw(texts)} for name in names]
    documents = [
        {
            "id": name,
            "title": draw(texts),
            "content": draw(texts),
            "labels": draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)),
            "filter": draw(st.lists(st.sampled_from(names), max_size=2)),
            "group": draw(st.sampled_from(["", "a", "b"])),
            "images": draw(
                st.lists(st.sampled_from(["a.png", 'b "|".png', "ü\n.png"]), max_size=2)
            ),
        }
        for name in draw(st.lists(ids, min_size=2, max_size=8, unique=True))
    ]
    for document in documents:
        document["weights"] = [draw(st.sampled_from([0.5, 1.0, 3.0])) for _ in document["labels"]]
    count = draw(st.integers(0, len(documents) - 1))
    return labels, documents[count:], documents[:count]


@pytest.mark.slow
@settings
@hypothesis.given(datasets())
def test_round_trip(tmp_path_factory, dataset):
    """What was written is read, and all formats give the same bytes or the same error."""
    labels, train, test = dataset
    root = tmp_path_factory.mktemp("trip")
    outcomes = []
    for kind in ("jsonl", "csv", "parquet", "jsonl.gz", "csv.gz"):
        folder = root / kind
        for name, rows in (("label", labels), ("train", train), ("test", test)):
            if rows:
                write(folder / f"{name}.{kind}", rows)
        out = root / "out" / kind / "raw"
        try:
            convert(folder, out, test_fraction=0.3)
        except ValueError as error:  # one group, or a test document whose labels are all filtered
            outcomes.append(str(error).split(": ", 1)[1])
            continue
        found = contents(out, "records.json")
        outcomes.append({n: c.replace(f"/{kind}/".encode(), b"/") for n, c in found.items()})
    assert all(outcome == outcomes[0] for outcome in outcomes)
    if isinstance(outcomes[0], dict):
        check_raw(root / "out" / "csv" / "raw", root / "csv", labels, train, test)


def check_raw(folder, source, labels, train, test):
    """A raw folder against the records, by what the raw files mean."""
    found = {
        split: [json.loads(line) for line in (folder / f"{name}.json").open(encoding="utf-8")]
        for split, name in (("train", "trn"), ("test", "tst"), ("label", "lbl"))
    }
    assert [(x["uid"], x["title"], x["content"]) for x in found["label"]] == [
        (label["id"], label["title"], label["content"]) for label in labels
    ]
    row = {label["id"]: number for number, label in enumerate(labels)}
    of = {document["id"]: document for document in (*train, *test)}
    order = list(of)
    for split, given in (("train", train), ("test", test)):
        uids = [item["uid"] for item in found[split]]
        assert uids == [d["id"] for d in given] if test else uids == sorted(uids, key=order.index)
        filtered = raw.read_filter(folder / f"filter_labels_{split}.txt").tolist()
        for number, item in enumerate(found[split]):
            document = of[item["uid"]]
            assert (item["title"], item["content"]) == (document["title"], document["content"])
            gone = set(document["filter"])
            assert sorted(label for n, label in filtered if n == number) == sorted(
                row[name] for name in gone
            )
            # Of a label that is named again, the first weight counts.
            weight_of = dict(reversed([*zip(document["labels"], document["weights"])]))
            kept = [
                (row[name], weight_of[name])
                for name in dict.fromkeys(document["labels"])
                if split == "train" or name not in gone
            ]
            assert list(zip(item["target_ind"], item["target_rel"])) == kept
        images = folder / f"{'trn' if split == 'train' else 'tst'}.images.csv"
        expected = [
            [uid, os.path.join(source.absolute(), image)]
            for uid in uids
            for image in of[uid]["images"]
        ]
        if images.exists():
            with images.open(encoding="utf-8", newline="") as file:
                assert list(csv.reader(file)) == [["uid", "path"], *expected]
        else:
            assert not expected
    assert sorted(item["uid"] for split in ("train", "test") for item in found[split]) == sorted(of)
    read(folder)


def test_ids_are_the_same_as_numbers_and_as_texts(tmp_path):
    """1, 1.0 and "1"; pandas makes floats of whole numbers where some are missing."""
    labels = {"id": [7, 8], "text": ["a", "b"]}
    train = {"id": [1, 2], "text": ["x", "y"], "labels": [[7.0], [8.0, 7.0]], "group": [3.0, None]}
    for kind, change in (("numbers", lambda x: x), ("texts", lambda x: str(int(x)))):
        folder = tmp_path / kind
        folder.mkdir()
        pq.write_table(
            pa.table(labels | {"id": [change(i) for i in labels["id"]]}), folder / "label.parquet"
        )
        rows = [[change(label) for label in row] for row in train["labels"]]
        table = train | {"labels": rows, "id": [change(i) for i in train["id"]]}
        pq.write_table(pa.table(table), folder / "train.parquet")
        convert(folder, tmp_path / "out" / kind, test_fraction=0.5)
    found = [contents(tmp_path / "out" / kind, "records.json") for kind in ("numbers", "texts")]
    assert found[0] == found[1]
    uids = [json.loads(found[0][name])["uid"] for name in ("trn.json", "tst.json")]
    assert sorted(uids) == ["1", "2"]


# What is wrong, and where

LABELS = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
DOCUMENTS = [{"id": i, "text": f"t{i}", "labels": ["a"]} for i in range(6)]


def refused(folder: pathlib.Path, **options) -> str:
    """The error's only line, without the folder's name."""
    with pytest.raises(ValueError) as error:
        own_records.check(RecordsConfig(folder, **options))
    assert not isinstance(error.value, UnicodeError)
    (line,) = str(error.value).splitlines()
    return line.replace(f"{folder}/", "")


@pytest.fixture
def own(tmp_path):
    """A function that writes labels and documents of a kind, some of them changed."""

    def make(kind: str = "jsonl", changes: dict | None = None, labels=LABELS) -> pathlib.Path:
        folder = tmp_path / "own"
        rows = [document | (changes or {}).get(i, {}) for i, document in enumerate(DOCUMENTS)]
        write(folder / f"labels.{kind}", labels)
        write(folder / f"train.{kind}", rows)
        return folder

    return make


PLACE = {"jsonl": "train.jsonl:3", "csv": "train.csv:4", "parquet": "train.parquet: row 2"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": ["A"]}, "column labels: expected ids of labels, found 'A'; did you mean 'a'?"),
        ({"labels": ["a,b"]}, "are these several, --separator=','?"),
        ({"labels": ["zz"]}, "(1 such id in 1 place); --unknown_labels=drop leaves them out"),
        ({"labels": ["a", ""]}, "column labels: expected an id, a text without tabs and line ends"),
        ({"labels": ["a\tb"]}, r"found 'a\tb'"),
        ({"id": 1}, "expected ids that differ, found that of"),
        ({"id": None}, "column id: expected an id, a text without tabs and line ends or a whole"),
        ({"split": "hold"}, "column split: expected train, validation or test, found 'hold'"),
        ({"images": ["ftp://h/x.png"]}, "expected a path, or a URL of http or https, found 'ftp:"),
        (
            {"weights": [1.0, 2.0]},
            "column weights: expected 1 numbers, one for each label, found 2",
        ),
        ({"weights": [-1.0]}, "column weights: expected positive numbers, found -1.0"),
        ({"group": "a\nb"}, "column group: expected an id"),
    ],
)
def test_bad_cells_in_every_format(own, kind, change, message):
    new = {
        key: {"split": "train", "images": [], "weights": [1.0], "group": ""}[key]
        for key in change
        if key not in DOCUMENTS[0]
    }
    changes = {i: new for i in range(6)}
    changes[2] = {
        key: str(v) if kind == "parquet" and key == "id" and v else v for key, v in change.items()
    }
    if kind == "parquet" and "id" in change:
        changes = {i: {"id": str(i)} for i in range(6)} | {
            2: {"id": None if change["id"] is None else "1"}
        }
    found = refused(own(kind, changes))
    assert found.startswith(f"{PLACE[kind]}: ") and message in found


@pytest.mark.parametrize(
    "line, message",
    [
        (b"", None),
        (b"[]", "expected a JSON object, found '[]'; one object per line, or the whole file one"),
        (b"{", "expected a JSON object, found '{'; one object per line"),
        (b"null", "expected a JSON object, found 'null'"),
        (b"7", "expected a JSON object, found '7'"),
        (b'{"id": 9, "text": "x", "labels": ["a"], "id": 9}', "found key 'id' twice"),
        (b'{"id": 9, "text": "x", "labels": ["a"]', 'expected a JSON object, found \'{"id"'),
        (
            b'{"id": 9, "txt": "x", "labels": ["a"]}',
            "column text: expected a text, as in other records, found id, txt",
        ),
        (b"{}", "column id: expected an id"),
        (b'{"id": 9, "text": ["x"], "labels": ["a"]}', "column text: expected a text, found ['x']"),
        (b'{"id": 9, "text": true, "labels": ["a"]}', "column text: expected a text, found True"),
        (b'{"id": 9, "text": 1.5, "labels": ["a"]}', "column text: expected a text, found 1.5"),
        (b'{"id": 9, "text": {}, "labels": ["a"]}', "column text: expected a text, found {}"),
        (b'{"id": 9, "text": "\\ud800", "labels": ["a"]}', "expected Unicode, found half of a"),
        (b'{"id": "\\udc00", "text": "", "labels": ["a"]}', "column id: expected Unicode"),
        (b'{"id": 9, "text": "x", "labels": [["a"]]}', "column labels: expected an id, a text"),
        (b'{"id": 9, "text": "x", "labels": [null]}', "found nothing"),
        (b'{"id": 9, "text": "x", "labels": {"a": 1}}', "column labels: expected an id"),
        (b'{"id": 9, "text": "x", "labels": [true]}', "found True"),
        (b'{"id": 9, "text": "x", "labels": [1.5]}', "found 1.5"),
        (b'{"id": 9, "text": "x", "labels": "[a]"}', "expected a list in brackets, such as"),
        (b'{"id": 9, "text": "x", "labels": [Infinity]}', "found inf"),
        (b'{"id": " ", "text": "x", "labels": ["a"]}', "column id: expected an id"),
        (b'{"id": 1e300, "text": "x", "labels": ["a"]}', "column id: expected an id"),
        (
            b'{"id": NaN, "text": "x", "labels": ["a"]}',
            "tabs and line ends or a whole number, found nothing",
        ),
        (b'{"id": 9, "text": "\xe9", "labels": ["a"]}', "expected UTF-8, found byte 0xe9; convert"),
        (b"[" * 100_000, "expected a JSON object, found one nested too deeply"),
        (
            b'{"id": ' + b"9" * 5000 + b"}",
            "expected a JSON object, found a number of more than 4,300 digits",
        ),
        (b'{"id": 9, "text": NaN, "labels": null}', None),
        (b'{"id": 9, "text": null}', None),
        (b'{"id": 9, "text": "\\u0000\\ud83d\\ude00", "labels": "a"}', None),
    ],
)
def test_lines_of_json(own, line, message):
    folder = own()
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "train.jsonl").write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    if message is None:
        own_records.check(RecordsConfig(folder, test_fraction=0.5))
    else:
        found = refused(folder)
        assert found.startswith("train.jsonl:3: ") and message in found


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "train.csv: expected records, found an empty file"),
        (b"\n\n", "train.csv: expected records, found an empty file"),
        (b",,\n1,x,a\n", "train.csv: expected a header with the columns' names, found none"),
        (b"id,text,labels\n", "train.csv: expected documents, found none"),
        (
            b"id,text,text\n1,a,b\n",
            "train.csv:1: expected columns that differ, found id, text, text",
        ),
        (
            b"id,txt,labels\n1,x,a\n",
            "expected a column text or title, found id, txt, labels; --column text=txt",
        ),
        (
            b"id,text,label\n1,x,a\n",
            "expected a column labels, found id, text, label; --column labels=label",
        ),
        (
            b"text,title,labels\n1,x,a\n",
            "found text and title; say which: --column text=title, or --column text=title --",
        ),
        (
            b"id,text,labels\n1,x,a\n2,y\n",
            "train.csv:3: expected 3 cells, as in the header, found 2",
        ),
        (b"id,text,labels\n1,x,a\n2,y,a,b\n", "train.csv:3: expected 3 cells"),
        (
            b'id,text,labels\n1,"x\ny",a\n2,"y,a\n3,z,a\n',
            "train.csv:4: expected CSV, found a quote that is not closed",
        ),
        (b'id,text,labels\n1,"x"y,a\n', "train.csv:2: expected CSV, found ',' expected after '\"'"),
        (b"id,text,labels\n1,x\ry,a\n", "train.csv:2: expected CSV, found new-line character"),
        (b"id,text,labels\n1,\xff,a\n", "train.csv:2: expected UTF-8, found byte 0xff"),
        (
            b"id,text,labels\n1,x,[a]\n2,x,b\n",
            'column labels: expected a list in brackets, such as ["a", "b"], or texts separated',
        ),
    ],
)
def test_csv_files(own, content, message):
    folder = own("csv")
    (folder / "train.csv").write_bytes(content)
    assert message in refused(folder)


def test_csv_as_spreadsheets_write_it(own):
    """A byte order mark, CRLF, quoted line ends, spaces in the header, blank lines, empty cells."""
    folder = own("csv")
    (folder / "train.csv").write_bytes(
        b'\xef\xbb\xbfid, text ,labels,\r\n1,"one\r\ntwo, ""three""",a,\r\n\r\n'
        b"2,,a|b,\r\n007,x,,\r\n"
    )
    out = folder / "raw"
    report = convert(folder, out, test_fraction=0.5)
    lines = [json.loads(x) for n in ("trn", "tst") for x in (out / f"{n}.json").open()]
    found = {line["uid"]: (line["title"], line["target_ind"]) for line in lines}
    assert found == {"1": ('one\r\ntwo, "three"', [0]), "2": ("", [0, 1]), "007": ("x", [])}
    assert report["train"]["empty_texts"] + report["test"]["empty_texts"] == 1


def test_parquet_types(own):
    folder = own("parquet")
    path = folder / "train.parquet"

    def table(**columns):
        given = {"id": [1, 2], "text": ["x", "y"], "labels": [["a"], ["b"]]} | columns
        pq.write_table(pa.table(given), path)

    table(text=pa.array([b"x", b"\xff"]).cast(pa.binary()).view(pa.string()))
    assert refused(folder) == "train.parquet: row 1: column text: expected UTF-8, found byte 0xff"
    table(text=[1.5, float("nan")])
    assert "row 0: column text: expected a text, found 1.5" in refused(folder)
    table(labels=pa.array([[["a"]], [["b"]]]))
    assert "row 0: column labels: expected an id" in refused(folder)
    table(id=pa.array([1, 2], pa.timestamp("ns")))
    assert "column id: expected texts, numbers or lists of them, found type times" in refused(
        folder
    )
    table(labels=pa.array([[{"k": "a"}], []], pa.list_(pa.struct({"k": pa.string()}))))
    assert "column labels: expected an id" in refused(folder)
    table(images=pa.array([{"bytes": b"x", "path": None}] * 2))
    assert "expected a path or URL, found an image itself; leave the column out" in refused(folder)
    table(images=pa.array([[b"x"], None]))
    assert "found an image itself" in refused(folder)
    pq.write_table(pa.table([[1], [2]], names=["id", "id"]), path)
    assert "expected columns that differ, found id, id" in refused(folder)
    path.write_bytes(path.read_bytes()[:-10])
    assert "train.parquet: expected a Parquet file, found a damaged one" in refused(folder)
    path.write_bytes(b"")
    assert "train.parquet: expected a Parquet file" in refused(folder)


@pytest.mark.parametrize(
    "column, cells, expected",
    [
        ("text", pa.array(["x", None, "x"]).dictionary_encode(), ["x", "", "x"]),
        ("text", pa.nulls(3), ["", "", ""]),
        ("text", pa.array([float("nan")] * 3), ["", "", ""]),
        ("text", pa.array([1984, 2, 3]), ["1984", "2", "3"]),
        ("labels", pa.array([[0, 1], None, [1]], pa.large_list(pa.int16())), [[0, 1], [], [1]]),
        ("labels", pa.array(["0|1", "[0]", '["1"]'], pa.large_string()), [[0, 1], [0], [1]]),
        ("labels", pa.array([0.0, float("nan"), 1.0]), [[0], [], [1]]),
        ("labels", pa.array([0, 1, 1], pa.uint8()), [[0], [1], [1]]),
    ],
)
def test_columns_of_parquet(tmp_path, column, cells, expected):
    write(tmp_path / "labels.parquet", [{"id": 0, "text": "x"}, {"id": 1, "text": "y"}])
    given = {"text": list("abc"), "labels": [[0], [0], [1]], "split": ["train", "train", "test"]}
    pq.write_table(pa.table(given | {column: cells}), tmp_path / "train.parquet")
    convert(tmp_path, tmp_path / "raw")
    lines = [json.loads(x) for n in ("trn", "tst") for x in (tmp_path / f"raw/{n}.json").open()]
    assert [line[{"text": "title", "labels": "target_ind"}[column]] for line in lines] == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz", "csv.gz"])
def test_damaged_and_missing_files(own, kind, monkeypatch):
    folder = own(kind)
    path = folder / f"train.{kind}"
    content = path.read_bytes()
    if kind.endswith(".gz"):
        for damaged in (content[:-9], b"", b"not gzip", content[:10] + b"\x00" * 20):
            path.write_bytes(damaged)
            assert f"train.{kind}: expected a whole gzip file" in refused(folder)
    else:
        path.write_bytes(b"")
        assert f"train.{kind}: expected " in refused(folder)
    path.write_bytes(content)
    monkeypatch.setattr(table_format, "MAX_RECORD", 40)
    long = "x" * 60 if "json" in kind else "x\n" * 30
    write(path, [{"id": 1, "text": "x", "labels": "a"}, {"id": 2, "text": long, "labels": "a"}])
    found = refused(folder)
    assert re.match(rf"train.{kind}:\d: expected a (line|record) of at most 40 bytes", found)
    path.unlink()
    assert refused(folder).endswith("found none")
    (folder / f"train.{kind}").mkdir()
    assert "expected a file train.*" in refused(folder)


def test_a_text_in_parquet_may_not_be_huge(own, monkeypatch):
    folder = own("parquet")
    monkeypatch.setattr(table_format, "MAX_RECORD", 1)
    assert "row 0: column text: expected at most 1 characters, found 2" in refused(folder)


@pytest.mark.parametrize(
    "files, message",
    [
        (["train.csv", "train.jsonl"], "expected one file of train, or numbered ones of one kind"),
        (["train.csv", "trn.csv"], "expected one file of train"),
        (["train.csv", "train-0.csv"], "expected one file of train"),
        (["train-0.csv", "train-00.csv"], "expected one file of train"),
        (["train-0-of-3.csv", "train-1-of-3.csv"], "expected all 3 files that train-0-of-3.csv"),
        (["train.md", "training.csv", "train.csv.bz2"], "expected a file train.*, one of .jsonl"),
        (["train.csv", "labels.csv", "label.csv"], "expected one file of label"),
        (["train.csv"], "expected labels, a file label.* or labels.* in the folder or another one"),
    ],
)
def test_files_of_a_folder(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("id,text,labels\n1,x,a\n")
    assert message in refused(tmp_path)


def test_numbered_files_are_one(own, tmp_path):
    folder = own("csv")
    convert(folder, tmp_path / "one", test_fraction=0.3)
    (folder / "train.csv").unlink()
    for number in (0, 1, 10):  # by number, not by name
        rows = DOCUMENTS[:2] if number == 0 else DOCUMENTS[2:3] if number == 1 else DOCUMENTS[3:]
        write(folder / f"train-{number}-of-3.csv", rows)
    convert(folder, tmp_path / "several", test_fraction=0.3)
    several, one = (contents(tmp_path / n, "records.json") for n in ("several", "one"))
    assert several == one
    write(folder / "train-10-of-3.csv", [DOCUMENTS[0], *DOCUMENTS[3:]])
    assert refused(folder) == (
        "train-10-of-3.csv:2: expected ids that differ, found that of "
        "train-0-of-3.csv:2; 1 document has an id of others; --row_per_pair makes one document "
        "of rows of one id that follow each other"
    )


def test_files_by_their_names(own, tmp_path, capsys):
    folder = own("csv")
    convert(folder, tmp_path / "folder")
    (folder / "train.csv").rename(tmp_path / "items.CSV")
    (folder / "labels.csv").rename(tmp_path / "tags.csv")
    files = {"records": tmp_path / "items.CSV", "labels": tmp_path / "tags.csv"}
    own_records.convert(
        RecordsConfig(tmp_path / "items.CSV", labels=str(files["labels"])), tmp_path / "files"
    )
    found = [contents(tmp_path / name, "records.json") for name in ("folder", "files")]
    assert found[0] == found[1]
    flags = [f"--{role}={path}" for role, path in files.items()]
    assert prepare.main([*flags, "--check", "--column=text=id", "--column=id=id"]) == 0
    assert capsys.readouterr().out.startswith(
        f"train       {tmp_path}/items.CSV: id, text=id, labels; not read: text\n"
        f"label       {tmp_path}/tags.csv: id, text=id; not read: text\n\n"
    )


@pytest.mark.parametrize(
    "columns, message",
    [
        (["text"], "records: column: expected FIELD=NAME, FIELD one of id, text, content, labels"),
        (["name=text"], "records: column: expected FIELD=NAME"),
        (["text=nme"], "train.csv: expected a column nme or text or title, found id, name, tags, "),
        (["text=name"], "expected a column labels, found id, name, tags, body; --column labels=N"),
        (["text=name", "labels=tag"], "a column tag or labels, found id, name, tags, body; --co"),
        (["text=name", "text=id"], "expected one column for text, found name and id; say which"),
        (["text=name", "labels=tags", "group=grp"], "train.csv: expected a column grp, found id"),
        (["text=name", "labels=tags", "labels="], None),
    ],
)
def test_named_columns_that_are_not_there(tmp_path, columns, message):
    rows = [{"id": i, "name": "x" * i, "tags": "a", "body": "y"} for i in (1, 2)]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "labels.csv", [{"id": "a", "name": "x"}])
    if message is None:
        own_records.check(RecordsConfig(tmp_path, columns=tuple(columns), test_fraction=0.5))
        return
    with pytest.raises(ValueError) as error:
        own_records.check(RecordsConfig(tmp_path, columns=tuple(columns)))
    assert message in str(error.value)


def test_columns_by_other_names(tmp_path, own):
    """A file takes the name that it has; a column that is one field's is no other's."""
    folder = tmp_path / "named"
    rows = [
        {"id": d["id"], "title": d["text"], "text": "body", "tags": d["labels"], "image": "no"}
        for d in DOCUMENTS
    ]
    write(folder / "train.csv", rows)
    write(folder / "labels.csv", [{"code": x["id"], "name": x["text"]} for x in LABELS])
    columns = ("title=title", "content=text", "labels=tags", "text=name", "id=code", "images=")
    convert(folder, tmp_path / "raw", columns=columns, test_fraction=0.3)
    convert(own("csv"), tmp_path / "plain", test_fraction=0.3)
    for name in ("trn.json", "tst.json", "lbl.json"):
        found, plain = (
            [json.loads(x) for x in (tmp_path / folder / name).open()]
            for folder in ("raw", "plain")
        )
        content = "" if name == "lbl.json" else "body"
        assert found == [item | {"content": content} for item in plain]
    assert not (tmp_path / "raw" / "trn.images.csv").exists()


# Splits and groups


def components(documents: list[dict]) -> set[frozenset[str]]:
    """Documents that a group or a text joins, by closure."""
    sets = [{d["id"]} for d in documents]
    keys = [
        {("group", d["group"]), ("text", d["text"].lower())} - {("group", ""), ("text", "")}
        for d in documents
    ]
    for i in range(len(documents)):
        for j in range(i):
            if keys[i] & keys[j]:
                joined, j = sets[i] | sets[j], j
                for k, one in enumerate(sets):
                    if one & joined:
                        sets[k] = joined
    changed = True
    while changed:
        changed = False
        for i, one in enumerate(sets):
            for other in sets:
                if one & other and not one >= other:
                    sets[i] = one = one | other
                    changed = True
    return {frozenset(one) for one in sets}


@settings
@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from("abBcd "), st.sampled_from(["", "g", "h", "i"])),
        min_size=4,
        max_size=14,
    ),
    st.integers(0, 5),
)
def test_groups_and_equal_texts_stay_together(tmp_path_factory, drawn, seed):
    documents = [
        {"id": f"d{i}", "text": text.strip(), "labels": ["a"], "group": group}
        for i, (text, group) in enumerate(drawn)
    ]
    folder = tmp_path_factory.mktemp("groups")
    write(folder / "train.jsonl", documents)
    write(folder / "labels.jsonl", LABELS)
    expected = components(documents)
    options = {"test_fraction": 0.4, "split_seed": seed}
    if len(expected) == 1:
        with pytest.raises(ValueError, match="expected documents of two groups at least"):
            convert(folder, folder / "raw", **options)
        return
    report = convert(folder, folder / "raw", **options)
    found: dict[str, set[str]] = {}
    if len(expected) < len(documents) or any(d["group"] for d in documents):
        lines = (folder / "raw" / "groups.tsv").read_text().splitlines()
        for line in lines:
            uid, group = line.split("\t")
            found.setdefault(group, set()).add(uid)
        assert {frozenset(one) for one in found.values()} == expected
    else:
        assert not (folder / "raw" / "groups.tsv").exists()
    test = {json.loads(x)["uid"] for x in (folder / "raw" / "tst.json").open()}
    assert all(one <= test or not one & test for one in expected)
    sizes = sorted(map(len, expected))
    assert report["test"]["documents"] == len(test) <= max(-(-4 * len(documents) // 10), sizes[0])
    assert report["across_the_split"] == {"texts": 0, "plain_texts": 0, "groups": 0}
    assert report["groups"]["count"] == len(expected)


def test_a_large_group_does_not_make_a_large_test_split():
    """Shares are kept as whole groups allow; every group of a fitting size has its chance."""
    sizes = np.array([50, 1, 2, 3, 4, 5, 6, 7, 8, 14])
    of = np.repeat(np.arange(10), sizes)
    seen = set()
    for seed in range(40):
        chosen = set(of[holdout.choose_within(of, 0.1, seed)].tolist())
        total = sum(sizes[list(chosen)])
        assert 5 <= total <= 10 and not chosen & {0, 9}
        assert all(total + sizes[other] > 10 for other in set(range(10)) - chosen)
        seen |= chosen
    assert seen == set(range(1, 9))
    assert set(of[holdout.choose_within(of, 0.001, 0)]) == {1}
    large = np.repeat([0, 1, 2], [20, 10, 30])
    assert set(large[holdout.choose_within(large, 0.1, 0)]) == {1}


def test_a_column_says_the_split(own, tmp_path):
    names = ["train", "test", "Train", "TEST", "train", "train"]
    folder = own("csv", {i: {"split": name} for i, name in enumerate(names)})
    report = convert(folder, tmp_path / "raw")
    lines = {
        n: [json.loads(x)["uid"] for x in (tmp_path / f"raw/{n}.json").open()]
        for n in ("trn", "tst")
    }
    assert lines == {"trn": ["0", "2", "4", "5"], "tst": ["1", "3"]}
    assert report["test"]["documents"] == 2
    convert(folder, tmp_path / "raw", test_fraction=0.4)  # means nothing here
    write(folder / "test.csv", [{"id": 10, "text": "x", "labels": ["a"]}])
    assert (
        "train.csv:3: column split: expected train or validation, since files of their own have "
        "the others, found 'test'; --column split= leaves the column out"
    ) in refused(folder)
    found, _ = own_records.check(RecordsConfig(folder, columns=("split=",)))
    assert (found["train"]["documents"], found["test"]["documents"]) == (6, 1)


def uids_of(folder: pathlib.Path) -> dict[str, list[str]]:
    """Identifiers by split, as the dataset has them."""
    found = raw_folder.read(raw_folder.find(folder), "Own", "utf-8")
    return {split: items.uids for split, items in found.splits.items() if split != "label"}


@pytest.mark.parametrize("name", ["validation", "Valid", "val", "dev-00000-of-00001"])
def test_a_file_of_validation_documents(own, tmp_path, name):
    """They are held out by name; the test documents are drawn from the others."""
    folder = own("csv")
    rows = [{"id": f"v{i}", "text": f" T{i}", "labels": ["a"], "filter": ["b"]} for i in (1, 7)]
    write(folder / f"{name}.csv", rows)
    report = convert(folder, tmp_path / "raw", test_fraction=0.3)
    found = uids_of(tmp_path / "raw")
    assert found["validation"] == ["v1", "v7"]
    assert sorted(found["train"] + found["test"]) == list("012345")
    assert report["validation"] == report["validation"] | {
        "documents": 2,
        "pairs": 2,
        "filter_pairs": 2,
    }
    assert report["test"]["drawn"] and len(found["test"]) == 2
    # " T1" and "t1" are one group, but the file has said where its documents are.
    across = report["across_validation"]
    assert across["texts"] == 0 and across["plain_texts"] == ("1" in found["train"])
    write(folder / f"{name}.csv", [{"id": "v", "text": "x"}])
    assert "expected a column labels" in refused(folder)
    write(folder / f"{name}.csv", [{"id": "v", "text": "x", "labels": []}])
    with pytest.raises(ValueError, match="expected validation documents with labels, found none"):
        convert(folder, tmp_path / "none")


def test_a_column_and_files_say_the_split_together(own, tmp_path):
    names = ["train", "DEV", "valid", "train", "train", "train"]
    folder = own("jsonl", {i: {"split": name} for i, name in enumerate(names)})
    convert(folder, tmp_path / "drawn", test_fraction=0.3)
    found = uids_of(tmp_path / "drawn")
    assert found["validation"] == ["1", "2"] and len(found["test"]) == 2
    write(folder / "test.jsonl", [{"text": "x", "labels": ["a"]}])
    convert(folder, tmp_path / "raw")
    assert uids_of(tmp_path / "raw") == {
        "train": list("0345"),
        "test": ["test-0"],
        "validation": ["1", "2"],
    }
    write(folder / "dev.jsonl", [{"text": "x", "labels": ["a"]}])
    assert "column split: expected train, since files of their own" in refused(folder)


def test_documents_without_ids_have_the_number_of_their_row(tmp_path):
    rows = [{"text": d["text"], "labels": [1]} for d in DOCUMENTS]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:2])
    write(tmp_path / "labels.jsonl", [{"text": "x"}, {"text": "y"}])
    report = convert(tmp_path, tmp_path / "raw")
    uids = {
        n: [json.loads(x)["uid"] for x in (tmp_path / f"raw/{n}.json").open()]
        for n in ("trn", "tst", "lbl")
    }
    assert uids == {"trn": list("012345"), "tst": ["test-0", "test-1"], "lbl": ["0", "1"]}
    assert report["across_the_split"]["texts"] == 2
    assert json.loads((tmp_path / "raw/tst.json").open().readline())["target_ind"] == [1]
    read(tmp_path / "raw")


# Labels


def test_unknown_labels(own, tmp_path):
    """They are an error that says how many there are; left out; or labels in order."""
    changes = {
        1: {"labels": ["new", "a", "newer"]},
        3: {"labels": ["new"]},
        4: {"filter": ["newer"]},
    }
    folder = own("jsonl", changes)
    assert refused(folder).startswith(
        "train.jsonl:2: column labels: expected ids of labels, found 'new' (2 such ids in 3 places)"
    )
    options = {"test_fraction": 0.5, "split_seed": 1}
    dropped = convert(folder, tmp_path / "drop", unknown_labels="drop", **options)
    unknown = {"treated": "drop", "ids": 2, "pairs": 3, "filter_pairs": 1, "joined": None}
    assert dropped["unknown_labels"] == unknown and dropped["label"]["labels"] == 2
    added = convert(folder, tmp_path / "add", unknown_labels="add", **options)
    assert added["unknown_labels"] == unknown | {"treated": "add", "filter_pairs": 0}
    labels = [json.loads(x) for x in (tmp_path / "add" / "lbl.json").open()]
    assert [(x["uid"], x["title"]) for x in labels[2:]] == [("new", "new"), ("newer", "newer")]
    of = {
        out: {
            item["uid"]: item["target_ind"]
            for name in ("trn", "tst")
            for item in map(json.loads, (tmp_path / out / f"{name}.json").open())
        }
        for out in ("drop", "add")
    }
    assert of["drop"]["1"] == [0] and of["drop"]["3"] == []
    assert of["add"]["1"] == [2, 0, 3] and of["add"]["3"] == [2]
    (folder / "labels.jsonl").unlink()
    alone = convert(folder, tmp_path / "alone", unknown_labels="add", **options)
    assert alone["label"]["labels"] == 3
    names = [json.loads(x)["uid"] for x in (tmp_path / "alone" / "lbl.json").open()]
    assert names == ["a", "new", "newer"]


def test_what_may_not_be_predicted_is_no_label_of_a_test_document(tmp_path):
    rows = [
        {"id": "a", "text": "1", "labels": ["a", "b"], "weights": [1, 2], "filter": ["a"]},
        {"id": "b", "text": "2", "labels": ["a", "b"], "weights": [3, 4], "filter": ["b", "c"]},
    ]
    write(tmp_path / "train.jsonl", rows[:1])
    write(tmp_path / "test.jsonl", rows[1:])
    write(tmp_path / "labels.jsonl", LABELS)
    report = convert(tmp_path, tmp_path / "raw")
    train, test = (json.loads((tmp_path / f"raw/{n}.json").read_text()) for n in ("trn", "tst"))
    assert (train["target_ind"], train["target_rel"]) == ([0, 1], [1.0, 2.0])
    assert (test["target_ind"], test["target_rel"]) == ([0], [3.0])
    assert (tmp_path / "raw" / "filter_labels_train.txt").read_text() == "0 0\n"
    assert (tmp_path / "raw" / "filter_labels_test.txt").read_text() == "0 1\n"
    assert report["test"]["positives_filtered"] == 1
    assert report["unknown_labels"]["filter_pairs"] == 1


# The report


def test_report(tmp_path, capsys):
    (tmp_path / "there.png").write_bytes(b"x")
    common = {"group": "", "images": []}
    train = [
        {"id": 1, "text": "one two three", "labels": ["a", "a"], **common},
        {"id": 2, "text": "", "labels": [], **common, "images": ["there.png", "not.png"]},
        {"id": 3, "text": "one two three", "labels": ["a"], **common, "group": "g"},
        {"id": 4, "text": " ", "labels": ["b"], **common},
    ]
    test = [
        {"id": 5, "text": "one two three", "labels": ["a", "c"], **common, "group": "g"},
        {"id": 6, "text": "w " * 9, "labels": ["c", "d"], **common},
        {"id": 7, "text": "One\n two THREE", "labels": ["a"], **common},
    ]
    labels = [{"id": x, "text": x * (x != "d"), "images": []} for x in "abcde"]
    for name, rows in (("train", train), ("test", test), ("labels", labels)):
        write(tmp_path / f"{name}.jsonl", rows)
    assert prepare.main([f"--records={tmp_path}", "--check", "--max_length=8"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "labels.jsonl",
        "test.jsonl",
        "there.png",
        "train.jsonl",
    ]
    said = capsys.readouterr().out
    report, _ = own_records.check(RecordsConfig(tmp_path))
    counts = {split: +collections.Counter(report[split]) for split in ("train", "test", "label")}
    assert counts["train"] == {
        "documents": 4,
        "pairs": 3,
        "without_labels": 1,
        "repeated_labels": 1,
        "empty_texts": 2,
        "duplicate_texts": 1,
        "with_image": 1,
        "images": 2,
        "images_missing": 1,
    }
    assert counts["test"] == {"documents": 3, "pairs": 5, "duplicate_texts": 1}
    assert counts["label"] == {"labels": 5, "without_documents": 3, "empty_texts": 1}
    assert report["groups"] == {"count": 4, "largest": 4}
    assert report["across_the_split"] == {"texts": 1, "plain_texts": 1, "groups": 1}
    assert report["unseen_test_labels"] == {"labels": 2, "of": 3, "pairs": 3}
    words = report["words_per_document"]
    assert words["counts"] == [2, 0, 0, 4, 0, 1] and words["mean"] == 3.0 and words["p100"] == 9
    assert report["labels_per_document"]["counts"] == [1, 4, 2]
    for line in (
        "documents                                    4           3",
        "labels that a document repeats               1           0",
        "image files that do not exist                1           0           0",
        "labels of test documents that no training document has: 2 of 3 (66.7%), in 60.0% of the "
        "pairs",
        "groups: 4, the largest of 4 documents",
        "texts of more than 8 tokens of minilm-l6-packaged (--max_length), which are cut: 1 "
        "document, 0 labels",
        "! 1 label repeats one of the same document: counted once",
        "! 1 test document has a text that training has, too",
        "! 1 test document has a text that differs from one of training in capitals or blanks "
        "alone",
        "! 1 image file does not exist",
        "words per document: mean 3.0, median 3, at most 9",
        "              0            2 ####################",
        "            3-4            4 ########################################",
        "            5-8            0",
        "           9-16            1 ##########",
    ):
        assert line in said.splitlines()


# The folder


def snapshot(folder: pathlib.Path) -> dict:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_the_same_records_leave_the_folder_alone(own, tmp_path):
    folder = own()
    report, made = own_records.convert(RecordsConfig(folder), tmp_path / "raw")
    before = snapshot(tmp_path / "raw")
    assert made and "groups.tsv" not in before
    assert own_records.convert(RecordsConfig(folder), tmp_path / "raw") == (report, False)
    moved = folder.rename(tmp_path / "moved")
    assert own_records.convert(RecordsConfig(moved), tmp_path / "raw") == (report, False)
    assert snapshot(tmp_path / "raw") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".raw.lock", "moved", "raw"]


def test_others_are_refused_until_overwrite(own, tmp_path):
    folder, out = own(), tmp_path / "raw"
    convert(folder, out)
    for options, message in (
        ({"test_fraction": 0.2}, r"test_fraction: 0.1 there, 0.2 here\); choose another --dataset"),
        ({"split_seed": 1}, "split_seed: 0 there, 1 here"),
        ({"columns": ("images=",)}, r"columns: \[\] there, \['images='\] here"),
        ({"unknown_labels": "drop"}, "unknown_labels: 'error' there, 'drop' here"),
    ):
        with pytest.raises(ValueError, match=rf"raw: made from other records \({message}"):
            convert(folder, out, **options)
    write(folder / "labels.jsonl", [*LABELS, {"id": "c", "text": "z"}])
    with pytest.raises(ValueError, match=r"\(label.labels.jsonl: '\w{64}' there, '\w{64}' here"):
        convert(folder, out)
    assert convert(folder, out, overwrite=True)["label"]["labels"] == 3
    (out / "trn.json").write_bytes(b"")
    with pytest.raises(ValueError, match="expected to be free, or whole and made of records"):
        convert(folder, out)
    (out / "records.json").write_text("[]")
    with pytest.raises(ValueError, match="expected to be free"):
        convert(folder, out)
    assert convert(folder, out, overwrite=True) == convert(folder, out)


def test_a_folder_of_an_earlier_version_is_taken(own, tmp_path):
    """It says nothing of validation documents, repeated labels and texts that are alike."""
    names = ["train", "test", "train", "test", "train", "train"]
    folder, out = own("csv", {i: {"split": name} for i, name in enumerate(names)}), tmp_path / "raw"
    convert(folder, out)
    report = json.loads((out / "report.json").read_text())
    new = {"refusal", "test_files_without_labels", "repeated_labels", "drawn", "ids_as_texts"}
    for part in (report, *(x for x in report.values() if isinstance(x, dict))):
        for name in (new | {"joined", "plain_texts"}) & part.keys():
            del part[name]
    (out / "report.json").write_text(json.dumps(report))
    made = json.loads((out / "records.json").read_text())
    made["format"] = 1
    for name in ("validation", "delimiter", "label_columns", "row_per_pair"):
        del made[name]
    made["files"] |= manifests.files(out, ["report.json"])
    (out / "records.json").write_text(json.dumps(made))
    assert own_records.convert(RecordsConfig(folder, test_fraction=0.4), out) == (report, False)
    assert "documents                                    4           2" in data_report.text(report)


@pytest.mark.slow
@pytest.mark.parametrize("kind", write_faults.KINDS)
def test_a_kill_and_a_full_disk_at_each_write(own, tmp_path, monkeypatch, kind):
    """The folder is the old one or the new one, and the same command makes it."""
    monkeypatch.setattr(os, "fsync", lambda *_: None)  # slow, and no moment of its own
    folder, home = own(), tmp_path / "home"
    convert(folder, home / "raw")
    old = contents(home / "raw")
    write(folder / "labels.jsonl", [*LABELS, {"id": "c", "text": "z"}])

    def make() -> None:
        convert(folder, home / "raw", overwrite=True)

    for before in (None, old):
        shutil.rmtree(home)
        if before:
            files = {tmp_path / "before" / name: content for name, content in old.items()}
            (tmp_path / "before").mkdir()
            for path, content in files.items():
                path.write_bytes(content)
            shutil.copytree(tmp_path / "before", home / "raw")
        writes = write_faults.count(home, make)
        new, names = contents(home / "raw"), sorted(path.name for path in home.iterdir())
        assert writes > 8 and new != old
        for number in range(writes):
            shutil.rmtree(home)
            if before:
                shutil.copytree(tmp_path / "before", home / "raw")
            with write_faults.at(home, number, kind):
                make()
            if (home / "raw").exists():
                assert contents(home / "raw") in ([old, new] if before else [new])
            make()
            assert contents(home / "raw") == new
            assert sorted(path.name for path in home.iterdir()) == names


def test_memory_does_not_hold_the_texts(tmp_path):
    """Ten times the text, the same memory."""
    peaks = []
    for length in (30_000, 150_000):  # files of several blocks
        folder = tmp_path / str(length)
        rows = [{"id": i, "text": f"{i} " + "x" * length, "labels": ["a"]} for i in range(200)]
        write(folder / "train.jsonl", rows)
        write(folder / "labels.jsonl", LABELS)
        tracemalloc.start()
        convert(folder, folder / "raw")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3_000_000 < 10_000_000  # the longer ones have 24 million more


# Images


def test_images_are_where_vision_looks_for_them(tmp_path, monkeypatch):
    """Paths from the file's folder on, in order, also after that of the command has changed."""
    pytest.importorskip("PIL", reason="pictures need the extra vision")
    from xmc_jax.images import image_sources

    folder = tmp_path / "own"
    (folder / "pictures").mkdir(parents=True)
    for name in ("a.png", "b.png", "c, d.png"):
        (folder / "pictures" / name).write_bytes(name.encode())
    train = [
        {"id": "1", "text": "x", "labels": ["a"], "image": ["pictures/b.png", "pictures/a.png"]},
        {"id": "2", "text": "y", "labels": ["a"], "image": ["pictures/c, d.png"]},
        {"id": "3", "text": "z", "labels": ["a"], "image": []},
    ]
    for kind in KINDS:
        for one in folder.glob("*.*"):
            one.unlink()
        write(folder / f"train.{kind}", train)
        write(folder / f"labels.{kind}", LABELS)
        monkeypatch.chdir(tmp_path)
        out = tmp_path / kind / "raw"
        report = convert(pathlib.Path("own"), out, test_fraction=0.3)
        monkeypatch.chdir("/")
        assert report["train"]["images"] + report["test"]["images"] == 3
        found = {}
        for split, name in (("train", "trn"), ("test", "tst")):
            uids = [json.loads(line)["uid"] for line in (out / f"{name}.json").open()]
            for item, _, data in image_sources.open(out, split, uids, allow_paths=True).read(
                limit=5
            ):
                found.setdefault(uids[item], []).append(data)
        assert found == {"1": [b"b.png", b"a.png"], "2": [b"c, d.png"]}
        assert image_sources.open(out, "label", ["a", "b"]).items_with_images == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"images_from.train: '/.*/own' there, '/.*/elsewhere' here"
    ):
        convert(tmp_path / "elsewhere", out, test_fraction=0.3)


def test_urls_of_images(own, tmp_path):
    changes = {i: {"images": [f"https://host/{i}?a|b", "HTTP://host/x"]} for i in range(5)}
    folder = own("jsonl", changes)
    report = convert(folder, tmp_path / "raw", test_fraction=0.3)
    assert report["train"]["images_missing"] == 0
    tables = {n: (tmp_path / "raw" / f"{n}.images.csv").read_text() for n in ("trn", "tst", "lbl")}
    assert tables["lbl"] == "uid,path\n" and tables["tst"].startswith("uid,url\n")
    assert tables["trn"].count("https://host/") + tables["tst"].count("https://host/") == 5
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "own")
    convert(moved, tmp_path / "raw", test_fraction=0.3)  # nothing depends on the place
    folder = own("jsonl", changes | {5: {"images": ["a.png"]}})
    assert "train.jsonl:6: column images: expected paths alone or URLs alone in" in refused(folder)


# The command and the config


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset=X"], "the following arguments are required: --out"),
        (["--out=X"], "the following arguments are required: --dataset"),
        (["--dataset=X", "--out=X", "--column=a=b"], "--column: expected --records with it"),
        (["--check"], "--check: expected --records with it"),
        (["--records=X", "--check", "--column=text"], "expected FIELD=NAME"),
        (["--records=X", "--check", "--test_fraction=1"], "test_fraction: expected less than 1"),
        (["--records=X", "--dataset=Y", "--out=Z", "--raw=W"], "--raw: expected none with --rec"),
        (["--records=X", "--dataset=Y", "--out=Z", "--encoding=latin-1"], "--encoding: expected"),
        (["--records=X", "--check", "--unknown_labels=no"], "invalid choice: 'no'"),
        (["--records=X", "--check", "--separator="], "separator: expected a text of at least 1 ch"),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    assert prepare.main(flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_errors_of_the_command_are_one_line(own, capsys, tmp_path):
    folder = own("jsonl", {2: {"labels": ["q"]}})
    flags = [f"--records={folder}", "--dataset=X", f"--out={tmp_path}/out"]
    assert prepare.main(flags) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"prepare: {folder}/train.jsonl:3: column labels: expected ids of labels"
    )
    assert said.count("\n") == 1 and not (tmp_path / "out" / "X" / "raw").exists()
    assert prepare.main([f"--records={tmp_path}/none", "--check"]) == 1
    assert capsys.readouterr().err.endswith(
        "/none: expected a folder of records or a file, found none\n"
    )
    assert prepare.main([f"--records={ROOT}/setup.py", "--check", "--unknown_labels=add"]) == 1
    assert (
        "/setup.py: expected a name ending in .jsonl, .ndjson, .json, .csv"
        in capsys.readouterr().err
    )
    assert prepare.main([f"--records={folder}/train.jsonl", "--check"]) == 1
    assert "expected labels, a file label.* or labels.*" in capsys.readouterr().err


@pytest.mark.parametrize(
    "documents, flags, message",
    [
        (1, (), "expected documents of two groups at least, to train on and to test with, found 1"),
        (0, ("--unknown_labels=add",), "expected training documents with labels, found none"),
        (0, (), "expected training documents with labels, found none among 3 documents of 3"),
        (9, ("--validation_fraction=0.99",), "validation_fraction: expected to leave documents to"),
        (9, ("--dataset=LF-AmazonTitles-131K",), "expected the published counts {'labels': 131073"),
        (9, (), ""),
    ],
)
def test_a_check_refuses_what_preparing_refuses(tmp_path, capsys, documents, flags, message):
    write(tmp_path / "labels.jsonl", LABELS)
    if flags == ("--unknown_labels=add",):
        (tmp_path / "labels.jsonl").unlink()
    rows = [{"text": f"word {i}", "labels": ["a"]} for i in range(documents)]
    write(tmp_path / "train.jsonl", rows or [{"text": f"{i}", "labels": []} for i in range(3)])
    given = [f"--records={tmp_path}", "--dataset=X", *flags]
    assert prepare.main([*given, "--check"]) == (1 if message else 0)
    checked = capsys.readouterr()
    assert "pairs of a document and a label" in checked.out  # the report, whatever is wrong
    assert message in checked.err and checked.err.count("\n") == (1 if message else 0)
    assert prepare.main([*given, f"--out={tmp_path}/out"]) == (1 if message else 0)
    assert message.partition(":")[0] in capsys.readouterr().err


def test_parquet_without_pyarrow_names_what_to_install(own, monkeypatch):
    folder = own("parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(folder) == (
        "train.parquet: expected the pyarrow package to read it, got none; pip install "
        '"xmc_jax[vision]"'
    )


@pytest.fixture
def own_fields(topics, tmp_path):
    """The config of records with the items of `topics`, and a validation split of them."""
    folder = tmp_path / "own"
    for name, role in (("trn", "train"), ("lbl", "labels")):
        with gzip.open(topics / f"{name}.json.gz", "rt") as file:
            items = [json.loads(line) for line in file]
        rows = [{"id": x["uid"], "text": x["title"], "labels": x.get("target_ind")} for x in items]
        if role == "labels":
            rows = [{"id": i, "text": row["text"]} for i, row in enumerate(rows)]
        write(folder / f"{role}.csv", rows)
    fields = vixml.get_config("tiny").to_dict()
    fields["data"] |= {
        "dataset": "Mine",
        "records": str(folder),
        "data_dir": str(tmp_path / "data"),
    }
    return fields


def test_a_config_names_records(own_fields, tmp_path):
    data = build.data(RunConfig.from_dict(own_fields))
    assert data.folder == tmp_path / "data" / "Mine" / "minilm-l6-packaged-8"
    assert (len(data.train), len(data.test), len(data.label)) == (180, 20, 40)
    own_fields["data"]["validation_fraction"] = 0.1
    data = build.data(RunConfig.from_dict(own_fields))
    assert (len(data.train), len(data.test)) == (162, 18)
    own_fields["data"]["records_options"]["test_fraction"] = 0.5
    with pytest.raises(ValueError, match=r"test_fraction: 0\.1 there, 0\.5 here\).*--config\.data"):
        build.data(RunConfig.from_dict(own_fields))
    own_fields["data"]["encoding"] = "latin-1"
    with pytest.raises(ValueError, match=r"data\.encoding: expected utf-8, as records are"):
        build.data(RunConfig.from_dict(own_fields))


def test_the_variant_own_asks_for_records(tmp_path):
    fields = vixml.get_config("minilm_l6/own").to_dict()
    fields["data"]["data_dir"] = str(tmp_path)
    with pytest.raises(ValueError, match=r"data.records: expected a folder with train.\* and lab"):
        build.data(RunConfig.from_dict(fields))


def test_records_may_move_between_two_starts(own_fields, tmp_path):
    from xmc_jax.files import workdirs

    workdirs.write_config(tmp_path, own_fields)
    (tmp_path / "own").rename(tmp_path / "moved")
    own_fields["data"]["records"] = str(tmp_path / "moved")
    own_fields["data"]["records_options"]["labels"] = str(tmp_path / "moved" / "labels.csv")
    workdirs.check_config(tmp_path, own_fields, new=False)


@pytest.mark.slow
def test_the_command_prepares_records(own_fields, backbone, tmp_path):
    """A real process, with the recipe for own data."""
    command = [
        sys.executable,
        "-m",
        "xmc_jax.main",
        "--mode=prepare",
        "--config=configs/vixml.py:minilm_l6/own",
        f"--config.data.records={own_fields['data']['records']}",
        f"--config.data.data_dir={tmp_path / 'data'}",
        "--config.data.dataset=Mine",
        f"--config.encoder.backbone={backbone}",
        "--config.data.records_options.test_fraction=0.2",
        "--config.data.records_options.columns=('text=text','images=')",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "labels per document: mean" in done.stderr and "Traceback" not in done.stderr
    assert "count 160" in done.stdout and "count 40" in done.stdout
    manifest = store.open(tmp_path / "data" / "Mine" / "tiny-bert-64").manifest
    assert manifest["text"] == "title_content" and manifest["propensity"] == [0.55, 1.5]


def test_a_plan_counts_records_that_are_prepared(own_fields):
    from xmc_jax.planning import shape

    with pytest.raises(ValueError, match="got Mine; run --mode=prepare first"):
        shape.of(RunConfig.from_dict(own_fields))
    folder = build.data(RunConfig.from_dict(own_fields)).folder
    assert shape.of(RunConfig.from_dict(own_fields))[1] == f"counted in {folder}; no images"
