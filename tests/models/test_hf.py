"""Hugging Face folders: round trips, shards, and what every broken one says."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from tests.golden_models import DECODERS
from tests.golden_models import FOLDER as GOLDEN
from xmc_jax.config import MeshConfig
from xmc_jax.data import packaged
from xmc_jax.models import backbone, decoder_config, dual, hf, hf_tensors, hf_weights
from xmc_jax.runtime import sharding

FAMILIES = tuple(backbone.FAMILIES)


@pytest.fixture
def folder(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))


def load(folder, layers=None):
    source = hf.resolve(str(folder))
    config = hf.load_config(source, layers)
    return config, hf_weights.load_params(source, config)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_import_has_the_tree_of_init(family):
    config, params = load(GOLDEN / family)
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
    with pytest.raises(ValueError, match=r"\('bert', .*'gemma3'\), got 'roberta'") as error:
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
    assert hf.resolve(str(folder), weights=False) == hf.ModelSource(folder, str(folder), None, "")
    with pytest.raises(ValueError, match=r"expected model\.safetensors, found none"):
        hf.resolve(str(folder))
    asked = []

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf.resolve("org/tiny", weights=False).revision == folder.name
    assert {"config.json", *hf.TOKENIZER_FILES} <= set(asked[0])
    assert not any("model*" in pattern or "adapter_model" in pattern for pattern in asked[0])


def test_weights_are_hashed_once_per_version(folder, monkeypatch):
    whole, hashed = hf.sha256, []

    def counted(path):
        hashed.append(path)
        return whole(path)

    monkeypatch.setattr(hf, "sha256", counted)
    first = hf.resolve(str(folder))
    assert hf.resolve(str(folder)) == first and len(hashed) == 1
    edit(folder, lambda tensors: tensors.popitem())
    assert hf.resolve(str(folder)).digest != first.digest and len(hashed) == 2


def test_packaged_weights_are_checked(monkeypatch):
    monkeypatch.setattr(packaged, "minilm", lambda: GOLDEN / "bert")
    with pytest.raises(ValueError, match="expected SHA-256 53aa5117"):
        hf.resolve(packaged.MINILM_NAME)


def test_a_long_list_of_what_does_not_fit_is_cut(folder):
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("encoder.layer.1")])
    with pytest.raises(ValueError, match=r"Missing: \['encoder.layer.1[^]]*'\] and 8 more\.") as e:
        load(folder)
    assert one_line(e).count("encoder.layer.1") == 8


def wanted(config, mesh, dtype=np.float32):
    """Of a model, its parameters as they are wanted on a mesh."""
    boxed = jax.eval_shape(lambda: dual.init_params(dual.DualEncoder(config), 0))["backbone"]
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        nn.unbox(boxed),
        sharding.of_params(boxed, mesh),
    )


@pytest.fixture
def requests(monkeypatch):
    """What is read of the files from here on: the tensor's name and the part of it."""
    read, done = hf_weights._part, []

    def spy(parameter, tensor, within):
        part = read(parameter, tensor, within)
        done.append((tensor.name, part))
        return part

    monkeypatch.setattr(hf_weights, "_part", spy)
    return done


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1), (4, 1, 2), (8, 1, 1)])
@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_each_device_gets_its_part(family, axes, requests):
    source = hf.resolve(str(GOLDEN / family))
    config = hf.load_config(source)
    whole = hf_weights.load_params(source, config)
    requests.clear()
    mesh = sharding.make_mesh(MeshConfig(*axes))
    abstract = wanted(config, mesh)
    loaded = hf_weights.load_params(source, config, abstract)

    def check(path, ours, expected, leaf):
        assert ours.sharding == leaf.sharding and ours.dtype == leaf.dtype
        np.testing.assert_array_equal(ours, expected, err_msg=str(path))
        for shard in ours.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index])

    jax.tree.map_with_path(check, loaded, whole, abstract)
    # what several devices hold is read once
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    assert sum(part.nbytes for _, part in requests) == total
    if axes[1] * axes[2] > 1:
        query = hf_tensors.layout(config)["layers/query/kernel"].names[0]
        parts = [part for name, part in requests if name == query]
        assert len(parts) == axes[1] * axes[2]


def test_the_largest_is_read_first_and_one_at_a_time(requests, monkeypatch):
    monkeypatch.setattr(hf_weights, "_BLOCK_BYTES", 1000)
    source = hf.resolve(str(GOLDEN / "qwen2"))
    config = hf.load_config(source)
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    abstract = traverse_util.flatten_dict(wanted(config, mesh), sep="/")
    of = {name: path for path in abstract for name in hf_tensors.layout(config)[path].names}
    hf_weights.load_params(source, config, traverse_util.unflatten_dict(abstract, sep="/"))

    bytes_of = {path: leaf.size * leaf.dtype.itemsize for path, leaf in abstract.items()}
    asked = [(of[name], part.nbytes) for name, part in requests]
    order = list(dict.fromkeys(path for path, _ in asked))
    assert set(order) == set(abstract)
    sizes = [bytes_of[path] for path in order]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    # no going back to one that another followed, and of each no more than it has
    assert [path for path, _ in itertools.groupby(asked, key=lambda one: one[0])] == order
    for path in order:
        parts = [size for other, size in asked if other == path]
        assert sum(parts) == bytes_of[path]
        # a layer at a time, a table by blocks of rows
        limit = 1000 if path == "token_embedding" else bytes_of[path] / config.layers
        assert max(parts) <= limit or not path.startswith(("layers/", "token_embedding"))


def test_only_what_is_asked_for_is_read(requests):
    source = hf.resolve(str(GOLDEN / "llama"))
    config = hf.load_config(source)
    whole = hf_weights.load_params(source, config)
    requests.clear()
    mesh = sharding.make_mesh(MeshConfig())
    layers = wanted(config, mesh)["layers"]
    loaded = hf_weights.load_params(source, config, {"layers": {"up": layers["up"]}})
    np.testing.assert_array_equal(
        loaded["layers"].pop("up")["kernel"], whole["layers"]["up"]["kernel"]
    )
    assert loaded == {"layers": {}}
    assert {name for name, _ in requests} == set(
        hf_tensors.layout(config)["layers/up/kernel"].names
    )


def test_parameters_in_bfloat16(requests):
    source = hf.resolve(str(GOLDEN / "qwen3"))
    config = hf.load_config(source, layers=2)
    whole = hf_weights.load_params(source, config)
    requests.clear()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    loaded = hf_weights.load_params(source, config, wanted(config, mesh, jnp.bfloat16))
    for ours, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(whole)):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, expected.astype(jnp.bfloat16))
    assert not any("layers.2." in name for name, _ in requests)


@pytest.mark.parametrize("family", DECODERS)
def test_first_layers_of_a_decoder(family, tmp_path):
    folder = pathlib.Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    _, all_layers = load(folder)
    config, first = load(folder, layers=2)
    assert config.layers == 2
    jax.tree.map(
        lambda ours, whole: np.testing.assert_array_equal(ours, whole[:2]),
        first["layers"],
        all_layers["layers"],
    )
    # layers that are left out need not be there
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("layers.2.")])
    jax.tree.map(np.testing.assert_array_equal, load(folder, layers=2)[1], first)
    with pytest.raises(ValueError, match="Missing: "):
        load(folder)


# Run by itself, with nothing of the tests in memory. Peaks are of this process image: getrusage's
# begin with what the parent had.
_MEASURED = """
import json, resource, sys
import jax, jax.numpy as jnp, numpy as np
from flax.core import meta
from xmc_jax.runtime import sharding
from xmc_jax.config import MeshConfig
from xmc_jax.models import dual, hf, hf_weights

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

source = hf.resolve(sys.argv[1])
config = hf.load_config(source)
model = dual.DualEncoder(config, compute_dtype="bfloat16")
mesh = sharding.make_mesh(MeshConfig())
boxed = jax.eval_shape(lambda: dual.init_params(model, 0))["backbone"]
abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=where),
    meta.unbox(boxed),
    sharding.of_params(boxed, mesh),
)
jax.jit(lambda x: x @ x)(jnp.ones((256, 256))).block_until_ready()
baseline = status("VmRSS:")
params = jax.block_until_ready(hf_weights.load_params(source, config, abstract))
peak = status("VmHWM:")
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
first = np.asarray(params["layers"]["up"]["kernel"][:, 0, 0], np.float32).tolist()
report = {"baseline": baseline, "peak": peak, "model": sum(sizes), "largest": max(sizes)}
print(json.dumps(report | {"devices": jax.device_count(), "first": first}))
"""


def write_large(folder):
    """A Qwen2 of 263 M bfloat16 weights in four shards, written layer by layer."""
    folder.mkdir()
    config = decoder_config.DecoderConfig(
        family="qwen2",
        vocab_size=16_000,
        hidden=1024,
        layers=16,
        heads=16,
        kv_heads=2,
        head_dim=64,
        ff=4096,
        qkv_bias=True,
    )
    (folder / "config.json").write_text(json.dumps(backbone.to_hf(config)))
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(jnp.bfloat16)
    shapes = {}
    for parameter in hf_tensors.layout(config).values():
        for layer, name in enumerate(parameter.names):
            shard = 1 + layer * 4 // config.layers
            shapes.setdefault(f"model-0000{shard}-of-00004.safetensors", {})[f"model.{name}"] = (
                parameter.stored
            )
    weight_map = {}
    for file, tensors in shapes.items():
        weights = {}
        for name, shape in tensors.items():
            weights[name] = np.resize(noise, shape)
            if "mlp.up_proj" in name:
                weights[name][0, 0] = int(name.split(".")[2])
        safetensors.numpy.save_file(weights, folder / file)
        weight_map |= dict.fromkeys(weights, file)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return config


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read there")
def test_loading_holds_one_parameter_beside_the_model(tmp_path):
    config = write_large(tmp_path / "large")
    environment = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(tmp_path / "large")],
            env=environment | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(tmp_path / "large")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    beside = report["peak"] - report["baseline"] - report["model"]
    sizes = {name: report[name] for name in ("baseline", "peak", "model", "largest")}
    for name, size in (sizes | {"beside the model": beside}).items():
        print(f"{name}: {size / 1e6:.0f} MB")
    assert report["devices"] == 1
    assert report["first"] == list(range(config.layers))
    assert report["model"] > 4e8
    assert report["largest"] == config.layers * config.hidden * config.ff * 2
    assert beside <= report["largest"]
