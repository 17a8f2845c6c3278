"""Records in forms that other tools write: each is read, or refused in one line with the remedy."""

import datetime
import decimal
import gzip
import json
import pathlib

import pytest

from xmc_jax.data.records import own_records
from xmc_jax.data.records.own_records import RecordsConfig
from xmc_jax.data.tables import table_format

CASES = pathlib.Path(__file__).parents[1] / "cases" / "records"
FOUR = {
    "How to draw a stacked dotplot in R?": ["r"],
    "mysql select all records where a datetime field is less than": ["php", "mysql"],
    "How to terminate windows phone app": ["java"],
    "get current time in a specific country via jquery": ["php", "java"],
}
TAGS = ("labels=tags",)


def labels_of(folder: pathlib.Path, **options) -> dict[str, list[str]]:
    """Text of each document -> ids of its labels, of records in a folder."""
    items: dict[str, list[dict]] = {"label": [], "document": []}
    own_records.check(
        RecordsConfig(folder, **options), lambda kind, item, images: items[kind].append(item)
    )
    ids = [item["uid"] for item in items["label"]]
    return {item["title"]: [ids[row] for row in item["target_ind"]] for item in items["document"]}


@pytest.mark.parametrize(
    ("case", "options", "expected", "dialect"),
    [
        ("c01_liststring", {"columns": TAGS}, FOUR, ""),
        ("c01b_tsv", {"columns": TAGS}, FOUR, ""),
        ("c02_semicolon", {}, FOUR, "separated by semicolons"),
        ("c02_semicolon", {"delimiter": ";"}, FOUR, "separated by semicolons"),
        ("c02c_utf16", {}, {"Cafe": ["php"]}, "UTF-16"),
        ("c11_jsonarray", {}, FOUR, "one JSON list"),
        ("c13_space", {}, {"how to": ["php", "mysql"]}, ""),
        ("c41_nfd", {}, {"a": ["caf\u00e9"]}, ""),
        ("c09_dicts", {"columns": ("labels=subjects",)}, {"old castle": ["http://x/p1"]}, ""),
        (
            "c06_onehot",
            {
                "columns": ("text=comment_text",),
                "label_columns": ("*",),
                "unknown_labels": "add",
            },
            {"you are bad": ["toxic", "insult"], "nice day": []},
            "",
        ),
        (
            "c26_long",
            {"row_per_pair": True},
            {"pipe": ["php", "r"], "vinyl": ["java"]},
            "",
        ),
        (
            "c07_fasttext",
            {"unknown_labels": "add"},
            {"how to draw": ["r", "php"], "terminate app": ["java"]},
            "fastText's lines",
        ),
    ],
)
def test_forms_that_are_read(case, options, expected, dialect):
    folder = CASES / case
    assert labels_of(folder, **options) == expected
    said = own_records.describe(RecordsConfig(folder, **options))
    assert f" ({dialect}): " in said if dialect else "(" not in said


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        ("c05_sci", {}, "found '1.23457E+18'; a spreadsheet has rounded this number: have its col"),
        ("c26_long", {}, "--row_per_pair makes one document of rows of one id that follow each"),
        (
            "c06_onehot",
            {"columns": ("text=comment_text",), "unknown_labels": "add"},
            "--label_columns=toxic,obscene,insult if each label has a column of 0 and 1",
        ),
        ("c06_onehot", {"unknown_labels": "add"}, "--column text=comment_text"),
        ("c01_liststring", {"delimiter": ";;"}, "delimiter: expected one character, or tab, got"),
    ],
)
def test_forms_that_are_refused_with_the_remedy(case, options, said):
    with pytest.raises(ValueError) as error:
        own_records.check(RecordsConfig(CASES / case, **options))
    assert said in str(error.value) and "\n" not in str(error.value)


def write_parquet(folder: pathlib.Path, **columns) -> pathlib.Path:
    import pyarrow
    import pyarrow.parquet

    given = {"id": ["1", "2"], "text": ["one", "two"], "labels": [["7"], ["8"]]} | columns
    pyarrow.parquet.write_table(pyarrow.table(given), folder / "train.parquet")
    (folder / "labels.csv").write_text("id,text\n7,seven\n8,eight\n")
    return folder


def test_decimals_of_parquet_are_whole_numbers(tmp_path):
    ids = [decimal.Decimal("7"), decimal.Decimal("8")]
    folder = write_parquet(tmp_path, labels=ids)
    assert labels_of(folder, test_fraction=0.5) == {"one": ["7"], "two": ["8"]}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id": [decimal.Decimal("7.5")] * 2}, "column id: expected an id"),
        ({"id": [datetime.datetime(2020, 1, 1)] * 2}, "column id: expected texts, numbers or"),
        ({"labels": [True, False]}, "column labels: expected an id"),
    ],
)
def test_types_of_parquet_without_a_meaning_are_to_be_cast(tmp_path, columns, said):
    with pytest.raises(ValueError) as error:
        own_records.check(RecordsConfig(write_parquet(tmp_path, **columns)))
    assert said in str(error.value)
    assert str(error.value).endswith("; cast the column to text, as pandas does with astype(str)")


def test_a_list_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"column text: .*\['a'\]; join the list into one text"):
        own_records.check(RecordsConfig(write_parquet(tmp_path, text=[["a"], ["b"]])))


# What is no table, and what only its name hides

CSV = b"id,text,labels\n1,one,7\n2,two,7|8\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", gzip.compress(CSV, mtime=0), None),
        ("Train.CSV.GZ", gzip.compress(CSV, mtime=0), None),
        ("train.csv", CSV.decode().encode("utf-16"), None),
        ("train.csv.gz", gzip.compress(CSV.decode().encode("utf-32"), mtime=0), None),
        ("train.TSV", CSV.replace(b",", b"\t"), None),
        ("train.tsv", CSV, None),
        ("train.csv", CSV.replace(b"|", b";").replace(b",", b"|"), None),
        ("train.csv", b"\xef\xbb\xbf" + CSV.replace(b"\n", b",,\r\n"), None),
        ("train.csv", CSV.replace(b"2,", b",,\n\n2,") + b",,\n", None),
        ("train.csv", b"PK\x03\x04" + CSV, "found a ZIP archive, such as an Excel workbook; save"),
        ("train.csv", CSV.decode().encode("utf-16-le"), "found UTF-16 without a byte order mark"),
        ("train.jsonl", b"PAR1" + CSV, "found a Parquet file; give it a name ending in .parquet"),
        ("train.csv", CSV.replace(b"\n", b"\r"), "lines that end in LF or CRLF, found a CR within"),
        ("train.csv", b"sep=;\n" + CSV, "found 'sep=;', which Excel reads as a separator; remove"),
        ("train.csv", b"id,text,labels\n1,a,7,\n2,b, c,7\n", "a cell with ',' in it needs quotes"),
        (
            "Train.xlsx",
            b"",
            "Train.xlsx: expected a name ending in .*; save the sheet as CSV UTF-8",
        ),
        (
            "train.txt",
            CSV,
            "expected lines of fastText, with labels such as __label__tea, found 'i",
        ),
    ],
)
def test_what_a_file_is_follows_from_its_bytes(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "LABELS.csv").write_text("id,text\n7,seven\n8,eight\n")
    separator = ";" if b"1|one" in content else "|"
    if expected is None:
        found = labels_of(tmp_path, separator=separator, test_fraction=0.5)
        assert found == {"one": ["7"], "two": ["7", "8"]}
    else:
        with pytest.raises(ValueError, match=expected) as error:
            own_records.check(RecordsConfig(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['7', '8']", ["7", "8"]),
        ("['7' '8'\n '7']", ["7", "8", "7"]),
        ("[('7',), '8']", None),
        ("['7', None]", None),
        ("[{'id': 7, 'name': 'x'}, {\"name\": '8'}]", ["7", "8"]),
        (r"['\x37', '8\n']", ["7", "8"]),
        ("[7, 8.0]", ["7", "8"]),
        ("['\\U99999999']", None),
        ("[7, ...]", None),
    ],
)
def test_lists_as_python_writes_them(tmp_path, cell, expected):
    from xmc_jax.data.tables import cell_values

    if expected is None:
        with pytest.raises(ValueError, match=r"expected an id|expected a list in brackets"):
            cell_values.identifiers(cell, "|")
    else:
        assert cell_values.identifiers(cell, "|") == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("<http://x/p1> <http://x/p2>", ["http://x/p1", "http://x/p2"]),
        (" <http://x/p1>\n<urn:a|b>", ["http://x/p1", "urn:a|b"]),
        ("<http://x/p1>|<http://x/p2>|http://x/p3", [f"http://x/p{i}" for i in (1, 2, 3)]),
        (["<http://x/p1>", "p2"], ["http://x/p1", "p2"]),
        ("<b>|<http://x/p 1>", ["<b>", "<http://x/p 1>"]),
    ],
)
def test_iris_in_angle_brackets(cell, expected):
    from xmc_jax.data.tables import cell_values

    assert cell_values.identifiers(cell, "|") == expected


# One list of objects


def json_list(path: pathlib.Path, content: str) -> pathlib.Path:
    path.write_text(content)
    (path.parent / "labels.csv").write_text("id,text\n7,seven\n8,eight\n")
    return path.parent


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[{"text": "a", "labels": [7]},\n',
            ":2: expected '{' of a list of objects, found the end",
        ),
        ('[{"text": "a", "labels": [7]}\n{"text"', ":2: expected ',' of a list of objects, found"),
        ('[{"text": "a", "labels": [7]}]\n]', ":2: expected nothing behind the list of objects"),
        ('[\n\n{"text": "a", "labels": [7}]', ":3: expected a JSON object, whole and of at most"),
        ('[{"text": "a", "labels": [7]},\n ["a"]]', ":2: expected '{' of a list of objects"),
        ('[{"text": "a",\n "text": "b"}]', ":1: expected a JSON object, found key 'text' twice"),
        ("[" + '{"a":[' * 99999, ":1: expected a JSON object, found one nested too deeply"),
        ("[]", ": expected records, found an empty file"),
    ],
)
def test_a_damaged_list_is_refused_with_its_line(tmp_path, content, said):
    folder = json_list(tmp_path / "train.jsonl", content)
    with pytest.raises(ValueError) as error:
        own_records.check(RecordsConfig(folder))
    assert f"train.jsonl{said}" in str(error.value) and "\n" not in str(error.value)


def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    """Objects and letters that end beyond a block; lines are counted on."""
    from xmc_jax.files import text_files

    rows = [{"text": f"gr\u00fc\u00dfe {i}\n", "labels": [7]} for i in range(40)]
    content = json.dumps(rows, indent=1, ensure_ascii=False)
    folder = json_list(tmp_path / "train.json", content)
    for size in (1, 64, 7):
        monkeypatch.setattr(text_files, "BLOCK", size)
        assert len(labels_of(folder)) == 40
    monkeypatch.setattr(table_format, "MAX_RECORD", 40)
    with pytest.raises(ValueError, match=r"train.json:2: expected a JSON object, whole and of at"):
        labels_of(folder)
    monkeypatch.undo()
    rows[30]["labels"] = [9]
    json_list(tmp_path / "train.json", json.dumps(rows, indent=1, ensure_ascii=False))
    line = content.splitlines()[: content[: content.index("e 30")].count("\n")]
    with pytest.raises(ValueError, match=rf"train.json:{len(line)}: column labels: .* found '9'"):
        own_records.check(RecordsConfig(folder))


# A row per pair, a column per label


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("1,a,7\n1,,8\n1,a,\n", None),
        ("1,a,7\n1,b,8\n", "train.csv:3: column text: expected nothing, or what .*train.csv:2 has"),
        ("1,a,7\n2,b,8\n1,a,8\n", "train.csv:4: expected ids that differ"),
    ],
)
def test_rows_of_one_document(tmp_path, rows, said):
    (tmp_path / "train.csv").write_text(f"id,text,labels\n{rows}")
    (tmp_path / "labels.csv").write_text("id,text\n7,seven\n8,eight\n")
    if said is None:
        assert labels_of(tmp_path, row_per_pair=True) == {"a": ["7", "8"]}
    else:
        with pytest.raises(ValueError, match=said):
            own_records.check(RecordsConfig(tmp_path, row_per_pair=True))


def test_columns_of_labels_hold_nothing_else(tmp_path):
    (tmp_path / "train.csv").write_text("text,7,8\na,1,True\nb,,0.0\nc,2,0\n")
    (tmp_path / "labels.csv").write_text("id,text\n7,seven\n8,eight\n")
    with pytest.raises(ValueError, match=r"train.csv:4: column 7: expected 0 or 1 .* found '2'"):
        own_records.check(RecordsConfig(tmp_path, label_columns=("7", "8")))
    with pytest.raises(ValueError, match="expected a column 9, as --label_columns says, found te"):
        own_records.check(RecordsConfig(tmp_path, label_columns=("7", "9")))


# Paths of images


@pytest.mark.parametrize("path", ["/etc/passwd", "../a.png", "link/a.png", "a/../../b.png"])
def test_images_stay_in_the_folder_of_their_records(tmp_path, path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    rows = [{"text": t, "labels": [7], "images": [path]} for t in "ab"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.csv").write_text("id,text\n7,seven\n")
    with pytest.raises(ValueError, match=r"train.jsonl:1: column images: .* within the folder"):
        own_records.check(RecordsConfig(folder))
    assert own_records.check(RecordsConfig(folder, allow_paths=True, test_fraction=0.5))
