"""Folders as other tools publish them: what loads, and what is refused in one line."""

import json
import shutil

import jax
import model_cases
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer

from xmc_jax.config import MeshConfig, RunConfig
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.models import dual, hf, hf_adapters, hf_modules, hf_tensors, hf_weights
from xmc_jax.models.pooled_dense import DenseConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import build

UNQUANTISED = "take the model that they were made from"


def load(folder, abstract=None):
    source = hf.resolve(str(folder))
    sizes = hf.load_config(source)
    return sizes, hf_weights.load_params(source, sizes, abstract)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def refusal(folder, **kwargs):
    with pytest.raises(ValueError) as error:
        source = hf.resolve(str(folder))
        hf_weights.check(source, **kwargs)
        hf_modules.read(source).pooling()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "base", "head"),
    [
        ("bert_gamma_beta", "bert", "cls"),
        ("colbert_linear", "bert", "linear"),
        ("prefix_model", "bert", ""),
        ("sentence_transformers_state", "bert", ""),
        ("compiled", "bert", ""),
        ("qwen3_seq_cls", "qwen3", "score"),
        ("tied_lm_head_only", "qwen3", ""),
        ("st_0_Transformer", "bert", ""),
    ],
)
def test_names_of_other_tools_give_the_same_backbone(name, base, head, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = model_cases.make(name, tmp_path)
    _, expected = load(model_cases.make(base, tmp_path))
    same(load(folder)[1], expected)
    said = [line for line in caplog.messages if str(folder) in line]
    assert len(said) == (1 if head else 0)  # the pooler is left out without a word
    assert not head or said[0].endswith(
        f": tensors left out, as no part of the backbone: {head} (1)"
    )


def test_two_backbones_are_told_by_their_prefixes(tmp_path):
    folder = model_cases.make("bert", tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    both = {f"{x}_encoder.{k}": v for x in ("passage", "query") for k, v in tensors.items()}
    safetensors.numpy.save_file(both, folder / "model.safetensors")
    assert "2, whose names begin with passage_encoder., query_encoder.;" in refusal(folder)


@pytest.mark.parametrize("untied", [False, True])
def test_a_head_stands_in_for_the_embedding_only_where_they_are_tied(untied, tmp_path):
    folder = model_cases.make("tied_lm_head_only", tmp_path)
    if untied:
        model_cases.edit(folder, tie_word_embeddings=False)
        assert "Missing: ['model.embed_tokens.weight']" in refusal(folder)
    else:
        hf_weights.check(hf.resolve(str(folder)))


def test_an_adapter_is_added_to_the_weights_of_its_base(tmp_path):
    folder = model_cases.make("peft_adapter", tmp_path)
    source = hf.resolve(str(folder))
    assert source.folder == tmp_path / "tiny-bert" and source.tokenizer == folder
    assert source.digest not in ("", hf.resolve(str(source.folder)).digest)
    sizes, merged = load(folder)
    _, base = load(source.folder)
    tensors = safetensors.numpy.load_file(folder / hf_adapters.WEIGHTS)
    for module in ("query", "key", "value", "out"):
        for layer, name in enumerate(hf_tensors.layout(sizes)[f"layers/{module}/kernel"].names):
            expected = base["layers"][module]["kernel"][layer]
            prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if module in ("query", "value"):
                a, b = (tensors[f"{prefix}{kind}.weight"] for kind in "AB")
                expected = expected + 4 * (b @ a).T  # alpha / r
            found = merged["layers"][module]["kernel"][layer]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    same(merged["token_embedding"], base["token_embedding"])
    # split over devices, each reads its part of the products
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    kernel = merged["layers"]["query"]["kernel"]
    split = sharding.named((None, "embed", ("heads", 4)), kernel.shape, mesh, "x")
    leaf = jax.ShapeDtypeStruct(kernel.shape, np.float32, sharding=split)
    _, part = load(folder, {"layers": {"query": {"kernel": leaf}}})
    np.testing.assert_allclose(part["layers"]["query"]["kernel"], kernel, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "expected use_dora = False, found True; merge the adapter with peft"),
        ({"peft_type": "IA3"}, "expected peft_type = 'LORA', found 'IA3'; merge"),
        ({"lora_alpha": None}, "expected lora_alpha to be a number, got None"),
        ({"base_model_name_or_path": None}, "expected base_model_name_or_path to name a model"),
        (
            {"base_model_name_or_path": "/gone"},
            "expected the model that the adapter was trained on",
        ),
    ],
)
def test_adapters_that_are_refused(changes, message, tmp_path):
    folder = model_cases.make("peft_adapter", tmp_path)
    path = folder / hf_adapters.CONFIG
    model_cases.write(path, json.loads(path.read_text()) | changes)
    assert message in refusal(folder)


def test_adapters_of_other_layers_are_refused(tmp_path):
    folder = model_cases.make("peft_adapter", tmp_path)
    path = folder / hf_adapters.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 16), np.float32)
    safetensors.numpy.save_file(tensors, path)
    assert "found also ['base_model.model.lm_head.lora_A.weight']; merge" in refusal(folder)
    path.rename(folder / "adapter_model.bin")
    assert "expected the adapter's weights, found none" in refusal(folder)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({}, "mean"),
        ({"pooling_mode": "weightedmean"}, "found pooling by weightedmean; --config.encoder.pool"),
        ({"pooling_mode": ["cls", "mean"]}, "found pooling by cls and mean; "),
        ({"pooling_mode": 3}, "expected pooling_mode to be a name, found [3]"),
    ],
)
def test_pooling_of_a_folder(pooling, expected, tmp_path):
    folder = model_cases.make("bert", tmp_path)
    assert hf_modules.read(hf.resolve(str(folder))).pooling() == "mean"  # nothing is said
    model_cases.modules(folder, pooling)
    if " " in expected:
        assert expected in refusal(folder)
    else:
        assert hf_modules.read(hf.resolve(str(folder))).pooling() == expected


def test_a_layer_behind_the_pooling(tmp_path):
    folder = model_cases.make("st_dense", tmp_path)
    sizes, params = load(folder)
    assert (sizes.width, sizes.dense) == (8, DenseConfig(8, "Tanh", True))
    stored = safetensors.numpy.load_file(folder / "2_Dense" / "model.safetensors")
    np.testing.assert_array_equal(params["dense"]["kernel"], stored["linear.weight"].T)
    model = dual.DualEncoder(sizes, pooling="cls")
    expected = jax.eval_shape(lambda: dual.nn.unbox(dual.init_params(model, 0)))["backbone"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    del stored["linear.bias"]
    safetensors.numpy.save_file(stored, folder / "2_Dense" / "model.safetensors")
    assert "expected {'linear.weight': (8, 16), 'linear.bias': (8,)}" in refusal(folder)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    assert "found pytorch_model.bin (pickles, which are never read); convert" in refusal(folder)


@pytest.mark.parametrize("change", [{"activation_function": "my.Swish"}, {"use_residual": True}])
def test_modules_that_are_not_computed(change, tmp_path):
    folder = model_cases.make("st_dense", tmp_path)
    path = folder / "2_Dense" / "config.json"
    model_cases.write(path, json.loads(path.read_text()) | change)
    message = refusal(folder)
    assert (
        "found 2_Dense (Dense); --config.encoder.pooling=mean trains the backbone with" in message
    )
    fields = config_of(folder, encoder={"pooling": "cls"})
    (line,) = build.differences(fields, build.modules(fields))
    assert line == f"encoder.pooling=cls, where {folder} has 2_Dense (Dense)"
    model_cases.write(folder / "modules.json", [{"path": "../x", "type": "Transformer"}])
    assert "expected a list of modules, each with a type and a path within" in refusal(folder)


def config_of(folder, **changes):
    from configs import vixml

    fields = vixml.get_config("minilm_l6/own").to_dict()
    fields["encoder"]["backbone"] = str(folder)
    for name, value in changes.items():
        fields[name] = {**fields[name], **value}
    return RunConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "changes", "values", "line"),
    [
        ("bert", {}, ("mean", "", None), None),
        ("st_cls_pooling", {}, ("cls", "", None), "encoder.pooling=cls, as {} says"),
        (
            "st_cls_pooling",
            {"encoder": {"pooling": "mean"}},
            ("mean", "", None),
            "encoder.pooling=mean, where {} has pooling by cls",
        ),
        (
            "st_prompts",
            {},
            ("mean", "query: ", "tools: "),
            "documents begin with 'query: ', labels with 'tools: ', as {} says",
        ),
        (
            "st_prompts",
            {"fusion": {"prefix": "tea "}},
            ("mean", "tea ", None),
            "documents begin with 'tea ', labels with 'tea ' (fusion.prefix, fusion.label_prefix), "
            "where {} has 'query: ' and 'tools: '",
        ),
        (
            "st_prompts",
            {"fusion": {"label_prefix": ""}},
            ("mean", "query: ", ""),
            "documents begin with 'query: ', labels with '' (fusion.prefix, fusion.label_prefix), "
            "where {} has 'query: ' and 'tools: '",
        ),
    ],
)
def test_what_the_folder_decides_is_said_in_one_line(name, changes, values, line, tmp_path):
    folder = model_cases.make(name, tmp_path)
    fields = config_of(folder, **changes)
    said = build.modules(fields)
    whole = build.filled(fields, said)
    fusion = whole.fusion
    assert (whole.encoder.pooling, fusion.prefix, fusion.label_prefix) == values
    assert build.differences(fields, said) == ([] if line is None else [line.format(folder)])
    assert build.filled(whole, said) == whole  # and is then in the config


def test_prompts_that_no_side_takes_and_prompts_that_are_not_pooled(tmp_path):
    folder = model_cases.make("st_prompts", tmp_path)
    settings = {"prompts": {"clustering": "group: "}, "default_prompt_name": None}
    model_cases.write(folder / "config_sentence_transformers.json", settings)
    fields = config_of(folder)
    (line,) = build.differences(fields, build.modules(fields))
    assert line.startswith(f"no prompt, though {folder} has some for clustering; set fusion.prefix")
    model_cases.modules(folder, {"pooling_mode": "mean", "include_prompt": False})
    fields = config_of(folder, fusion={"prefix": "group: "})
    with pytest.raises(ValueError, match="found prompts that are not pooled; --config"):
        build.filled(fields, build.modules(fields))
    model_cases.write(folder / "config_sentence_transformers.json", {"prompts": ["x"]})
    assert "expected prompts to be texts by name" in refusal(folder)


def test_ids_are_those_of_tokenizer_json(tmp_path):
    folder = model_cases.make("wordpiece_pre_tokenizer", tmp_path)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [plain.encode(text).ids for text in model_cases.TEXTS]
    assert 61 in expected[0]  # a digit by itself, which BERT's own rules would not split off
    assert tokenizers.encode(tokenizers.load(folder), model_cases.TEXTS, True) == expected


@pytest.mark.parametrize(
    "name", ["bert", "wordpiece_pre_tokenizer", "vocab_txt_only", "padding_side_left"]
)
def test_an_exported_tokenizer_gives_the_same_ids_and_pads_on_the_right(name, tmp_path):
    folder, out = model_cases.make(name, tmp_path), tmp_path / "out"
    out.mkdir()
    expected = tokenizers.encode(tokenizers.load(folder), model_cases.TEXTS, True)
    tokenizers.export(folder, out, 12)
    plain = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [plain.encode(text).ids for text in model_cases.TEXTS] == expected
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["padding_side"], config["model_max_length"]) == ("right", 12)
    assert (config["pad_token"], config["cls_token"]) == ("[PAD]", "[CLS]")
    before, after = (tokenizers.identity(tokenizers.load(x)) for x in (folder, out))
    assert before == after


@pytest.mark.parametrize(
    ("quantised", "found"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "those of bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "those of gptq"),
        ({"quant_method": "awq"}, "those of awq"),
        ({"quant_method": "fp8"}, "those of fp8"),
    ],
)
def test_quantised_folders_are_named(quantised, found, tmp_path):
    folder = model_cases.make("bert", tmp_path)
    model_cases.edit(folder, quantization_config=quantised)
    message = refusal(folder)
    assert f"found {found}, which are quantised; {UNQUANTISED}" in message


def test_integers_and_missing_files_are_named(tmp_path):
    folder = model_cases.make("bert", tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    whole = dict(tensors)
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].astype(np.int8)
    safetensors.numpy.save_file(tensors, path)
    assert f"found I8, which are quantised; {UNQUANTISED}" in refusal(folder)
    index = {"weight_map": dict.fromkeys(whole, "model-00001-of-00002.safetensors")}
    path.unlink()
    (folder / "tiny.Q4_K_M.gguf").touch()
    assert "found tiny.Q4_K_M.gguf (GGUF, whose weights are quantised); convert" in refusal(folder)
    model_cases.write(folder / "model.safetensors.index.json", index)
    assert "expected the shards ['model-00001-of-00002.safetensors']" in refusal(folder)
    shutil.rmtree(folder)
    model_cases.edit(model_cases.make("bert", tmp_path), model_type="xlm-roberta")
    assert "to be one of ('bert', " in refusal(folder)
