"""Decoders against torch, on fresh random weights: hidden states, folders in and out."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.golden_models import DECODERS
from tests.padded_rows import places_of
from xmc_jax.data import rows
from xmc_jax.data.types import Inputs, Prompts
from xmc_jax.models import backbone, decoder, dual, hf, hf_export, hf_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make = pytest.importorskip("tests.golden.make")

VARIANTS = {family: (family, {}) for family in DECODERS} | {
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True}),
    "qwen3 biased": ("qwen3", {"attention_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, "rope_scaling": None}),
}
T = 20
# Compiling quickly is most of the time; what is computed is the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def variants(*fast):
    """All of them; those not named are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in VARIANTS]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def states_of(config, params, tokens, lengths):
    return decoder.Decoder(config).apply(
        {"params": params}, *places_of(tokens, lengths), hidden_states=True
    )


def load(folder):
    source = hf.resolve(str(folder))
    config = hf.load_config(source)
    return config, hf_weights.load_params(source, config)


def assert_same(ours, theirs, lengths):
    """Per layer, of real tokens."""
    assert len(ours) == len(theirs)
    real = (np.arange(theirs.shape[2]) < lengths[:, None])[..., None]
    for layer, (one, other) in enumerate(zip(ours, theirs)):
        np.testing.assert_allclose(
            one * real, other * real, rtol=0, atol=2e-5, err_msg=f"after layer {layer}"
        )


@pytest.mark.parametrize("variant", variants(*DECODERS, "qwen2 sliding"))
def test_hidden_states_layer_by_layer(variant, tmp_path):
    family, changes = VARIANTS[variant]
    for seed in (1, 2, 3):  # compiled once
        model = make.tiny(family, seed, **changes)
        model.save_pretrained(tmp_path)
        tokens, lengths = make.texts(seed, n=8, T=T)
        config, params = load(tmp_path)
        hidden, states = states_of(config, params, tokens, lengths)
        assert_same(states, make.torch_hidden_states(model, tokens, lengths), lengths)
        np.testing.assert_array_equal(hidden, states[-1])


@pytest.mark.parametrize("variant", variants(*DECODERS, "qwen2 sliding"))
def test_published_config_is_the_one_of_transformers(variant, tmp_path):
    family, changes = VARIANTS[variant]
    old = make.published(family, **changes)
    model = make.tiny(family, **changes)
    config = backbone.from_hf(old)
    assert config == backbone.from_hf(model.config.to_dict())
    # and what transformers reads in ours is what it reads in the published one
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(backbone.to_hf(config)))
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokens, lengths = make.texts(5, n=4, T=T)
    np.testing.assert_array_equal(
        make.torch_hidden_states(again, tokens, lengths),
        make.torch_hidden_states(model, tokens, lengths),
    )


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_model_with_a_head_is_its_backbone(family, tied, tmp_path):
    auto = transformers.AutoModelForCausalLM
    whole = make.tiny(family, 4, auto=auto, tie_word_embeddings=tied)
    whole.save_pretrained(tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "bare")
    names = safetensors.numpy.load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert ("lm_head.weight" in names) is not tied and "model.norm.weight" in names
    config, params = load(tmp_path / "whole")
    bare_config, bare = load(tmp_path / "bare")
    assert config == bare_config and config.tied is tied
    jax.tree.map(np.testing.assert_array_equal, params, bare)
    # some checkpoints hold the tied head too
    names["lm_head.weight"] = names["model.embed_tokens.weight"]
    safetensors.numpy.save_file(names, tmp_path / "whole" / hf.WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "whole")[1], bare)


# as published, as transformers 5 names them, and of Gemma3Model alone
@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("language_model.model.", ""),
        ("model.language_model.", "model."),
        ("language_model.", ""),
    ],
)
def test_text_tower_of_a_model_with_images(text, others, tmp_path):
    model = make.with_images()
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = text + name.removeprefix("language_model.")
        elif name != "lm_head.weight":
            name = others + name
        tensors[name] = tensor.numpy().copy()
    assert any("vision_tower" in name for name in tensors)
    safetensors.numpy.save_file(tensors, tmp_path / hf.WEIGHTS)
    config, params = load(tmp_path)
    assert config == backbone.from_hf(make.published("gemma3"))
    tokens, lengths = make.texts(1, n=8, T=T)
    _, states = states_of(config, params, tokens, lengths)
    theirs = make.torch_hidden_states(model.model.language_model, tokens, lengths)
    assert_same(states, theirs, lengths)


def test_model_with_images_as_transformers_writes_it(tmp_path):
    model = make.with_images(1)
    model.save_pretrained(tmp_path / "whole")
    model.model.language_model.save_pretrained(tmp_path / "text")
    config, params = load(tmp_path / "whole")
    text_config, text = load(tmp_path / "text")
    assert config == text_config
    jax.tree.map(np.testing.assert_array_equal, params, text)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def pooled(model, params, inputs):
    return model.apply({"params": {"backbone": params}}, inputs, method="encode").pooled


@pytest.mark.parametrize("positions", ["contiguous", "padded"])
@pytest.mark.parametrize("variant", variants("gemma3"))
def test_prompts_around_texts(variant, positions, tmp_path):
    family, changes = VARIANTS[variant]
    model = make.tiny(family, 6, **changes)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    prompts = Prompts(head=(7, 8, 9), tail=(10, 11))
    tokens, lengths = make.texts(6, n=6, T=9)
    n = len(tokens)
    if positions == "padded":  # the reference's layout: the padding stays where it is
        head, tail = np.tile(prompts.head, (n, 1)), np.tile(prompts.tail, (n, 1))
        sequence = np.concatenate([head, tokens, tail], axis=1)
        mask = np.concatenate(
            [np.ones_like(head), np.arange(9) < lengths[:, None], np.ones_like(tail)], axis=1
        )
    else:
        sequence, mask = np.zeros((n, 14), int), np.zeros((n, 14), int)
        for row in range(n):
            whole = [*prompts.head, *tokens[row, : lengths[row]], *prompts.tail]
            sequence[row, : len(whole)] = whole
            mask[row, : len(whole)] = 1
    with torch.no_grad():
        hidden = model(torch.tensor(sequence), attention_mask=torch.tensor(mask)).last_hidden_state
    weights = torch.tensor(mask)[..., None].float()
    expected = (hidden * weights).sum(1) / weights.sum(1)
    items = rows.one_each(Inputs(tokens, lengths), prompts, "text_image", positions)
    ours = pooled(dual.DualEncoder(config), params, items)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", variants(*DECODERS, "qwen2 sliding"))
def test_exported_folder_is_the_torch_model(variant, tmp_path):
    family, changes = VARIANTS[variant]
    model = make.tiny(family, 3, **changes)
    model.save_pretrained(tmp_path / "in", max_shard_size="8KB")
    assert (tmp_path / "in" / hf.INDEX).is_file()
    config, params = load(tmp_path / "in")
    hf_export.merged(tmp_path / "out", params, config, pooling="mean", max_length=8)
    again, problems = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(problems.values()), problems
    assert type(again) is type(model) and again.dtype == torch.float32
    ours, theirs = again.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_shards_give_what_one_file_gives(tmp_path):
    model = make.tiny("gemma3", 2)
    for name, limit in (("one", "1GB"), ("many", "8KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=limit)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "many")[1], load(tmp_path / "one")[1]
    )


def test_export_in_bfloat16_is_what_transformers_computes_in(tmp_path):
    """The scaled embeddings to the last bit, the last states as closely as torch comes itself."""
    model = make.tiny("gemma3", 8)
    model.save_pretrained(tmp_path / "in")
    config, params = load(tmp_path / "in")
    out = tmp_path / "out"
    hf_export.merged(out, params, config, pooling="mean", max_length=8, dtype="bfloat16")
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    assert theirs.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)), name
    tokens, lengths = make.texts(8, n=6, T=9)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        states = theirs(
            torch.tensor(tokens).long(), attention_mask=mask, output_hidden_states=True
        ).hidden_states
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    ours = decoder.Decoder(config, jnp.bfloat16)
    _, ours = jax.jit(
        lambda params: ours.apply(
            {"params": params}, *places_of(tokens, lengths), hidden_states=True
        ),
        compiler_options=QUICK,
    )(rounded)
    assert ours.dtype == jnp.bfloat16
    ours, real = np.asarray(ours, np.float32), mask[..., None].numpy()
    np.testing.assert_array_equal(ours[0] * real, states[0].float().numpy() * real)
    # what rounding costs is no more than in torch, beside the same weights in float32
    exact = make.torch_hidden_states(theirs.float(), tokens, lengths)[-1]
    cost, expected = (
        np.abs((last - exact) * real).mean() for last in (ours[-1], states[-1].float().numpy())
    )
    assert 0 < cost < 1.5 * expected
