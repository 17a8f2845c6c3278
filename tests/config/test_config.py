"""The declaration of a config: what sections refuse, in one line; old files; no JAX."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from xmc_jax import config
from xmc_jax.config import EvalConfig, RunConfig, declare, reference
from xmc_jax.config.run_config import completed

NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": {"batch_size": 0}}, "train.batch_size: expected at least 1, got 0"),
        ({"train": {"epochs": "many"}}, "train.epochs: expected a whole number, got 'many'"),
        ({"train": {"n_chunks": 3}}, "train.batch_size: expected a multiple of n_chunks, 3, got"),
        ({"train": {"keep": 1}}, "train.keep: expected at least 2, got 1"),
        ({"train": {"seed": 2**32}}, "train.seed: expected less than 4294967296, got 4294967296"),
        ({"train": {"batchsize": 1}}, "no such field; did you mean train.batch_size?"),
        ({"a\nb": {}}, "'a\\nb': no such field; did you mean"),
        ({"optimizer": {"lr": (("(" * 2000, 1),)}}, "optimizer.lr[0][0]: expected a regular"),
        ({"trian": {}}, "trian: no such field; did you mean train?"),
        ({"train": None}, "train: expected a section, got None"),
        ({"encoder": {"pooling": "sum"}}, "encoder.pooling: expected 'mean', 'cls', 'last' or"),
        ({"encoder": {"dropout": 1.0}}, "encoder.dropout: expected less than 1, got 1.0"),
        ({"encoder": {"lora": {"rank": 4, "targets": ()}}}, "encoder.lora.targets: expected at"),
        ({"encoder": {"lora": {"alpha": 0}}}, "encoder.lora.alpha: expected more than 0, got 0"),
        ({"fusion": {"order": "both"}}, "fusion.order: expected 'text_image' or 'image_text'"),
        ({"prime": {"heads": 0}}, "prime.heads: expected at least 1, got 0"),
        ({"loss": {"margin_min": 0.4}}, "loss.margin_max: expected at least margin_min, 0.4"),
        ({"loss": {"softmax_temperature": NAN}}, "loss.softmax_temperature: expected a finite"),
        ({"optimizer": {"lr": (("(", 1),)}}, "optimizer.lr[0][0]: expected a regular expression"),
        ({"optimizer": {"lr": ((".*", -1),)}}, "optimizer.lr[0][1]: expected at least 0, got -1"),
        ({"optimizer": {"lr": 5}}, "optimizer.lr: expected a sequence, got 5"),
        ({"curriculum": {"double_at": (3, 2)}}, "curriculum.double_at: expected increasing epochs"),
        (
            {"tables": {"centroids": "fresh"}},
            "tables.centroids: expected 'stale', 'exact' or",
        ),
        ({"mesh": {"replicate": ("layers",)}}, "mesh.replicate[0]: expected 'embed', 'heads'"),
        ({"eval": {"ks": (0, 5)}}, "eval.ks[0]: expected at least 1, got 0"),
        ({"eval": {"scann": {"recall_target": 0}}}, "eval.scann.recall_target: expected more"),
        ({"eval": {"augmented": {"prior_weight": NAN}}}, "eval.augmented.prior_weight: expected a"),
        (
            {"tune": {"metric": "P1"}},
            "tune.metric: expected metrics joined by +, each a name and a cut-off",
        ),
        ({"tune": {"temperature": (0.1, 0)}}, "tune.temperature[1]: expected more than 0, got 0"),
        ({"data": {"text": "content"}}, "data.text: expected 'title' or 'title_content'"),
        ({"data": {"images": {"per_item": 0}}}, "data.images.per_item: expected at least 1"),
    ],
)
def test_a_mistaken_field_is_named_in_one_line(fields, said):
    with pytest.raises(ValueError) as error:
        RunConfig.from_dict(fields)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("ServeConfig", {"port": -1}, "serve.port: expected at least 0, got -1"),
        ("ServeConfig", {"queue": 5}, "serve.queue: expected at least max_queries, 32, got 5"),
        ("ServeConfig", {"index": "best"}, "serve.index: expected 'auto', 'exact' or 'scann'"),
        ("PredictConfig", {"k": 0}, "predict.k: expected at least 1, got 0"),
        ("LabelsConfig", {"hwo": 0}, "labels.hwo: no such field; did you mean labels.how?"),
        ("NewLabelsConfig", {"threshold": 2}, "new_labels.threshold: expected at most 1, got 2"),
        ("AugmentedConfig", {"labels": 0}, "eval.augmented.labels: expected at least 1, got 0"),
    ],
)
def test_a_section_by_itself_names_its_field(kind, fields, said):
    with pytest.raises(ValueError) as error:
        getattr(config, kind)(**fields)
    assert str(error.value).startswith(said)


def test_a_config_survives_the_way_through_a_file():
    fields = dataclasses.asdict(RunConfig())
    assert RunConfig.from_dict(fields) == RunConfig()
    lists = fields | {"optimizer": {"lr": [[".*", 1]]}}
    assert RunConfig.from_dict(lists).optimizer.lr == ((".*", 1.0),)


def test_files_of_earlier_versions_are_read():
    fields = {"provenance": {}, "eval": {"augmented": {"filter_first": True, "labels": 7}}}
    assert RunConfig.from_dict(fields).eval.augmented.labels == 7


def test_cut_offs_hold_1_and_none_above_k():
    assert EvalConfig(ks=(3, 100, 5), k=5).cut_offs == (1, 3, 5)


def test_a_config_is_read_without_jax():
    code = (
        "import sys; from configs import vixml; vixml.get_config(); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_of_all_fields_is_up_to_date():
    written = pathlib.Path("docs/config.md").read_text("utf-8")
    assert written == reference.page(), "python -m xmc_jax.config > docs/config.md"
    assert max(map(len, written.splitlines())) <= 100


def test_every_field_says_what_it_means():
    def undescribed(kind):
        for option in declare.options(kind):
            yield from undescribed(option.section) if option.section else ()
            if not option.text.endswith((".", "[V]", "[script]", "[ours]")):
                yield option.name

    kinds = (RunConfig, config.PredictConfig, config.LabelsConfig, config.ServeConfig)
    assert [name for kind in kinds for name in undescribed(kind)] == []


def test_a_field_that_an_earlier_version_lacks_has_its_default():
    written = {"train": {"epochs": 3}, "provenance": {"data": "1"}}
    fields = completed(written)
    assert fields.pop("provenance") == {"data": "1"}
    assert fields == dataclasses.asdict(RunConfig().replace(train={"epochs": 3}))
