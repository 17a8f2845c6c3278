"""Records that are prepared with a remark where something is odd: a test for each case."""

import pathlib

import pytest

from xmc_jax.data import prepare, raw, store
from xmc_jax.data.records import data_report, own_records
from xmc_jax.data.records.own_records import RecordsConfig

CASES = pathlib.Path(__file__).parents[1] / "cases" / "records"


@pytest.mark.parametrize(
    ("case", "options", "remark"),
    [
        (
            "c12_comma",
            {"unknown_labels": "add"},
            "2 of these have ',' in their id, as 'php, mysql': if that is several labels, "
            "--separator=','",
        ),
        ("c14_notext", {}, "the labels have ids alone: their ids are taken for their texts"),
        (
            "c17_duplab",
            {"test_fraction": 0.5},
            "1 label repeats one of the same document: counted once",
        ),
        ("c60_duplab", {}, "24 labels repeat one of the same document: counted once"),
        (
            "c28_testnolabels",
            {},
            "test.csv has no labels: it is not used for evaluation; python -m xmc_jax.main "
            "--mode=predict --artifact=RUN/export --input=test.csv --output=predictions.jsonl "
            "ranks labels for it",
        ),
    ],
)
def test_what_is_odd_is_said(case, options, remark):
    report, _ = own_records.check(RecordsConfig(CASES / case, **options))
    assert f"! {remark}" in data_report.text(report).splitlines()


@pytest.mark.parametrize(
    ("case", "counts", "pairs"),
    [
        ("c28_testnolabels", {"train": 10, "test": 2}, 10),
        ("c48_splitval", {"train": 8, "test": 2, "validation": 2}, 8),
        ("c60_duplab", {"train": 10, "test": 2}, 10),
        ("f01_readme_shop", {"train": 9, "test": 2}, None),
        ("few_labels", {"train": 26, "test": 3}, None),
    ],
)
def test_they_are_prepared(tokenizer_folder, tmp_path, capsys, case, counts, pairs):
    flags = [f"--records={CASES / case}", f"--out={tmp_path}", "--dataset=Case"]
    assert prepare.main([*flags, f"--tokenizer={tokenizer_folder}"]) == 0
    data = store.open(tmp_path / "Case" / "words-32", verify=True)
    found = {split: len(getattr(data, split)) for split in data.splits if split != "label"}
    assert found == counts
    train = data.positives("train")
    assert pairs in (None, len(train.indices)) and train.counts().max() <= data.num_labels
    assert "texts_cut 0" in capsys.readouterr().out


def test_texts_of_labels_without_any_are_their_ids(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "labels.csv").write_text((CASES / "c14_notext" / "labels.csv").read_text())
    (folder / "train.csv").write_text("text,labels\nhow to,php\nwhen to,php\n")
    own_records.convert(RecordsConfig(folder), tmp_path / "raw")
    items = raw.read_items(tmp_path / "raw" / "lbl.json")
    assert (items.uids, items.titles) == (["php"], ["php"])


@pytest.mark.parametrize("case", ["c13_space", "c14_notext"])
def test_one_document_can_be_checked_but_not_split(tmp_path, case):
    report, _ = own_records.check(RecordsConfig(CASES / case))
    message = "expected documents of two groups at least, to train on and to test with, found 1"
    assert message in report["refusal"]
    with pytest.raises(ValueError, match=message):
        own_records.convert(RecordsConfig(CASES / case), tmp_path / "raw")
