"""Opening a dataset folder: what is checked, and what comes back."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from xmc_jax.data import prepare, propensity, store


def test_splits_and_inputs(prepared):
    data = store.open(prepared, verify=True)
    sizes = (data.num_documents, data.num_test, data.num_labels, data.max_length)
    assert sizes == (20, 6, 9, 5) and data.name == "ToyTitles"
    inputs = data.train.inputs(np.array([4, 4, 0]))
    np.testing.assert_array_equal(inputs.tokens, data.train.tokens[[4, 4, 0]])
    assert inputs.tokens.dtype == inputs.lengths.dtype == np.int32 and inputs.images is None
    assert type(inputs.tokens) is np.ndarray
    frequency = np.bincount(data.positives("train").indices, minlength=9)
    np.testing.assert_array_equal(data.label_frequency, frequency)
    assert data.label_frequency.dtype == np.int64
    expected = propensity.inverse_propensity(frequency, 20, *data.propensity)
    np.testing.assert_array_equal(data.inverse_propensity, expected)
    with pytest.raises(ValueError, match="filter pairs of test, got 'train'"):
        data.filter("train")


@pytest.mark.parametrize("per_item", [1, 2, 5])
def test_images_of_items_in_any_order(prepared, with_random_images, tmp_path, per_item):
    texts = store.open(prepared)
    data = with_random_images(texts, tmp_path / "images-x", per_item)
    assert texts.images is None and texts.shape.image_width == 0
    assert data.shape.image_width == 8 and data.images.folder == tmp_path / "images-x"
    assert (data.digest, data.num_documents) == (texts.digest, 20)
    for name in store.SPLITS:
        split, rows = getattr(data, name), getattr(data.images, name)
        ids = np.array([4, 4, 0, len(split) - 1])
        inputs = split.inputs(ids)
        np.testing.assert_array_equal(inputs.tokens, getattr(texts, name).inputs(ids).tokens)
        assert inputs.images.shape == (4, per_item, 8) and inputs.images.dtype == np.float16
        assert inputs.image_count.dtype == np.int32
        for row, item in enumerate(ids):
            own = rows.rows[rows.indptr[item] : rows.indptr[item + 1]][:per_item]
            assert inputs.image_count[row] == len(own)
            np.testing.assert_array_equal(inputs.images[row, : len(own)], own)
            assert not inputs.images[row, len(own) :].any()


def test_images_of_held_out_documents_are_those_of_the_training_file(
    prepared, raw_folder, tokenizer_folder, with_random_images, tmp_path
):
    whole = with_random_images(store.open(prepared), tmp_path / "images-x")
    config = prepare.PrepareConfig(
        *("ToyTitles", tmp_path / "data", str(tokenizer_folder), 5, raw_folder),
        validation_fraction=0.25,
    )
    data = store.open(prepare.prepare(config)).with_images(whole.images, 2)
    assert (len(data.train), len(data.test), len(data.label)) == (14, 6, 9)
    for name in store.SPLITS:
        uids = data.uids(name)
        source = "label" if name == "label" else "train"
        rows = [whole.uids(source).index(uid) for uid in uids]
        ours = getattr(data, name).inputs(np.arange(len(uids))[::-1])
        expected = getattr(whole, source).inputs(np.array(rows)[::-1])
        for field in ("tokens", "images", "image_count"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(expected, field))
    path = data.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["test.raw_rows.npy"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"expected test\.raw_rows\.npy, .*--overwrite"):
        store.open(data.folder).with_images(whole.images, 2)


def test_images_of_other_items_are_refused(
    prepared, raw_folder, tokenizer_folder, with_random_images, tmp_path
):
    data = with_random_images(store.open(prepared), tmp_path / "images-x")
    with pytest.raises(ValueError, match=r"images\.per_item: expected at least 1, got 0"):
        data.with_images(data.images, 0)
    for name, change in (("lbl", "lbl3"), ("tst", "tst5")):
        with gzip.open(raw_folder / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            items = file.read()
        with gzip.open(raw_folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.write(items.replace(f'"{change}"', '"other"'))
        (raw_folder / "groups.tsv.gz").unlink(missing_ok=True)
        folder = prepare.prepare(
            prepare.PrepareConfig("Toy", tmp_path / name, str(tokenizer_folder), 5, raw_folder)
        )
        split = {"lbl": "label", "tst": "test"}[name]
        found = data.images.manifest["source"]["uids"][split]
        message = (
            rf"images-x/manifest\.json: source\.uids\.{split}: expected \w{{64}}, found {found}"
        )
        with pytest.raises(ValueError, match=message) as refused:
            store.open(folder).with_images(data.images, 2)
        assert "\n" not in str(refused.value)
        with gzip.open(raw_folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.write(items)


@pytest.mark.parametrize(
    "text", ["", "plain", "a\nb", "a\\nb", "\r\n", "tail\\", "\\\\n", "\u2028x\x0b"]
)
def test_texts_survive_escaping(tmp_path, text):
    path = tmp_path / "x.titles.txt"
    path.write_bytes(f"{store.escape('first')}\n{store.escape(text)}\n".encode())
    assert store._read_lines(path, 2) == ["first", text]


@pytest.mark.parametrize("recorded", [None, True, False])
def test_special_tokens_are_there_unless_the_manifest_says_otherwise(prepared, recorded):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    assert "special_tokens" not in manifest
    if recorded is not None:
        path.write_text(json.dumps(manifest | {"special_tokens": recorded}))
    assert store.open(prepared).special_tokens is (recorded is not False)


def test_expectations(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    digest = manifest["tokenizer"]["digest"]
    store.open(prepared, expect={"tokenizer.digest": digest, "max_length": 5})
    with pytest.raises(
        ValueError, match=r"max_length: expected 32, found 5; .*data_dir.*--overwrite"
    ):
        store.open(prepared, expect={"max_length": 32})
    with pytest.raises(ValueError, match=rf"tokenizer\.digest: expected abc, found {digest}"):
        store.open(prepared, expect={"tokenizer.digest": "abc"})
    with pytest.raises(ValueError, match=r"no\.such: expected 1, found None"):
        store.open(prepared, expect={"no.such": 1})


def test_sizes_shapes_and_types_are_checked(prepared):
    path = prepared / "label.lengths.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=rf"lengths\.npy: bytes: expected {len(good)}, found \d+"):
        store.open(prepared)
    np.save(path, np.zeros(9, np.int16))
    with pytest.raises(ValueError, match=r"lengths\.npy: dtype: expected uint16, found int16"):
        store.open(prepared)
    np.save(path, np.zeros((3, 3), np.uint16))
    with pytest.raises(ValueError, match=r"lengths\.npy: shape: expected \[9\], found \[3, 3\]"):
        store.open(prepared)
    path.write_bytes(b"x" * len(good))
    with pytest.raises(ValueError, match=r"lengths\.npy: expected a NumPy array file"):
        store.open(prepared)
    path.unlink()
    with pytest.raises(ValueError, match=r"lengths\.npy: bytes: expected \d+, found 0"):
        store.open(prepared)


@pytest.mark.parametrize("name", ["train.tokens.npy", "label.titles.txt", "test.uids.txt"])
def test_damaged_bytes_are_found_on_request(prepared, name):
    content = bytearray((prepared / name).read_bytes())
    content[-1] ^= 1
    (prepared / name).write_bytes(content)
    store.open(prepared)
    with pytest.raises(ValueError, match=rf"{name}: sha256: expected \w{{64}}, found \w{{64}}"):
        store.open(prepared, verify=True)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": {}, "format": 0}'])
def test_manifest_refusals(prepared, content):
    path = prepared / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=r"a manifest\.json, found none|format: expected 1, found (0|None)"
    ):
        store.open(prepared)


def test_no_filter_pairs(raw_folder, tokenizer_folder, tmp_path):
    (raw_folder / "filter_labels_test.txt").write_text("")
    folder = prepare.prepare(
        prepare.PrepareConfig("Toy", tmp_path / "d", str(tokenizer_folder), 5, raw_folder)
    )
    assert store.open(folder, verify=True).filter("test").shape == (0, 2)


@pytest.mark.parametrize("scanned", [1, 7, 1 << 20])
def test_titles_of_a_few_items(prepared, tmp_path, monkeypatch, scanned):
    texts = ["a", "two\nlines", "a \\n that is none", "", "é€😀", "last"]
    (tmp_path / "test.titles.txt").write_bytes(store.lines(texts))
    monkeypatch.setattr(store, "_SCANNED", scanned)
    data = dataclasses.replace(store.open(prepared), folder=tmp_path)
    for ids in ([5, 0, 0, 3, 1], [2, 4], []):
        assert data.texts("test", np.array(ids, int)) == [texts[i] for i in ids]
    assert data.texts("test") == texts
