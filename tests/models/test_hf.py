"""Hugging Face folders: round trips, shards, and what every broken one says."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from xmc_jax import packaged
from xmc_jax.models import bert, dual, hf

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))


def load(folder, layers=None):
    source = hf.resolve(str(folder))
    config = hf.load_config(source, layers)
    return config, hf.load_params(source, config)


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(folder, change):
    """Rewrites the weights of a folder after `change(tensors)`."""
    tensors = dict(safetensors.numpy.load_file(folder / hf.WEIGHTS))
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.WEIGHTS)


def edit_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("family", bert.FAMILIES)
def test_import_then_export_gives_identical_tensors(family, tmp_path):
    config, params = load(GOLDEN / family)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("[PAD]")
    hf.export(
        tmp_path / "out",
        jax.tree.map(jax.numpy.asarray, params),
        config,
        tokenizer_folder=tmp_path,
        pooling="cls",
        max_length=16,
    )
    before = safetensors.numpy.load_file(GOLDEN / family / hf.WEIGHTS)
    after = safetensors.numpy.load_file(tmp_path / "out" / hf.WEIGHTS)
    assert set(before) - set(after) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(after) <= set(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)
    again, reloaded = load(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]"
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_cls_token"] and not pooling["pooling_mode_mean_tokens"]


def test_import_has_the_tree_of_init():
    config, params = load(GOLDEN / "distilbert")
    model = dual.DualEncoder(config)
    expected = jax.eval_shape(lambda: dual.init_params(model, 0))["backbone"]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), params)
    assert shapes == jax.tree.map(
        lambda x: (x.value.shape, x.value.dtype.name),
        expected,
        is_leaf=lambda x: hasattr(x, "value"),
    )


def test_shards_and_prefix_give_what_one_file_gives(folder):
    _, expected = load(folder)
    tensors = safetensors.numpy.load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        safetensors.numpy.save_file(
            {f"bert.{name}": tensors[name] for name in part}, folder / shard
        )
        weight_map |= {f"bert.{name}": shard for name in part}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    _, sharded = load(folder)
    jax.tree.map(np.testing.assert_array_equal, sharded, expected)

    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected the shards \['b.safetensors'\]") as error:
        load(folder)
    one_line(error)


def test_bfloat16_weights_are_read(folder):
    bfloat16 = jax.numpy.bfloat16
    _, expected = load(folder)
    edit(folder, lambda t: t.update({k: v.astype(bfloat16) for k, v in t.items()}))
    _, params = load(folder)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(bfloat16).astype(np.float32)),
        params,
        expected,
    )


def test_truncation(folder):
    _, all_layers = load(folder)
    config, first = load(folder, layers=1)
    assert config.layers == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b[:1]), first["layers"], all_layers["layers"]
    )
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"encoder.layers: expected 1 to 2.*got {layers}"):
            load(folder, layers)


def test_all_that_does_not_fit_is_said_at_once(folder):
    def change(tensors):
        del tensors["embeddings.LayerNorm.bias"]
        del tensors["encoder.layer.1.output.dense.weight"]
        tensors["encoder.layer.0.adapter.weight"] = np.zeros((2, 2), np.float32)
        tensors["embeddings.word_embeddings.weight"] = np.zeros((59, 16), np.float32)

    edit(folder, change)
    with pytest.raises(ValueError, match="weights do not fit") as error:
        load(folder)
    message = one_line(error)
    for part in (
        "Missing: ['embeddings.LayerNorm.bias', 'encoder.layer.1.output.dense.weight']",
        "Not known: ['encoder.layer.0.adapter.weight']",
        "embeddings.word_embeddings.weight expected (60, 16) got (59, 16)",
    ):
        assert part in message


def test_layers_that_config_json_does_not_have_are_not_dropped_silently(folder):
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"Not known: \['encoder.layer.1"):
        load(folder)


def test_heads_and_buffers_are_ignored(folder):
    def change(tensors):
        tensors["cls.predictions.bias"] = np.zeros(60, np.float32)
        tensors["embeddings.position_ids"] = np.zeros((1, 24), np.int64)

    _, expected = load(folder)
    edit(folder, change)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"\xff\xfe", b'{"model_type":'])
def test_malformed_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"config\.json: expected JSON|expected a JSON object"
    ) as e:
        load(folder)
    one_line(e)


def test_missing_config_and_wrong_architecture(folder):
    edit_config(folder, model_type="roberta", architectures=["RobertaModel"])
    with pytest.raises(ValueError, match=r"\('bert', 'distilbert'\), got 'roberta'") as error:
        load(folder)
    assert str(folder) in one_line(error) and "RobertaModel" in str(error.value)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON file, found none"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_weights(folder, keep):
    path = folder / hf.WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="expected a safetensors file") as error:
        load(folder)
    assert str(path) in one_line(error)


def test_garbage_weights(folder):
    (folder / hf.WEIGHTS).write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(ValueError, match="expected a safetensors file") as error:
        load(folder)
    one_line(error)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "["])
def test_malformed_index(folder, content):
    (folder / hf.WEIGHTS).unlink()
    (folder / hf.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: expected") as error:
        load(folder)
    one_line(error)


def test_index_does_not_lead_out_of_the_folder(folder):
    (folder / hf.WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="expected the shards"):
        load(folder)


def test_pickles_are_refused(folder):
    (folder / hf.WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"never read.*convert the model to safetensors") as error:
        hf.resolve(str(folder))
    one_line(error)


def test_resolve_errors(tmp_path, monkeypatch):
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(ValueError, match="expected a folder with a model, found none"):
            hf.resolve(name)
    with pytest.raises(ValueError, match="expected a folder with a tokenizer, found none"):
        hf.resolve("./absent", weights=False)
    with pytest.raises(ValueError, match="expected no revision, got 'main'"):
        hf.resolve(str(GOLDEN / "bert"), revision="main")
    # offline (conftest.py), and an empty cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("intfloat/e5-base-v2", "not a name"):
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE") as error:
            hf.resolve(name)
        assert name in one_line(error)


def test_hub_name_is_pinned_to_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(GOLDEN / "bert", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = hf.resolve("org/tiny")
    assert (source.name, source.revision) == ("org/tiny", commit)
    assert source.digest == hf.resolve(str(GOLDEN / "bert")).digest
    assert hf.resolve("org/tiny", revision=commit) == source


def test_a_tokenizer_needs_no_weights(folder, tmp_path, monkeypatch):
    (folder / hf.WEIGHTS).unlink()
    assert hf.resolve(str(folder), weights=False) == hf.Source(folder, str(folder), None, "")
    with pytest.raises(ValueError, match=r"expected model\.safetensors, found none"):
        hf.resolve(str(folder))
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf.resolve("org/tiny", weights=False).revision == folder.name
    assert set(asked.pop()) == {"config.json", *hf.TOKENIZER_FILES}


def test_weights_are_hashed_once_per_version(folder, monkeypatch):
    whole, hashed = hf.hashlib.file_digest, []

    def counted(file, name):
        hashed.append(file.name)
        return whole(file, name)

    monkeypatch.setattr(hf.hashlib, "file_digest", counted)
    first = hf.resolve(str(folder))
    assert hf.resolve(str(folder)) == first and len(hashed) == 1
    edit(folder, lambda tensors: tensors.popitem())
    assert hf.resolve(str(folder)).digest != first.digest and len(hashed) == 2


def test_packaged_weights_are_checked(monkeypatch):
    monkeypatch.setattr(packaged, "minilm", lambda: GOLDEN / "bert")
    with pytest.raises(ValueError, match="expected SHA-256 53aa5117"):
        hf.resolve(packaged.MINILM_NAME)


def test_export_needs_a_tokenizer(tmp_path):
    config, params = load(GOLDEN / "bert")
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json"):
        hf.export(
            tmp_path / "out",
            params,
            config,
            tokenizer_folder=tmp_path,
            pooling="mean",
            max_length=8,
        )
