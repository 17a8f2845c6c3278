"""The command: every mode on a small dataset, in processes of their own; mistakes in one line."""

import copy
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import processes
import pytest
from etils import epath

from tests.padded_rows import rows_of
from xmc_jax import modes
from xmc_jax.data import store
from xmc_jax.files import workdirs
from xmc_jax.models import hf, hf_weights
from xmc_jax.runtime import metrics_log

ROOT = pathlib.Path(__file__).parents[1]


def command(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "xmc_jax.main", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"XLA_FLAGS": processes.xla_flags()},  # one device compiles fastest
    )


def data_of(run: pathlib.Path) -> store.Store:
    config = json.loads((run / "config.json").read_text())
    return store.open(next(pathlib.Path(config["data"]["data_dir"], "Topics-40").iterdir()))


@pytest.fixture(scope="module")
def trained(fields, tmp_path_factory):
    """The folder of a config file and a workdir in which it was trained, and the process."""
    folder = tmp_path_factory.mktemp("main")
    fields = copy.deepcopy(fields)
    fields["name"] = "topics"
    fields["prime"] |= {"free_vectors": 40}
    fields["train"] |= {"epochs": 12, "eval_every": 0, "checkpoint_every": 100}
    fields["optimizer"] |= {"warmup_steps": 5}
    (folder / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    done = command(f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.mark.slow
def test_train_learns_and_leaves_everything(trained):
    folder, done = trained
    printed = done.stdout
    run = folder / "run"
    found = json.loads((run / "metrics.json").read_text())
    assert set(found) >= {"zero-shot", "plain", "augmented"}
    # A random label is right in 5 % of the first places: two labels of forty on average.
    assert found["plain"]["P@1"] > 0.5
    assert found["plain"]["P@1"] > found["zero-shot"]["P@1"] + 0.2
    for row in ("zero-shot", "trained", "trained + augmented"):
        assert any(line.startswith(row) for line in printed.splitlines())
    assert f"{100 * found['plain']['P@1']:.2f}" in printed
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < losses[0] and records[-2]["eval/P@1"] == found["plain"]["P@1"]
    shares = {name: x for name, x in records[-1].items() if name.startswith("time/share/")}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[f"time/share/{phase}"] > 0 for phase in metrics_log.PHASES)
    assert "min: " in done.stderr.splitlines()[-1] and "data_wait" in done.stderr
    # No terminal: a line for each record instead of a bar.
    assert "\r" not in done.stderr and "] step 60 of 60: loss 0." in done.stderr
    assert done.stderr.count(" of 60: loss ") == len(losses)
    assert any(run.glob("tensorboard/events*"))
    predictions = np.load(run / "predictions" / "60.npz", allow_pickle=False)
    assert predictions["plain_ids"].shape == (60, 100)
    before = np.load(run / "predictions" / "0.npz", allow_pickle=False)["plain_ids"]
    truth = data_of(run).positives("test")
    hits = [
        row[0] in truth.indices[a:b] for row, a, b in zip(before, truth.indptr, truth.indptr[1:])
    ]
    assert np.mean(hits) == pytest.approx(found["zero-shot"]["P@1"])
    assert json.loads((run / "config.json").read_text())["name"] == "topics"


@pytest.mark.slow
def test_the_report_is_written_again_byte_for_byte(trained):
    folder, _ = trained
    run = folder / "run"
    written = (run / "report.html").read_bytes()
    found = json.loads((run / "metrics.json").read_text())
    for row in ("zero-shot", "plain", "augmented"):
        assert f"{100 * found[row]['P@1']:.2f}".encode() in written
    (run / "report.html").unlink()
    done = command("--mode=report", f"--config={folder / 'config.py'}", f"--workdir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "report.html" in done.stdout and (run / "report.html").read_bytes() == written


@pytest.mark.slow
def test_evaluate_with_an_index_gives_what_training_ended_with(trained):
    folder, _ = trained
    found = json.loads((folder / "run" / "metrics.json").read_text())
    done = command(
        *("--mode=evaluate", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"),
        "--config.eval.index=scann",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((folder / "run" / "evaluate" / "metrics.json").read_text())
    assert again["plain"]["P@1"] == pytest.approx(found["plain"]["P@1"], abs=1e-9)
    assert again["index"]["labels"]["recall"] == 1.0
    assert "ScaNN over labels: recall 1.0000" in done.stdout


@pytest.mark.slow
def test_index_is_saved_and_found_again(trained):
    folder, _ = trained
    done = command(
        *("--mode=index", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"),
        "--config.eval.scann.brute_force_below=1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "index" / "60" / "index.json").exists()
    assert done.stderr == ""  # ScaNN logs what it does, from C++
    recall = float(done.stdout.split("recall ")[1].split()[0])
    assert 0.5 < recall <= 1.0


@pytest.mark.slow
def test_predict_exports_first_and_ranks_as_training_ended(trained, topics, tmp_path):
    folder, _ = trained
    with gzip.open(topics / "tst.json.gz", "rt", encoding="utf-8") as file:
        tests = [json.loads(line) for line in file]
    for line in (topics / "filter_labels_test.txt").read_text().splitlines():
        document, label = map(int, line.split())
        tests[document].setdefault("exclude", []).append(f"topic{label}")
    lines = "".join(json.dumps(document) + "\n" for document in tests)
    (tmp_path / "new.jsonl").write_text(lines)
    done = command(
        *("--mode=predict", f"--workdir={folder / 'run'}"),  # the run's own config
        *(f"--input={tmp_path / 'new.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"),
        "--predict.k=3",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "export: no exported model yet; exporting step 60" in done.stderr and not done.stdout
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"{tmp_path}/out.jsonl: 60 documents; ") and "documents/s" in said
    predictions = np.load(folder / "run" / "predictions" / "60.npz", allow_pickle=False)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["id"] for one in found] == [document["uid"] for document in tests]
    ids = np.array([[int(x["id"].removeprefix("topic")) for x in one["labels"]] for one in found])
    assert (ids == predictions["augmented_ids"][:, :3]).mean() > 0.98
    scores = np.array([[x["score"] for x in one["labels"]] for one in found])
    np.testing.assert_allclose(scores, predictions["augmented_scores"][:, :3], atol=1e-5)


@pytest.mark.slow
def test_embeddings_are_those_of_the_export(trained):
    """The exported encoder, loaded as any pretrained one, embeds as the trained run does."""
    folder, _ = trained
    config = workdirs.read_run_config(folder / "run")
    assert modes.run("embed", modes.Invocation(config, epath.Path(folder / "run"))) == 0
    embedded = np.load(folder / "run" / "embeddings" / "60" / "test.npy", allow_pickle=False)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    from xmc_jax.models.dual import DualEncoder

    for path in (folder / "run" / "export").rglob("*"):  # no path of this machine
        assert path.is_dir() or b"pytest-of-" not in path.read_bytes(), path
    source = hf.resolve(str(folder / "run" / "export"))
    bert = hf.load_config(source)
    params = {"backbone": hf_weights.load_params(source, bert)}
    data = data_of(folder / "run")
    inputs = data.test.inputs(np.arange(len(data.test)))
    out = DualEncoder(bert).apply(
        {"params": params}, rows_of(inputs.tokens, inputs.lengths), method="encode"
    )
    np.testing.assert_allclose(out.unit, embedded, atol=1e-5)


@pytest.mark.slow
def test_an_export_of_another_step_is_said(trained, tmp_path, caplog):
    folder = shutil.copytree(trained[0], tmp_path / "trained")
    manifest = folder / "run" / "export" / "artifact.json"
    manifest.write_text(manifest.read_text().replace('"step": 60', '"step": 20'))
    modes._opened(modes.Invocation(config=None, workdir=epath.Path(folder / "run")))
    assert "exported at step 20, and the checkpoint asked for (latest) is of step 60" in caplog.text


MISTAKES = [
    ((), "--config: expected a config file", 2),
    (("--mode=report",), "config.json: expected the config of a run, found no such file", 1),
    (("--mode=report", "--config.eval.k=3"), "--config.eval.k: expected --config=FILE", 2),
    (("--config=configs/vixml.py:tyni",), "did you mean 'tiny'", 2),
    (("--config=configs/vixml.py:minilm_l3/debian_3",), "did you mean 'debian_3k'", 2),
    (
        ("--config=configs/vixml.py", "--config.train.batchsize=3"),
        "--config.train.batchsize: no such field; did you mean --config.train.batch_size?",
        2,
    ),
    (
        ("--config=configs/vixml.py", "--config.train.epochs=many"),
        "error: --config.train.epochs: expected a whole number, such as 1000, got many",
        2,
    ),
    (
        ("--config=configs",),
        "--config=configs: expected a config file, such as configs/vixml.py of a checkout",
        2,
    ),
    (("--config=configs/vixml.py", "--workdir="), "--workdir: expected a folder, got none", 1),
    (("--config=configs/vixml.py", "--mode=fly"), "fly", 2),
    (("--config=configs/absent.py",), "absent.py", 2),
    (
        ("--mode=predict", "--input=a", "--output=b"),
        "config.json: expected the config of a run, found no such file",
        1,
    ),
    (("--mode=predict", "--artifact=a", "--output=b"), "--input: expected a file", 2),
    (("--config=configs/vixml.py", "--profile=5:4"), "--profile: expected START:STOP", 2),
    (("--config=configs/vixml.py", "--profile=1:2", "--mode=plan"), "got --mode=plan", 2),
    (("--mode=predict", "--artifact=a", "--predict.k=1e9"), "--predict.k: expected a whole", 2),
    (("--mode=predict", "--artifact=a", "--overwrite=ja"), "expected true or false, got ja", 2),
    (("--mode=predict", "--artifact=a", "--predict.kk=2"), "Did you mean: predict.k", 2),
    (
        ("--mode=predict", "--artifact=a", "--input=a", "--output=b", "--predict.k=0"),
        "predict.k: expected at least 1, got 0",
        2,
    ),
    (
        ("--mode=predict", "--artifact=a", "--input=a", "--output=b"),
        "a: expected artifact.json of an exported model, found none",
        1,
    ),
    (("--config=configs/vixml.py", "positional"), "positional", 2),
    (("--config=configs/vixml.py:bert/debian_3k,compare",), "a dataset with images, one of", 2),
    (("--config=configs/vixml.py", "--mode=evaluate"), "config.json: expected the config", 1),
    (
        ("--config=configs/vixml.py", "--config.train.batch_size=0"),
        "train.batch_size: expected at least 1, got 0",
        1,
    ),
    (
        ("--config=configs/vixml.py:minilm_l6/amazontitles_131k",),
        "data/raw/LF-AmazonTitles-131K",
        1,
    ),
]
# Runs the command with each list of arguments in a process forked from one that has imported it.
FORKED = """
import gc, json, os, pathlib, sys
from xmc_jax import main, modes
from xmc_jax.runtime import compilation, distributed
folder = pathlib.Path(sys.argv[1])
gc.freeze()
for number, arguments in enumerate(json.loads(sys.argv[2])):
    if not (child := os.fork()):
        for stream in (1, 2):
            flags = os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(folder / f"{number}.{stream}", flags, 0o600), stream)
        sys.argv[1:] = [f"--workdir={folder / 'run'}", *arguments]
        try:
            main.run()
        except SystemExit as end:  # without tearing down what was imported, which takes a second
            sys.stderr.flush()
            os._exit(end.code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / f"{number}.code").write_text(str(code))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> pathlib.Path:
    """A folder with standard error (N.2) and exit code (N.code) of each of MISTAKES."""
    folder = tmp_path_factory.mktemp("mistakes")
    lists = [[x.replace("configs/", f"{ROOT}/configs/") for x in one] for one, _, _ in MISTAKES]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, str(folder), json.dumps(lists)],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(MISTAKES)), ids=[" ".join(arguments)[-40:] for arguments, _, _ in MISTAKES]
)
def test_mistakes_are_answered_in_one_line(answers, number):
    _, said, code = MISTAKES[number]
    answer = (answers / f"{number}.2").read_text()
    assert int((answers / f"{number}.code").read_text()) == code, answer
    assert said in answer and len(answer.strip().splitlines()) == 1, answer
