"""Opening a dataset folder: what is checked, and what comes back."""

import json

import numpy as np
import pytest

from xmc_jax.data import propensity, store


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
    assert data.label_frequency.dtype == np.int64 and data.vocabulary_size == 19
    expected = propensity.inverse_propensity(frequency, 20, *data.propensity)
    np.testing.assert_array_equal(data.inverse_propensity, expected)
    with pytest.raises(ValueError, match="filter pairs of test, got 'train'"):
        data.filter("train")


@pytest.mark.parametrize(
    "text", ["", "plain", "a\nb", "a\\nb", "\r\n", "tail\\", "\\\\n", "\u2028x\x0b"]
)
def test_texts_survive_escaping(tmp_path, text):
    path = tmp_path / "x.titles.txt"
    path.write_bytes(f"{store.escape('first')}\n{store.escape(text)}\n".encode())
    assert store._read_lines(path) == ["first", text]


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


@pytest.mark.parametrize("name", ["train.tokens.npy", "label.titles.txt", "filter.npy"])
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
        ValueError, match=r"a manifest\.json, found none|format: expected 1, found 0"
    ):
        store.open(prepared)


def test_no_filter_pairs(raw_folder, tokenizer_folder, tmp_path):
    from xmc_jax.data import prepare

    (raw_folder / "filter_labels_test.txt").write_text("")
    folder = prepare.prepare(
        prepare.PrepareConfig("Toy", tmp_path / "d", str(tokenizer_folder), 5, raw_folder)
    )
    assert store.open(folder, verify=True).filter("test").shape == (0, 2)
