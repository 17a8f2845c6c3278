"""Files of documents to files of ranked labels: formats, mistakes, and kills at any moment."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from xmc_jax.config import PredictConfig
from xmc_jax.shipping import artifact, documents, outputs, predict_files

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
CONFIG = PredictConfig(k=4, batch_size=50)


@pytest.fixture(scope="module")
def opened(exported):
    return artifact.open(exported.folder)


@pytest.fixture(scope="module", autouse=True)
def one_predictor(opened, predictor):
    """Models are loaded once for all files of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_files, "QueryEncoder", lambda _: predictor._encoder)
        yield


@pytest.fixture(scope="module")
def records(exported) -> list[dict]:
    texts = exported.run.data.texts("train")
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
    rows[3] |= {"only": ["topic1", "topic2", "topic5"]}
    rows[4] |= {"exclude": ["topic7"]}
    rows[150] |= {"text": 'a "quoted", line\nof two'}
    return rows


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """Rows as the name's ending says."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        names = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        pyarrow.parquet.write_table(table, path, row_group_size=70)
        return path
    content = jsonl(rows)
    if ".csv" in path.name:
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(
            {n: "|".join(x) if isinstance(x, list) else x for n, x in row.items()} for row in rows
        )
        content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def run(opened, source, target, overwrite=False, **changes) -> predict_files.Report:
    config = dataclasses.replace(CONFIG, **changes)
    return predict_files.predict(opened, config, str(source), str(target), overwrite)


@pytest.fixture(scope="module")
def expected(opened, records, tmp_path_factory) -> bytes:
    """What the records give as lines."""
    folder = tmp_path_factory.mktemp("expected")
    run(opened, write(folder / "in.jsonl", records), folder / "out.jsonl")
    return (folder / "out.jsonl").read_bytes()


def test_lines_say_what_the_predictor_finds(opened, predictor, records, expected):
    lines = [json.loads(line) for line in expected.splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in records]
    queries = [
        documents.Query(row["text"], only=row.get("only"), exclude=row.get("exclude", ()))
        for row in records
    ]
    scores, rows, _ = predictor.rank(queries, 4, "auto", (64,))
    ids, texts = (list(x) for x in (opened.labels.ids, opened.labels.texts))
    for line, score, found in zip(lines, scores, rows):
        there = found >= 0
        assert [one["id"] for one in line["labels"]] == [ids[row] for row in found[there]]
        assert [one["text"] for one in line["labels"]] == [texts[row] for row in found[there]]
        # To the bit: the digits tell a float32 from all others.
        assert [np.float32(one["score"]) for one in line["labels"]] == score[there].tolist()
    assert {one["id"] for one in lines[3]["labels"]} <= {"topic1", "topic2", "topic5"}


@pytest.mark.parametrize("name", ["in.ndjson", "in.csv.gz", "in.parquet"])
def test_every_format_gives_the_same(opened, records, expected, tmp_path, name):
    # In CSV an empty cell of `only` is an empty list; those of the others are left out here.
    columns = ("only=",) if ".csv" in name else ()
    report = run(opened, write(tmp_path / name, records), tmp_path / "out.jsonl", columns=columns)
    found = (tmp_path / "out.jsonl").read_bytes().splitlines()
    wanted = expected.splitlines()
    assert found[:3] + found[4:] == wanted[:3] + wanted[4:]
    assert (found[3] == wanted[3]) is not bool(columns)
    assert (report.progress.documents, report.progress.errors) == (200, 0)
    assert "200 documents; " in str(report) and str(report).endswith(" documents/s")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([name, "out.jsonl", "out.jsonl.progress.json"])


def test_an_input_that_is_mended_after_an_error_is_no_other_run(opened, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": 1.5}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:1"):
        run(opened, source, target)
    source.write_text('{"text": "a"}\n')
    assert run(opened, source, target).progress.documents == 1


@pytest.mark.parametrize("size", [1, 7])
def test_batches_do_not_matter(opened, records, expected, tmp_path, size):
    some = records if size > 1 else records[:12]
    run(opened, write(tmp_path / "in.jsonl", some), tmp_path / "out.jsonl", batch_size=size)
    found = (tmp_path / "out.jsonl").read_bytes()
    wanted = b"".join(expected.splitlines(keepends=True)[: len(some)])
    assert hashlib.sha256(found).hexdigest() == hashlib.sha256(wanted).hexdigest()


def read_parquet(path: pathlib.Path) -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def test_parquet_says_what_lines_say(opened, records, expected, tmp_path, monkeypatch):
    name = "OUT.PARQUET"
    monkeypatch.setattr(outputs, "_GROUP", 64)
    run(opened, write(tmp_path / "in.jsonl", records), tmp_path / name)
    lines = [json.loads(line) for line in expected.splitlines()]
    found = read_parquet(tmp_path / name)
    for row in found:
        for label in row["labels"]:
            label["score"] = float(str(np.float32(label["score"])))
    assert found == [line | {"cut": False, "error": None} for line in lines]
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(tmp_path / name).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [64, 64, 64, 8]


def test_titles_contents_columns_and_numbers(opened, exported, tmp_path):
    texts = exported.run.data.texts("train")[:5]
    plain = write(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    run(opened, plain, tmp_path / "plain.out.jsonl")
    lines = (tmp_path / "plain.out.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in lines.splitlines()] == ["0", "1", "2", "3", "4"]
    # The model was trained on titles.
    titles = [{"title": text, "content": "and more"} for text in texts]
    named = [{"name": text, "id": f"x{i}", "text": "?"} for i, text in enumerate(texts)]
    for rows, columns in ((titles, ()), (named, ("text=name", "id="))):
        source = write(tmp_path / "other.csv", rows)
        run(opened, source, tmp_path / "other.jsonl", True, columns=columns)
        assert (tmp_path / "other.jsonl").read_bytes() == lines
    model = dataclasses.replace(opened.model, text="title_content")
    whole = documents.DocumentFile(str(write(tmp_path / "other.csv", titles)), model)
    assert [d.query.text for d in whole.documents()] == [f"{text} and more" for text in texts]


def test_lists_for_all_documents(opened, predictor, records, tmp_path):
    (tmp_path / "only.txt").write_text("topic1\n\n topic2 \r\ntopic3\ntopic1\n")
    (tmp_path / "exclude.txt").write_text("topic3\n")
    source = write(tmp_path / "in.jsonl", records)
    some = {"only": str(tmp_path / "only.txt"), "exclude": str(tmp_path / "exclude.txt")}
    run(opened, source, tmp_path / "out.jsonl", **some)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for line in lines:
        assert {one["id"] for one in line["labels"]} <= {"topic1", "topic2"}
    assert len(lines[0]["labels"]) == 2
    run(opened, source, tmp_path / "rest.jsonl", exclude=some["exclude"])
    for line in (tmp_path / "rest.jsonl").read_text().splitlines():
        assert "topic3" not in {one["id"] for one in json.loads(line)["labels"]}
    (tmp_path / "exclude.txt").write_text("topic3\ntopics\n")
    with pytest.raises(ValueError, match=r"exclude.txt:2: label 'topics': expected one of the 40"):
        run(opened, source, tmp_path / "bad.jsonl", exclude=some["exclude"])
    with pytest.raises(ValueError, match=r"predict\.index: expected exact with"):
        run(opened, source, tmp_path / "bad.jsonl", only=some["only"], index="scann")


# What is wrong, and how it is said

BAD = [
    ({"text": 3.5}, "column text: expected a text, found 3.5"),
    ({"text": "x", "only": ["nowhere"]}, "only: label 'nowhere': expected one of the 40 labels of"),
    ({"text": "\ud800"}, r"column text: expected Unicode, found half of a \u pair"),
]


@pytest.mark.parametrize(("record", "problem"), BAD, ids=lambda x: str(x)[:30])
def test_a_bad_record_stops_or_is_skipped(opened, records, expected, tmp_path, record, problem):
    rows = [*records[:60], record, *records[61:]]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as caught:
        run(opened, source, tmp_path / "out.jsonl")
    said = str(caught.value)
    assert said.startswith(f"{source}:61: {problem}") and "--predict.on_error=skip" in said
    assert "\n" not in said and len(said) < 600
    assert not (tmp_path / "out.jsonl").exists()
    # The same command with another policy goes on with what was done.
    report = run(opened, source, tmp_path / "out.jsonl", on_error="skip")
    assert (report.before, report.progress.errors) == (50, 1)
    found = (tmp_path / "out.jsonl").read_bytes().splitlines()
    skipped = json.loads(found.pop(60))
    assert skipped["error"].startswith(problem) and "labels" not in skipped
    wanted = expected.splitlines()
    del wanted[60]
    assert found == wanted
    run(opened, source, tmp_path / "out.parquet", on_error="skip")
    row = read_parquet(tmp_path / "out.parquet")[60]
    error = {"id": skipped["id"], "cut": False, "labels": None, "error": skipped["error"]}
    assert row == error


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("in.md", b"x", {}, "in.md: expected a name ending in .jsonl"),
        ("absent.jsonl", None, {}, "absent.jsonl: expected a file of records, found none"),
        ("in.jsonl", b'{"text": "x"}\n{"text": \n', {}, "in.jsonl:2: expected a JSON object"),
        ("in.jsonl", b'{"txt": "x"}\n', {}, "expected a column text or title, found txt; say"),
        ("in.csv", b"id,text,title\n1,a,b\n", {}, "expected a column text or title, found both"),
        ("in.csv", b'id,text\n1,"a\n', {}, "in.csv:2: expected CSV, found a quote"),
        ("in.csv", b"t\n1\n", {"columns": ("text=a",)}, "expected a column a, as --predict.colu"),
        ("in.csv", b"t\n1\n", {"columns": ("label=a",)}, "predict.columns: expected FIELD=NAME"),
        ("in.csv", b"text\n1\n", {"only": "none.txt"}, "none.txt: cannot be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(opened, tmp_path, name, content, changes, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        run(opened, tmp_path / name, tmp_path / "out.jsonl", on_error="skip", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 and not (tmp_path / "out.jsonl").exists()


def test_texts_that_were_cut_are_marked_and_counted(opened, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "word " * 50}])
    report = run(opened, source, tmp_path / "out.jsonl")
    assert report.progress.cut == 1 and "1 longer than the model takes, and cut" in str(report)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "cut" not in lines[0] and lines[1]["cut"] is True
    run(opened, source, tmp_path / "out.parquet")
    assert [row["cut"] for row in read_parquet(tmp_path / "out.parquet")] == [False, True]


# What is there already


def test_what_is_complete_is_left_and_what_is_of_others_refused(opened, records, tmp_path):
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    run(opened, source, target)
    made, when = target.read_bytes(), target.stat().st_mtime_ns
    report = run(opened, source, target, batch_size=9)  # which makes no difference
    assert report.complete and str(report) == "is complete: 200 documents"
    assert target.stat().st_mtime_ns == when
    for changes, name in (
        ({"k": 5}, "k 5, found 4"),
        ({"ranking": "plain"}, '"plain", found "auto"'),
    ):
        with pytest.raises(ValueError, match=f"progress.json: expected .*{name}.*--overwrite"):
            run(opened, source, target, **changes)
    other = write(tmp_path / "other.jsonl", records[:3])
    with pytest.raises(ValueError, match=r"expected input .*--overwrite"):
        run(opened, other, target)
    assert target.read_bytes() == made
    run(opened, other, target, overwrite=True)
    assert target.read_bytes() == b"".join(made.splitlines(keepends=True)[:3])
    target.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"out.jsonl: expected \d+ bytes, .*--overwrite"):
        run(opened, other, target)
    target.unlink()  # what is gone is made again
    assert not run(opened, other, target).complete and target.exists()
    (tmp_path / "out.jsonl.progress.json").write_text("{}")
    with pytest.raises(ValueError, match="expected the progress of a run, found something else"):
        run(opened, other, target)
    (tmp_path / "out.jsonl.progress.json").unlink()
    with pytest.raises(ValueError, match=r"out.jsonl: expected nothing, or what a run"):
        run(opened, other, target)
    assert target.read_bytes() == b"".join(made.splitlines(keepends=True)[:3])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("in.jsonl", "expected another file than the input"),
        ("out.txt", "expected a name ending in .jsonl"),
        ("", "expected a name ending in|expected the name of a file"),
    ],
)
def test_outputs_that_cannot_be(opened, records, tmp_path, target, message):
    source = write(tmp_path / "in.jsonl", records)
    with pytest.raises(ValueError, match=message):
        run(opened, source, tmp_path / target)
    assert source.read_bytes() == jsonl(records)


def test_two_at_a_time_are_refused(opened, records, tmp_path):
    source = write(tmp_path / "in.jsonl", records)
    refused = pytest.raises(ValueError, match="expected no other process, found process")
    with outputs.begin(tmp_path / "out.jsonl", {}), refused:
        run(opened, source, tmp_path / "out.jsonl")


class Pipe(io.BytesIO):
    @property
    def buffer(self):
        return self


def test_pipes(opened, records, expected, tmp_path, monkeypatch):
    """Standard input to a file, which goes on only with the same lines; and to standard output."""
    target = tmp_path / "out.jsonl"
    broken = [*records[:70], {"text": []}]
    monkeypatch.setattr(sys, "stdin", Pipe(jsonl(broken)))
    with pytest.raises(ValueError, match="stdin:71: column text"):
        run(opened, "-", target)
    monkeypatch.setattr(sys, "stdin", Pipe(jsonl(records[::-1])))
    with pytest.raises(ValueError, match="stdin: expected the 50 records that are done already"):
        run(opened, "-", target)
    monkeypatch.setattr(sys, "stdin", Pipe(jsonl(records)))
    assert run(opened, "-", target).before == 50
    assert target.read_bytes() == expected
    monkeypatch.setattr(sys, "stdin", Pipe(jsonl(records)))
    assert run(opened, "-", target).complete
    for others in (records[:-1], [*records, records[0]], [*records[:-1], records[0]]):
        monkeypatch.setattr(sys, "stdin", Pipe(jsonl(others)))
        with pytest.raises(ValueError, match="stdin: expected the 200 records that are done"):
            run(opened, "-", target)
    out = Pipe()
    monkeypatch.setattr(sys, "stdin", Pipe(jsonl(records)))
    monkeypatch.setattr(sys, "stdout", out)
    run(opened, "-", "-")
    assert out.getvalue() == expected


def test_an_interrupt_keeps_what_was_done(opened, records, expected, tmp_path, monkeypatch):
    source, ranked, calls = write(tmp_path / "in.jsonl", records), predict_files._ranked, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ranked(*arguments)

    monkeypatch.setattr(predict_files, "_ranked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(opened, source, tmp_path / "out.jsonl")
    assert run(opened, source, tmp_path / "out.jsonl").before == 100
    assert (tmp_path / "out.jsonl").read_bytes() == expected


# Kills

CRASH = """
import dataclasses, json, os, pathlib, signal, sys
import numpy as np
from xmc_jax.shipping import artifact, outputs
from xmc_jax.shipping.predictor import Ranking

labels = artifact.Labels([f"l{i}" for i in range(9)], [f"label {i}" for i in range(9)], None, None)
outputs._SECONDS = 0
outputs._GROUP = 8
COUNT = 22

def make(path, size=5):
    with outputs.begin(path, {"of": "these"}) as output:
        if output.complete:
            return
        sink, done = outputs.LineSink(output, labels), output.progress
        while done.documents < COUNT:
            ids = range(COUNT)[done.documents:][:size]
            generator = [np.random.default_rng(i) for i in ids]
            rows = np.array([g.permutation(9)[:3] for g in generator], np.int32)
            scores = np.array([g.random(3) for g in generator], np.float32)
            ranking = Ranking(scores, rows, np.zeros(len(rows), bool))
            sink.add([str(i) for i in ids], ranking, {})
            done = dataclasses.replace(done, documents=done.documents + len(ids))
            if sink.due():
                output.commit(dataclasses.replace(done, written=sink.sync()))
        sink.close()
        output.finish(done)

def child(path, at, size):
    # Dies before the at-th call that changes the disk, or has it written.
    calls = 0
    def dying(function):
        def called(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return called
    for name in ("replace", "unlink", "open"):
        setattr(os, name, dying(getattr(os, name)))
    os.fsync = dying(lambda number: None)  # of which only a dead machine would know
    make(path, size)
    os._exit(0)

folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
whole = folder / f"whole.{kind}"
make(whole)
expected, deaths, at, ended = whole.read_bytes(), 0, 1, False
while not ended:
    path = folder / f"{at}.{kind}"
    for attempt, when in enumerate((at, at // 2 + 1, 10**9)):
        number = os.fork()
        if not number:
            child(path, when, (5, 8, 3)[attempt])
        _, status = os.waitpid(number, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, (at, attempt, status)
        deaths += killed
        # It is there whole, or not there.
        assert not path.exists() or path.read_bytes() == expected, (at, attempt)
        if attempt == 0:
            ended = not killed
    assert path.read_bytes() == expected, at
    left = sorted(p.name for p in folder.glob(f"{path.name}*"))
    assert left == [path.name, f"{path.name}.progress.json"], left
    at += 1
print(deaths)
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_killed_at_every_call_to_the_disk(kind, tmp_path):
    """Two times, with other sizes of batches: nothing lost, nothing twice, never half a file."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path), kind],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 40


COMMAND = """
import os, signal, sys
from xmc_jax import main
from xmc_jax.shipping import outputs

outputs._SECONDS = 0
commit, left = outputs.Output.commit, int(os.environ["COMMITS"])

def counted(self, *arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self, *arguments)

outputs.Output.commit = counted
main.run()
"""


def test_the_command_goes_on_after_a_kill(exported, opened, records, expected, tmp_path):
    source, target = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    arguments = [
        *("--mode=predict", f"--artifact={exported.folder}", "--predict.k=4"),
        *(f"--input={source}", f"--output={target}", "--predict.batch_size=30"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COMMITS": "4"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not target.exists()
    progress = json.loads((tmp_path / "out.jsonl.progress.json").read_text())
    assert progress["documents"] == 60 and not progress["complete"]
    report = run(opened, source, target)
    assert report.before == 60
    assert target.read_bytes() == expected
