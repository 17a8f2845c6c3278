"""LoRA against peft: gradients, initial distribution, and exported folders."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.padded_rows import rows_of
from xmc_jax.config import LoraConfig, choices
from xmc_jax.models import backbone, dual, hf, hf_export, hf_tensors, hf_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
make = pytest.importorskip("tests.golden.make")

ALL = ("query", "key", "value", "out", "gate", "up", "down")
TARGETS = {family: ALL for family in make.DECODERS} | {
    "bert": ("query", "key", "value", "out", "up", "down"),
    "distilbert": ("query", "value"),
}
# Compiling quickly is most of the time; what is computed is the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def cases(fast, slow):
    return [*fast, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def lora_of(family, scaling="rslora"):
    return LoraConfig(rank=3, alpha=6.0, scaling=scaling, targets=TARGETS[family])


def adapted(config, params, lora, seed=0):
    """The parameters with adapters neither of which is zero."""
    module = backbone.build(config, "float32", "none", lora)
    ones = np.ones((1, 1), np.int32)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), ones, ones, ones)["params"])
    rng = np.random.default_rng(seed)
    stack = {name: dict(leaves) for name, leaves in params["layers"].items()}
    for name in lora.targets:
        for kind in ("lora_a", "lora_b"):
            shape = shapes["layers"][name][kind].shape
            stack[name][kind] = 0.2 * rng.standard_normal(shape, np.float32)
    return params | {"layers": stack}


def load(folder):
    source = hf.resolve(str(folder))
    config = hf.load_config(source)
    return source, config, hf_weights.load_params(source, config)


def ours(config, lora, params, tokens, lengths):
    return compiled(dual.DualEncoder(config, lora=lora), params, rows_of(tokens, lengths))


def encode(model, params, inputs):
    return model.apply({"params": {"backbone": params}}, inputs, method="encode").unit


compiled = jax.jit(encode, static_argnums=0, compiler_options=QUICK)


def theirs(model, tokens, lengths):
    """Unit embeddings by torch, with their graph."""
    mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()
    hidden = model(torch.tensor(tokens).long(), attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def by_peft(model, config, lora, params):
    """The torch model with the same adapters put on by peft, and its parameter of each of ours."""
    modules = {
        path: [name.removesuffix(".weight") for name in hf_tensors.layout(config)[path].names]
        for path in (f"layers/{target}/kernel" for target in lora.targets)
    }
    peft_config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.scaling == "rslora",
        target_modules=[name for names in modules.values() for name in names],
    )
    model = peft.get_peft_model(model, peft_config).eval()
    parameters = dict(model.named_parameters())
    of = {}
    for target in lora.targets:
        for kind, letter in (("lora_a", "A"), ("lora_b", "B")):
            of[target, kind] = [
                parameters[f"base_model.model.{name}.lora_{letter}.default.weight"]
                for name in modules[f"layers/{target}/kernel"]
            ]
            for parameter, value in zip(of[target, kind], params["layers"][target][kind]):
                parameter.data = torch.tensor(value.T.copy())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert len(trained) == sum(map(len, of.values()))
    return model, of


FAST = [("gemma3", "rslora")]
ALL_CASES = [(family, scaling) for family in TARGETS for scaling in choices(LoraConfig, "scaling")]


@pytest.mark.parametrize(
    ("family", "scaling"), cases(FAST, [case for case in ALL_CASES if case not in FAST])
)
def test_gradients(family, scaling, tmp_path):
    torch_model = make.tiny(family, 1)
    torch_model.save_pretrained(tmp_path)
    _, config, params = load(tmp_path)
    lora = lora_of(family, scaling)
    params = adapted(config, params, lora)
    tokens, lengths = make.texts(1, n=6, T=12)
    weights = np.random.default_rng(2).standard_normal((6, config.hidden), np.float32)

    model, of = by_peft(torch_model, config, lora, params)
    loss = (theirs(model, tokens, lengths) * torch.tensor(weights)).sum()
    loss.backward()

    adapters = {
        target: {kind: params["layers"][target][kind] for kind in ("lora_a", "lora_b")}
        for target in lora.targets
    }

    def of_adapters(adapters, params, inputs):
        stack = {name: leaves | adapters.get(name, {}) for name, leaves in params["layers"].items()}
        unit = encode(dual.DualEncoder(config, lora=lora), params | {"layers": stack}, inputs)
        return (unit * weights).sum()

    gradient = jax.jit(jax.value_and_grad(of_adapters), compiler_options=QUICK)
    value, gradients = gradient(adapters, params, rows_of(tokens, lengths))
    np.testing.assert_allclose(value, loss.item(), rtol=0, atol=1e-4)
    for (target, kind), parameters in of.items():
        for layer, parameter in enumerate(parameters):
            expected = parameter.grad.numpy().T
            error = np.linalg.norm(gradients[target][kind][layer] - expected)
            assert error <= 1e-4 * np.linalg.norm(expected), (target, kind, layer)
            assert np.linalg.norm(expected) > 0


def test_initial_distribution(tmp_path):
    """A is drawn as peft draws it, layer by layer and apart; B is zero."""
    model = make.tiny("qwen2")
    config = backbone.from_hf(make.published("qwen2"))
    lora = LoraConfig(rank=64, targets=("query", "down"))
    peft_config = peft.LoraConfig(r=64, target_modules=["q_proj", "down_proj"])
    parameters = dict(peft.get_peft_model(model, peft_config).named_parameters())
    module = backbone.build(config, "float32", "none", lora)
    ones = np.ones((1, 1), np.int32)
    init = jax.jit(module.init, compiler_options=QUICK)
    stack = nn.unbox(init(jax.random.key(1), ones, ones, ones))["params"]["layers"]
    for target, name in (("query", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        modules = [f"base_model.model.layers.{i}.{name}.lora_" for i in range(config.layers)]
        a, b = (
            np.stack([parameters[f"{m}{x}.default.weight"].detach().numpy().T for m in modules])
            for x in "AB"
        )
        ours = np.asarray(stack[target]["lora_a"])
        assert ours.shape == a.shape and stack[target]["lora_b"].shape == b.shape
        assert not b.any() and not np.any(stack[target]["lora_b"])
        np.testing.assert_allclose([ours.min(), ours.max()], [a.min(), a.max()], rtol=0.02)
        np.testing.assert_allclose(ours.std(), a.std(), rtol=0.05)
        np.testing.assert_allclose(ours.mean(), 0, atol=5 * a.std() / np.sqrt(a.size))
        correlation = np.corrcoef(ours.reshape(len(ours), -1)) - np.eye(len(ours))
        assert np.abs(correlation).max() < 5 / np.sqrt(ours[0].size)


def exported(family, folder, torch_model, form):
    """Our embeddings, the texts, and the folder that a model with adapters is exported to."""
    torch_model.save_pretrained(folder / "base")
    source, config, params = load(folder / "base")
    lora = lora_of(family)
    params = adapted(config, params, lora, seed=3)
    tokens, lengths = make.texts(3, n=6, T=12)
    unit = ours(config, lora, params, tokens, lengths)
    export = functools.partial(
        getattr(hf_export, form), folder / "out", params, config, pooling="mean", max_length=12
    )
    export(lora=lora, **({"source": source} if form == "adapter" else {}))
    return unit, tokens, lengths, folder / "out"


@pytest.mark.parametrize(
    "family", cases(["qwen2"], [(family,) for family in TARGETS if family != "qwen2"])
)
def test_merged_export_is_the_model_with_its_adapters(family, tmp_path):
    unit, tokens, lengths, out = exported(family, tmp_path, make.tiny(family, 2), "merged")
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        expected = theirs(model, tokens, lengths)
        base = theirs(make.tiny(family, 2), tokens, lengths)
    np.testing.assert_allclose(unit, expected, rtol=0, atol=1e-5)
    assert np.abs(unit - base.numpy()).max() > 0.05  # the adapters do something
    _, config, params = load(out)
    again = ours(config, LoraConfig(), params, tokens, lengths)
    np.testing.assert_allclose(again, unit, rtol=0, atol=1e-5)


def check_adapter_folder(base, unit, tokens, lengths, out, text=lambda model: model):
    auto = transformers.AutoModel
    on_base = peft.PeftModel.from_pretrained(base, out).eval()
    by_itself = auto.from_pretrained(out).eval()
    for model in (on_base, by_itself):
        assert sum("lora_A" in name for name, _ in model.named_parameters()) > 0
        with torch.no_grad():
            np.testing.assert_allclose(
                unit, theirs(text(model), tokens, lengths), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(
    "family", cases(["qwen2"], [(family,) for family in TARGETS if family != "qwen2"])
)
def test_exported_adapters(family, tmp_path):
    unit, tokens, lengths, out = exported(family, tmp_path, make.tiny(family, 2), "adapter")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    check_adapter_folder(base, unit, tokens, lengths, out)


def test_exported_adapters_of_a_model_with_images(tmp_path):
    model = make.with_images(2)
    unit, tokens, lengths, out = exported("gemma3", tmp_path, model, "adapter")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    assert type(base) is transformers.Gemma3Model
    check_adapter_folder(base, unit, tokens, lengths, out)
    assert not any("lora" in name for name, _ in base.vision_tower.named_parameters())
