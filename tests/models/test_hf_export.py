"""Hugging Face folders out: tensors, shards, adapters, and what stays of an earlier export."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from xmc_jax.config import ExportConfig, LoraConfig, MeshConfig
from xmc_jax.models import backbone, dual, hf, hf_export, hf_modules, hf_tensors, hf_weights
from xmc_jax.models.layers import NO_LORA
from xmc_jax.models.segments import POOLINGS
from xmc_jax.runtime import sharding

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = tuple(backbone.FAMILIES)


@functools.cache
def golden(family):
    return load(GOLDEN / family)


def load(folder, layers=None):
    source = hf.resolve(str(folder))
    config = hf.load_config(source, layers)
    return source, config, hf_weights.load_params(source, config)


def with_adapters(config, params, lora):
    """With random adapters of the layers that `lora` names."""
    rng = np.random.default_rng(0)
    stack = {name: dict(leaves) for name, leaves in params["layers"].items()}
    for name in lora.targets:
        count, width, features = stack[name]["kernel"].shape
        stack[name] |= {
            "lora_a": rng.standard_normal((count, width, lora.rank), np.float32),
            "lora_b": rng.standard_normal((count, lora.rank, features), np.float32),
        }
    return params | {"layers": stack}


def tensors_of(folder):
    tensors = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def merged(folder, params, config, **kwargs):
    hf_export.merged(folder, params, config, **{"pooling": "mean", "max_length": 16} | kwargs)
    return tensors_of(folder)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_gives_identical_tensors(family, tmp_path):
    _, config, params = golden(family)
    after = merged(tmp_path, jax.tree.map(jnp.asarray, params), config)
    before = safetensors.numpy.load_file(GOLDEN / family / hf.WEIGHTS)
    assert set(before) - set(after) <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(after) <= set(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)
    _, again, reloaded = load(tmp_path)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
    assert read(tmp_path / "config.json")["dtype"] == "float32"


@pytest.mark.parametrize(
    ("pooling", "name"),
    list(hf_modules.POOLINGS.items()),
)
def test_files_of_sentence_transformers(pooling, name, tmp_path):
    _, config, params = golden("qwen2")
    merged(tmp_path, params, config, pooling=pooling, max_length=24)
    fields = read(tmp_path / "1_Pooling" / "config.json")
    assert fields.pop("word_embedding_dimension") == config.hidden
    assert {field for field, on in fields.items() if on} == {f"pooling_mode_{name}"}
    assert tuple(hf_modules.POOLINGS) == POOLINGS
    assert read(tmp_path / "sentence_bert_config.json")["max_seq_length"] == 24
    modules = [
        (one["path"], one["type"].rpartition(".")[2]) for one in read(tmp_path / "modules.json")
    ]
    assert modules == [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]


@pytest.mark.parametrize("scaling", ["rslora", "classic"])
@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_adapters_are_added_to_their_kernels(family, scaling, tmp_path):
    _, config, params = golden(family)
    lora = LoraConfig(rank=2, alpha=3.0, scaling=scaling, targets=("query", "down"))
    ours = with_adapters(config, params, lora)
    before, after = (
        merged(tmp_path / "a", params, config),
        merged(tmp_path / "b", ours, config, lora=lora),
    )
    scale = 3 / np.sqrt(2) if scaling == "rslora" else 1.5
    changed = set()
    for target in lora.targets:
        leaves = ours["layers"][target]
        names = hf_tensors.layout(config)[f"layers/{target}/kernel"].names
        for layer, name in enumerate(names):
            product = leaves["lora_a"][layer] @ leaves["lora_b"][layer]
            expected = leaves["kernel"][layer] + scale * product
            np.testing.assert_allclose(after[name], expected.T, rtol=1e-6, atol=1e-6)
        changed |= set(names)
    assert set(before) == set(after)
    for name in set(before) - changed:
        np.testing.assert_array_equal(before[name], after[name])


def test_bfloat16(tmp_path):
    _, config, params = golden("qwen3")
    lora = LoraConfig(rank=2, alpha=2.0, targets=("up",))
    ours = with_adapters(config, params, lora)
    wide = merged(tmp_path / "wide", ours, config, lora=lora)
    out = merged(tmp_path / "out", ours, config, lora=lora, dtype="bfloat16")
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    for name, tensor in out.items():  # rounded once, after the sum
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor, wide[name].astype(jnp.bfloat16))
    _, _, again = load(tmp_path / "out")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(again))
    # a frozen base in bfloat16 keeps its values
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    kept = merged(tmp_path / "half", half, config)
    assert kept["norm.weight"].dtype == np.float32
    np.testing.assert_array_equal(
        kept["embed_tokens.weight"], np.asarray(half["token_embedding"], np.float32)
    )


def test_parameters_spread_over_devices(tmp_path):
    _, config, params = golden("llama")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: dual.init_params(dual.DualEncoder(config), 0))["backbone"]
    spread = jax.device_put(params, sharding.of_params(boxed, mesh))
    expected = merged(tmp_path / "one", params, config)
    for name, tensor in merged(tmp_path / "eight", spread, config).items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


def test_shards(tmp_path, monkeypatch):
    _, config, params = golden("gemma3")
    one = merged(tmp_path / "one", params, config)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors")] == [hf.WEIGHTS]

    folder = tmp_path / "many"
    monkeypatch.setattr(hf_export, "_SHARD", "8KB")
    many = merged(folder, params, config)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3 and hf.WEIGHTS not in shards
    assert all((folder / shard).stat().st_size < 10_000 for shard in shards)
    index = read(folder / hf.INDEX)
    assert set(index["weight_map"]) == set(one) and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for name, tensor in one.items():
        np.testing.assert_array_equal(many[name], tensor, err_msg=name)
        assert name in safetensors.numpy.load_file(folder / index["weight_map"][name])
    jax.tree.map(np.testing.assert_array_equal, load(folder)[2], params)


def projection(width=5, hidden=3, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((width, hidden)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.arange(hidden, dtype=jnp.bfloat16)}


def test_projection_of_images_is_read_back(tmp_path):
    _, config, params = golden("bert")
    merged(tmp_path, params, config)
    source = hf.resolve(str(tmp_path))
    assert hf_weights.load_projection(source, 5) is None
    ours = projection()
    hf_export.projection(tmp_path, ours, {"name": "some/encoder", "revision": None, "E": 5})
    found = hf_weights.load_projection(source, 5)
    assert {name: leaf.dtype for name, leaf in found.items()} == dict.fromkeys(ours, np.float32)
    jax.tree.map(np.testing.assert_array_equal, found, ours)
    path = tmp_path / hf_weights.PROJECTION
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {"weight", "bias"}
        assert file.get_tensor("weight").shape == (3, 5)  # [out, in], as PyTorch has it
        assert file.metadata() == {
            "format": "pt",
            "encoder.name": "some/encoder",
            "encoder.revision": "None",
            "encoder.E": "5",
        }
    # it is no tensor of the backbone, and goes with the model it was trained with
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[2], params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not safetensors", r"image_projection\.safetensors: expected "),
        ({"weight": np.zeros((3, 5), np.float32)}, "expected the tensors weight and bias: "),
        (
            {"weight": np.zeros((3, 6), np.float32), "bias": np.zeros(3, np.float32)},
            r"projection of images 5 wide, got one of \[3, 6\]; choose the images it was train",
        ),
        (
            {"weight": np.zeros((3, 5), np.float32), "bias": np.zeros(4, np.float32)},
            r"projection of images 5 wide, got one of \[3, 5\]",
        ),
    ],
)
def test_a_projection_that_does_not_fit_is_refused(content, message, tmp_path):
    _, config, params = golden("bert")
    merged(tmp_path, params, config)
    source = hf.resolve(str(tmp_path))
    if isinstance(content, dict):
        content = safetensors.numpy.save(content)
    (tmp_path / hf_weights.PROJECTION).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        hf_weights.load_projection(source, 5)
    assert "\n" not in str(error.value)


def exported_adapter(folder, source, config, params, lora):
    ours = with_adapters(config, params, lora)
    hf_export.adapter(folder, ours, config, lora=lora, source=source, pooling="last", max_length=16)
    return ours, tensors_of(folder), read(folder / "adapter_config.json")


@pytest.mark.parametrize("scaling", ["rslora", "classic"])
def test_adapter_folder(scaling, tmp_path):
    source, config, params = golden("qwen3")
    lora = LoraConfig(
        rank=2, alpha=3.0, dropout=0.1, scaling=scaling, targets=("query", "gate", "down")
    )
    ours, tensors, fields = exported_adapter(tmp_path, source, config, params, lora)
    modules = {"query": "self_attn.q_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
    expected = {
        f"base_model.model.layers.{layer}.{module}.lora_{kind.upper()}.weight": ours["layers"][
            target
        ][f"lora_{kind}"][layer].T
        for target, module in modules.items()
        for kind in "ab"
        for layer in range(config.layers)
    }
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    kept = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3.0,
        "lora_dropout": 0.1,
        "use_rslora": scaling == "rslora",
        "target_modules": ["down_proj", "gate_proj", "q_proj"],
        "base_model_name_or_path": str((GOLDEN / "qwen3").resolve()),
        "revision": None,
    }
    assert fields | kept == fields
    pooling = read(tmp_path / "1_Pooling" / "config.json")
    assert pooling["pooling_mode_lasttoken"]

    # as a start, it is the model with the adapters merged
    started, _, params = load(tmp_path)
    assert started.adapter == tmp_path and hf_modules.read(started).pooling() == "last"
    merged(tmp_path / "merged", ours, config, lora=lora)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        params,
        load(tmp_path / "merged")[2],
    )


def test_adapters_of_a_text_tower_beside_images(tmp_path):
    _, config, params = golden("gemma3")
    folder = pathlib.Path(shutil.copytree(GOLDEN / "gemma3", tmp_path / "base"))
    text = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    source = hf.resolve(str(folder))
    assert hf.load_config(source) == config
    lora = LoraConfig(rank=2, targets=("query", "up"))
    _, tensors, fields = exported_adapter(tmp_path / "out", source, config, params, lora)
    prefix = "base_model.model.language_model.layers."
    assert tensors and all(name.startswith(prefix) for name in tensors)
    assert fields["target_modules"] == r".*language_model\.layers\..*\.(q_proj|up_proj)"
    hf_weights.check(hf.resolve(str(tmp_path / "out")))


def test_adapter_names_the_hub_as_it_was_asked(tmp_path):
    source, config, params = golden("qwen2")
    source = dataclasses.replace(source, name="Qwen/Qwen2.5-0.5B", revision="0" * 40)
    lora = LoraConfig(rank=2, targets=("query",))
    *_, fields = exported_adapter(tmp_path, source, config, params, lora)
    assert fields["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"
    assert fields["revision"] == "0" * 40


def test_adapter_refusals(tmp_path):
    source, config, params = golden("qwen2")
    lora = LoraConfig(rank=2, targets=("query",))
    started = dataclasses.replace(source, adapter=tmp_path)
    for start, sizes, adapters, message in (
        (source, config, NO_LORA, "expected 'merged' for a model without adapters"),
        (source, config.first(2), lora, "expected 'merged' for the first 2 of the 3 layers"),
        (started, config, lora, "expected 'merged' for training that began with the adapter"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            hf_export.adapter(
                tmp_path / "out",
                params,
                sizes,
                lora=adapters,
                source=start,
                pooling="mean",
                max_length=16,
            )
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_first_layers_are_a_model_by_themselves(tmp_path):
    _, config, params = load(GOLDEN / "gemma3", layers=2)
    merged(tmp_path, params, config)
    _, again, reloaded = load(tmp_path)
    assert again == config and again.sliding == (True, False)
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_is_read_back(family, tmp_path):
    _, config, params = golden(family)
    merged(tmp_path, params, config, dtype="bfloat16")
    assert backbone.from_hf(read(tmp_path / "config.json")) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "onnx"}, r"export.format: expected 'merged' or 'adapter', got 'onnx'"),
        ({"dtype": "float16"}, "export.dtype: expected .*got 'float16'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**fields)
