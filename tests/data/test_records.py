"""Own records: the same whatever the format; split, checked, counted; bad ones in one line."""

import csv
import gzip
import io
import json
import os
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from xmc_jax.data import bundled, prepare, raw, raw_folder, records
from xmc_jax.data.records import RecordsConfig

pa = pytest.importorskip("pyarrow", reason="Parquet needs the extra vision")
pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra vision")

ROOT = pathlib.Path(__file__).parents[2]
DEBIAN = "LF-DebianTitles-3K"
KINDS = ("jsonl", "csv", "parquet")
settings = hypothesis.settings(
    max_examples=60,
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
    return records.convert(RecordsConfig(folder, **options), out)[0]


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
ids = ids.filter(lambda uid: uid.strip())


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
            kept = [
                (row[name], weight)
                for name, weight in zip(document["labels"], document["weights"])
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


@pytest.mark.parametrize(
    "cell",
    ['["a", "b"]', "a|b", " a | b |", '[ "a","b" ]', "a|b|", "a;b", "a b"],
)
def test_lists_in_a_cell(tmp_path, cell):
    separator = next((s for s in ";| " if s in cell and "[" not in cell), "|")
    if cell == " a | b |":
        separator = "|"
    write(tmp_path / "label.csv", [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}])
    rows = [{"text": "one", "labels": cell}, {"text": "two", "labels": "a"}]
    write(tmp_path / "train.csv", rows)
    convert(tmp_path, tmp_path / "raw", separator=separator, test_fraction=0.5)
    lines = [json.loads((tmp_path / "raw" / n).read_text()) for n in ("trn.json", "tst.json")]
    assert sorted(line["target_ind"] for line in lines) == [[0], [0, 1]]


# What is wrong, and where

LABELS = [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]
DOCUMENTS = [{"id": i, "text": f"t{i}", "labels": ["a"]} for i in range(6)]


def refused(folder: pathlib.Path, **options) -> str:
    """The error's only line, without the folder's name."""
    with pytest.raises(ValueError) as error:
        records.check(RecordsConfig(folder, **options))
    assert not isinstance(error.value, UnicodeError)
    (line,) = str(error.value).splitlines()
    return line.replace(f"{folder}/", "")


@pytest.fixture
def own(tmp_path):
    """A function that writes labels and documents of a kind, some of them changed."""

    def make(kind: str = "jsonl", changes: dict = {}, labels=LABELS) -> pathlib.Path:
        folder = tmp_path / "own"
        rows = [document | changes.get(i, {}) for i, document in enumerate(DOCUMENTS)]
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
        ({"labels": ["zz"]}, "(1 such ids in 1 places); --unknown_labels=drop leaves them out"),
        ({"labels": ["a", ""]}, "column labels: expected an id, a text without tabs and line ends"),
        ({"labels": ["a\tb"]}, r"found 'a\tb'"),
        ({"id": 1}, "expected ids that differ, found that of"),
        ({"id": None}, "column id: expected an id, a text without tabs and line ends or a whole"),
        ({"split": "dev"}, "column split: expected train or test, found 'dev'"),
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
        (b"[]", "expected a JSON object, found '[]'; one object per line, without a list"),
        (b"{", "expected a JSON object, found '{'; one object per line"),
        (b"null", "expected a JSON object, found 'null'"),
        (b"7", "expected a JSON object, found '7'"),
        (b'{"id": 9, "text": "x", "labels": ["a"], "id": 9}', "found key 'id' twice"),
        (b'{"id": 9, "text": "x", "labels": ["a"]', 'expected a JSON object, found \'{"id"'),
        (
            b'{"id": 9, "txt": "x", "labels": ["a"]}',
            "expected 'text', as in other records, found id, txt",
        ),
        (b"{}", "found an empty object"),
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
        (b'{"id": 9, "text": "x", "labels": "[a]"}', "expected a JSON list, or texts separated"),
        (b'{"id": 9, "text": "x", "labels": [Infinity]}', "found inf"),
        (b'{"id": " ", "text": "x", "labels": ["a"]}', "column id: expected an id"),
        (b'{"id": 1e300, "text": "x", "labels": ["a"]}', "column id: expected an id"),
        (
            b'{"id": NaN, "text": "x", "labels": ["a"]}',
            "column id: expected an id, a text without tabs and line ends or a whole number, found nothing",
        ),
        (b'{"id": 9, "text": "\xe9", "labels": ["a"]}', "expected UTF-8, found byte 0xe9; convert"),
        (b"[" * 100_000, "expected a JSON object, found one nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "expected a JSON object, found Exceeds the limit"),
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
        records.check(RecordsConfig(folder, test_fraction=0.5))
    else:
        found = refused(folder)
        assert found.startswith("train.jsonl:3: ") and message in found


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "train.csv: expected a header with the columns' names, found none"),
        (b"\n\n", "train.csv: expected a header with the columns' names, found none"),
        (b"id,text,labels\n", "train.csv: expected training documents, found none among 0"),
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
        (b"id;text;labels\n1;x;a\n", "separate cells by commas, not by ';'"),
        (
            b"text,title,labels\n1,x,a\n",
            "train.csv: expected one column for text, found text and title; say which: --column text=title, or --column text=title --column content=text",
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
            "id,text,labels\n1,x,a\n".encode("utf-16"),
            "train.csv:1: expected UTF-8, found byte 0xff",
        ),
        (
            b"id,text,labels\n1,x,['a']\n2,x,b\n",
            "column labels: expected a JSON list, or texts separated by '|'",
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
        b'\xef\xbb\xbfid, text ,labels,\r\n1,"one\r\ntwo, ""three""",a,\r\n\r\n2,,a|b,\r\n007,x,,\r\n'
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
