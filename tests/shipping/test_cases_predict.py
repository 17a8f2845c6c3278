"""Files of documents as other tools write them: ids, blank rows, bounds, paths of pictures."""

import dataclasses
import io
import json
import pathlib
import sys
import types

import pytest

from xmc_jax.config import PredictConfig
from xmc_jax.shipping import documents, predict_files
from xmc_jax.shipping.predictor import Predictor

CASES = pathlib.Path(__file__).parents[1] / "cases" / "predict"
TEXTS = types.SimpleNamespace(text="title", images=None)
PICTURES = types.SimpleNamespace(text="title", images=types.SimpleNamespace(per_item=3))
NEITHER = "expected a text or a picture, found neither"


def read(path: pathlib.Path | str, model=TEXTS, **options) -> list[tuple[str, str, str | None]]:
    """Id, text and problem of each document."""
    source = documents.DocumentFile(str(path), model, **options)
    return [(one.id, one.query.text, one.problem) for one in source.documents()]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("UP.CSV", [("1", "gimp", None)]),
        ("UP.CSV.GZ", [("1", "gimp", None)]),
        ("Mixed.Csv", [("0", "gimp", None)]),
        ("UP.PARQUET", [("a", "gimp", None)]),
        ("excel_semicolon.csv", [("1", "gimp editor", None)]),
        ("trailing_commas.csv", [("1", "gimp", None)]),
        ("gz_as.jsonl", [("0", "gimp", None)]),
        ("empty.jsonl", []),
        ("nulls.parquet", [("row-0", "gimp", None), ("b", "", NEITHER)]),
        (
            "miss_skip.jsonl",
            [
                ("1", "gimp", None),
                ("4", "", "column text: expected a text, as in other records, found id"),
                ("5", "gedit", None),
            ],
        ),
    ],
)
def test_documents_of_each_case(name, expected):
    assert read(CASES / name) == expected


def test_names_of_columns_may_have_capitals_and_what_is_not_read_is_logged(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    path = tmp_path / "new.csv"
    path.write_text("ID;Title;Price\n7;gimp;3\n")
    source = documents.DocumentFile(str(path), TEXTS)
    assert [(one.id, one.query.text) for one in source.documents()] == [("7", "gimp")]
    assert "new.csv: separated by semicolons" in caplog.text
    assert "new.csv: not read: Price" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--labels\.columns=text=NAME"),
        ({"columns": ["only=name"]}, r"--labels\.columns: expected .* id, text, content, images,"),
        ({"delimiter": "tabs"}, r"--labels\.delimiter: expected one character, or tab"),
        ({"columns": ["text=name"]}, r"labels\.csv:3: expected a text or a picture"),
    ],
)
def test_an_error_about_labels_names_their_flag_or_line(tmp_path, options, message):
    path = tmp_path / "labels.csv"
    path.write_text("id~name\n1~tea\n2~\n")
    with pytest.raises(ValueError, match=message):
        list(documents.labels(str(path), TEXTS, **{"delimiter": "~"} | options))


@pytest.mark.slow
def test_every_case_is_predicted(predictor, tmp_path, monkeypatch):
    """From the file to the output; what cannot be ranked is told in its place."""
    monkeypatch.setattr(predict_files, "QueryEncoder", lambda _: predictor._encoder)
    config = PredictConfig(k=2, on_error="skip")
    for path in sorted(CASES.iterdir()):
        out = tmp_path / f"{path.name}.jsonl"
        predict_files.predict(predictor.artifact, config, str(path), str(out))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        expected = [(uid, problem) for uid, _, problem in read(path)]
        assert [(line["id"], line.get("error")) for line in lines] == expected
        assert all(len(line.get("labels", "ab")) == 2 for line in lines)
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": "a"}\n{"text": " "}\n')
    with pytest.raises(ValueError, match=rf"blank.jsonl:2: {NEITHER}; --predict.on_error=skip"):
        stopping = dataclasses.replace(config, on_error="stop")
        predict_files.predict(
            predictor.artifact, stopping, str(blank), str(tmp_path / "blank.out.jsonl")
        )
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"\n")))
    report = predict_files.predict(predictor.artifact, config, "-", str(tmp_path / "none.parquet"))
    assert report.progress.documents == 0 and (tmp_path / "none.parquet").is_file()


# Ids


def lines(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_id_is_there_twice(tmp_path):
    """A record without an id has a number that no other can have; others' ids are refused."""
    some = [{"id": 7, "text": "a"}, {"text": "b"}, {"id": " row-1", "text": "c"}, {"id": ""}]
    found = read(lines(tmp_path / "a.jsonl", some))
    assert [uid for uid, *_ in found] == ["7", "row-1", "row-2", "row-3"]
    assert "expected another id, since records without one are numbered" in found[2][2]
    late = [{"text": "a"}] * 1001 + [{"id": "5", "text": "b"}, {"id": "x5", "text": "c"}]
    found = read(lines(tmp_path / "b.jsonl", late))
    assert [uid for uid, *_ in found] == [*map(str, range(1002)), "x5"]
    assert "give all records ids, or none" in found[1001][2] and found[1002][2] is None


def test_ids_are_compared_without_blanks_and_in_one_form(tmp_path):
    row = {"id": " caf\u0065\u0301 ", "text": "a", "only": ["caf\u0065\u0301"], "exclude": " b |c"}
    (document,) = documents.DocumentFile(str(lines(tmp_path / "a.jsonl", [row])), TEXTS).documents()
    assert document.id == "caf\u00e9"
    assert (document.query.only, document.query.exclude) == (("caf\u00e9",), ("b", "c"))
    (tmp_path / "only.txt").write_text(" caf\u0065\u0301\u00a0\n\nb\n")
    assert documents.ids_of(str(tmp_path / "only.txt")) == {"caf\u00e9": 1, "b": 3}


def test_an_unknown_id_that_is_several_or_a_part_is_explained():
    ids = ["1", "2", "a|b", "tea"]
    predictor = Predictor.__new__(Predictor)
    predictor.__dict__["_row_of"] = {name: row for row, name in enumerate(ids)}
    assert "'|' separates 2 ids of labels here" in predictor.hint("1|2")
    assert "',' separates 3 ids of labels here" in predictor.hint("1, 2,tea")
    assert """give it as an element of a list, ['a|b']""" in predictor.hint("b")
    assert "a spreadsheet has rounded this number" in predictor.hint("1.2E+15")
    assert predictor.hint("1|3") == predictor.hint("none") == ""


# Bounds


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "a", "only": []}\n{"text": "b", "only": null}\n', [(), None]),
        ("a.jsonl", b'{"text": "a", "only": ""}\n{"text": "b"}\n', [(), None]),
        ("a.csv", b"text,only\na,\nb,x|y\n", [(), ("x", "y")]),
        ("a.csv", b"text,only\na,[]\nb,\"['x', 'y']\"\n", [(), ("x", "y")]),
        ("a.csv", b"text\na\nb\n", [None, None]),
    ],
)
def test_an_empty_list_of_labels_is_not_none(tmp_path, caplog, name, content, expected):
    (tmp_path / name).write_bytes(content)
    found = [d.query.only for d in documents.DocumentFile(str(tmp_path / name), TEXTS).documents()]
    assert found == expected
    said = caplog.text.count("is empty: no label may be predicted for this document")
    assert said == (b"a,\n" in content or b'""' in content)


# Paths of pictures


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "link/secret.png"])
def test_pictures_stay_in_the_folder_of_their_file(tmp_path, path):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"root:x:0:0")
    (folder / "link").symlink_to(tmp_path)
    source = lines(folder / "a.jsonl", [{"text": "a", "images": [path]}])
    ((_, _, problem),) = read(source, PICTURES)
    assert "expected a path within the folder of its table" in problem and "root" not in problem
    assert read(source, PICTURES, allow_paths=True)[0][2] is None


def test_a_pipe_and_a_named_delimiter(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    assert read("-") == []
    (tmp_path / "a.csv").write_text("id^text, or not\n1^a\n")
    options = {"columns": ("text=text, or not",), "delimiter": "^"}
    assert read(tmp_path / "a.csv", **options) == [("1", "a", None)]
