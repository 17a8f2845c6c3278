"""--mode=tune, whole: a run on held-out documents, a choice, its use; no test file is there."""

import copy
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from etils import epath

from xmc_jax import modes
from xmc_jax.config import EvalConfig, RunConfig, TuneConfig
from xmc_jax.config.run_config import override
from xmc_jax.data import raw_folder
from xmc_jax.retrieval import tuned as tuned_file
from xmc_jax.retrieval import tuning
from xmc_jax.training import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        run, alone = build.run, jax.devices()[:1]
        patch.setattr(build, "run", lambda fields, workdir: run(fields, alone, workdir))
        yield


@pytest.fixture(scope="module")
def without_test(topics, tmp_path_factory) -> pathlib.Path:
    """The raw files of training alone."""
    folder = tmp_path_factory.mktemp("without test") / "Topics-40"
    shutil.copytree(topics, folder)
    for name in ("tst.json.gz", "filter_labels_test.txt"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def own_fields(fields, without_test, tmp_path_factory) -> dict:
    own = copy.deepcopy(fields) | {"name": "topics"}
    # Folders of data are made here, so that none with test documents is found.
    data_dir = str(tmp_path_factory.mktemp("data of train"))
    own["data"] |= {"raw_dir": str(without_test), "data_dir": data_dir}
    own["train"] |= {"epochs": 1, "eval_every": 0, "zero_shot": False, "checkpoint_every": 100}
    # What compiles soonest: documents against all labels, prototypes as sums.
    own["train"] |= {"labels": "all", "packed": False}
    own["encoder"] |= {"layers": 1, "dropout": 0.0}
    own["prime"] |= {"combiner": "sum", "free_vector_init": "zero"}
    own["loss"] |= {"kind": "decoupled_softmax", "label_to_document": 0.0}
    own["curriculum"] |= {"start": None}
    # Neighbours have all the weight at first, and a prior that makes it worse.
    own["eval"]["augmented"] |= {"label_weight": 0.0, "temperature": 5.0, "prior": "frequency"}
    own["tune"] |= {"validation_fraction": 0.3, "labels": (20,), "documents": (10, 20)}
    own["tune"] |= {"temperature": (0.05, 0.2), "label_weight": (0.4, 0.8)}
    return own


def run(mode: str, fields: dict, workdir: pathlib.Path) -> int:
    return modes.run(mode, modes.Invocation(RunConfig.from_dict(fields), epath.Path(workdir)))


def with_weights(fields: dict, **values) -> dict:
    return override(fields, {"eval": {"augmented": values}})


@pytest.fixture(scope="module")
def tuned(own_fields, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    assert run("tune", own_fields, workdir) == 0
    return workdir


def test_it_needs_no_test_file_and_trains_once(tuned, own_fields, capsys):
    content = json.loads((tuned / "tuned.json").read_text())
    assert content["validation"]["fraction"] == 0.3 and content["validation"]["documents"] == 60
    assert content["accepted"] and content["augmented"]["label_weight"] > 0
    assert sorted(path.name for path in tuned.iterdir()) == ["tune", "tuned.json"]
    steps = {path.name: path.stat().st_mtime_ns for path in (tuned / "tune/checkpoints").iterdir()}
    assert run("tune", own_fields, tuned) == 0
    again = {path.name: path.stat().st_mtime_ns for path in (tuned / "tune/checkpoints").iterdir()}
    assert again == steps and json.loads((tuned / "tuned.json").read_text()) == content
    printed = capsys.readouterr().out
    for name, value in content["augmented"].items():
        asked = own_fields["eval"]["augmented"][name]
        assert (f"--config.eval.augmented.{name}={value}" in printed) == (value != asked)
    for name in ("P@1", "P@5", "nDCG@5"):
        best = content["rows"]["best"]["metrics"][name]
        assert f"{100 * best:.2f}" in printed


def test_its_figures_are_what_evaluation_says(tuned, own_fields):
    """Evaluating the validation run with the chosen weights gives the validation metrics."""
    content = json.loads((tuned / "tuned.json").read_text())
    held_out = override(own_fields, {"data": {"validation_fraction": 0.3}})
    for row in ("defaults", "best"):
        asked = with_weights(held_out, **content["rows"][row]["augmented"])
        assert run("evaluate", asked, tuned / "tune") == 0
        found = json.loads((tuned / "tune" / "evaluate" / "metrics.json").read_text())["augmented"]
        for name, value in found.items():
            assert content["rows"][row]["metrics"][name] == pytest.approx(value, abs=1e-12)


def test_all_training_documents_take_what_some_chose(tuned, own_fields, topics, fields):
    """The weights belong to the recipe and the raw files, not to the held-out split."""
    content = json.loads((tuned / "tuned.json").read_text())
    whole = {"data": {"raw_dir": str(topics), "data_dir": fields["data"]["data_dir"]}}
    final = RunConfig.from_dict(override(own_fields, whole))
    final = build.filled(final, build.modules(final))
    data, config = build.data(final), final.eval.augmented
    assert data.manifest["validation"] is None and data.num_documents == 200
    read = tuned_file.read(tuned, final, data)
    assert read == dataclasses.replace(config, **content["augmented"]) != config
    # Were the test split ever handed over, it would be refused.
    eight = np.ones((data.num_labels, 8), np.float32)
    with pytest.raises(ValueError, match=r"expected held-out training documents .* test split"):
        tuning.tune(eight, eight, eight, data, EvalConfig(), TuneConfig())


def test_a_run_with_a_validation_split_is_used_itself(tuned, own_fields, tmp_path, capsys):
    held_out = override(own_fields, {"data": {"validation_fraction": 0.3}})
    shutil.copytree(tuned / "tune", tmp_path, dirs_exist_ok=True)
    by_name = with_weights(held_out, weights="tuned")
    with pytest.raises(ValueError, match=r"expected tuned.json in .*found none; .*--mode=tune"):
        run("evaluate", by_name, tmp_path)
    for _ in range(2):  # tuned weights that are there already have no say
        assert run("tune", by_name, tmp_path) == 0
    assert not (tmp_path / "tune").exists()
    step = next((tmp_path / "checkpoints").glob("[0-9]*")).name
    assert f"step {step} of {tmp_path}; in {tmp_path}/tuned.json" in capsys.readouterr().out
    chosen = json.loads((tmp_path / "tuned.json").read_text())["augmented"]
    assert chosen == json.loads((tuned / "tuned.json").read_text())["augmented"]

    def evaluated(asked: dict) -> dict:
        assert run("evaluate", asked, tmp_path) == 0
        return json.loads((tmp_path / "evaluate" / "metrics.json").read_text())

    assert evaluated(by_name) == evaluated(with_weights(held_out, **chosen))
    assert evaluated(by_name)["augmented"]["P@1"] > evaluated(held_out)["augmented"]["P@1"]
    # A longer run is the same recipe's to resume, but not what was tuned for.
    longer = override(by_name, {"train": {"epochs": 2}})
    with pytest.raises(ValueError, match=r"train.epochs: 1 there, 2 here\); tune again"):
        run("evaluate", longer, tmp_path)
    with pytest.raises(ValueError, match=r"prior as it was tuned with, 'frequency', got None"):
        run("evaluate", with_weights(held_out, weights="tuned", prior=None), tmp_path)


def test_named_validation_documents_are_tuned_on_by_the_run_itself(
    own_fields, topics, tmp_path, capsys
):
    """The run has not seen them, and so no other one is trained; the choice is that of its data."""
    named = shutil.copytree(topics, tmp_path / "Topics-40")
    uids = raw_folder.read(raw_folder.find(named), "Topics-40", "utf-8").splits["train"].uids[::4]
    (named / "validation.txt").write_text("".join(f"{uid}\n" for uid in uids))
    data = {"raw_dir": str(named), "data_dir": str(tmp_path / "data")}
    fields, workdir = override(own_fields, {"data": data}), tmp_path / "run"
    assert run("tune", fields, workdir) == 0
    assert f"{len(uids)} validation documents" in capsys.readouterr().out
    assert (workdir / "checkpoints").is_dir() and not (workdir / "tune").exists()
    content = json.loads((workdir / "tuned.json").read_text())
    assert content["validation"]["documents"] == len(uids) and content["accepted"]
    opened = build.data(RunConfig.from_dict(fields))
    assert (opened.num_documents, len(opened.validation)) == (200 - len(uids), len(uids))
    by_name = with_weights(fields, weights="tuned")
    assert run("evaluate", by_name, workdir) == 0  # on the test split
    (named / "validation.txt").write_text(f"{uids[0]}\n")
    other = override(by_name, {"data": {"data_dir": str(tmp_path / "other")}})
    with pytest.raises(ValueError, match=r"data: validation file: .* there, .* here"):
        run("evaluate", other, workdir)
