"""Every variant of configs/vixml.py: merged, locked, each section what its consumer takes."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from absl import flags
from flax.core import meta
from ml_collections import config_flags

from configs import vixml
from xmc_jax import main, packaged
from xmc_jax.data.known import KNOWN
from xmc_jax.models import dual, hf
from xmc_jax.training import optimizer
from xmc_jax.training.config import RunConfig
from xmc_jax.training.program import Program
from xmc_jax.types import Prompts

PAIRS = [f"{backbone}/{dataset}" for backbone in vixml.BACKBONES for dataset in vixml.DATASETS]
VARIANTS = [
    "",
    *vixml.NAMES,
    *PAIRS,
    *(f"{vixml.DEFAULT},{option}" for option in vixml.OPTIONS if option != "full"),
    *(
        f"{vixml.DEFAULT},{options}"
        for options in ("ngame,margin", "ngame,ema", "margin,ema", "exact,margin")
    ),
    *(
        f"minilm_l3/debian_26k,reference,{option}"
        for option in ("ngame", "ema", "decoupled_softmax")
    ),
    "bert/amazon_131k,ngame,exact",
    *(
        f"qwen25_3b/amazontitles_131k,{options}"
        for options in ("full", "ngame", "full,ngame", "decoupled_softmax,exact", "ema,scann")
    ),
]

DATA_FIELDS = {
    "dataset",
    "raw_dir",
    "data_dir",
    "max_length",
    "encoding",
    "text",
    "tokenizer",
    "propensity_a",
    "propensity_b",
    "validation_fraction",
    "validation_seed",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sections_build_their_dataclasses(variant):
    config = vixml.get_config(variant)
    assert config.is_locked
    built = RunConfig.from_dict(config.to_dict())
    for field in dataclasses.fields(RunConfig):
        _check_fields(getattr(built, field.name), config[field.name], field.name)
    sections = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(config) == sections | {"data", "name"}
    assert set(config.data) == DATA_FIELDS
    assert config.data.dataset in KNOWN
    known = KNOWN[config.data.dataset]
    assert (config.data.propensity_a, config.data.propensity_b) == (known.a, known.b)
    assert "/" not in config.name and "," not in config.name


def _check_fields(section, values, name: str) -> None:
    """Every field, and no other, is in the config, so that a flag can set it."""
    fields = {field.name for field in dataclasses.fields(section)}
    assert fields == set(values), name
    for field in fields:
        if dataclasses.is_dataclass(getattr(section, field)):
            _check_fields(getattr(section, field), values[field], f"{name}.{field}")
        else:
            assert not isinstance(getattr(section, field), dict), f"{name}.{field}"


@pytest.mark.parametrize("variant", ["", f"{vixml.DEFAULT},ngame", f"{vixml.DEFAULT},reference"])
def test_optimizer_groups_fit_the_parameters(variant):
    """Every parameter has a rate and a decay, and every pattern decides one (else build raises)."""
    config = RunConfig.from_dict(vixml.get_config(variant).to_dict())
    encoder, prime = config.encoder, config.prime if config.prime.enabled else None
    sizes = hf.load_config(hf.resolve(encoder.backbone), layers=1)
    sizes = dataclasses.replace(sizes, vocab_size=64, max_positions=16)
    model = dual.DualEncoder(sizes, encoder.pooling, prime=prime, num_free_vectors=4)
    params = meta.unbox(jax.eval_shape(lambda: dual.init_params(model, 0)))
    transform = optimizer.build(config.optimizer, params, 10)
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params)
    ones = jax.tree.map(np.ones_like, zeros)
    # With no gradient the update is the weight decay alone; the schedule is past its first step.
    update = transform.update(zeros, transform.update(zeros, transform.init(ones), ones)[1], ones)[
        0
    ]
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(update)
        if np.any(leaf)
    }
    assert "backbone/layers/up/kernel" in decayed
    assert not any(name.endswith("bias") or name == "free_vectors" for name in decayed)
    assert not any("norm" in name for name in decayed if name.startswith("backbone"))
    transformer = prime is not None and prime.combiner == "transformer"
    assert ("combiner/norm1/scale" in decayed) == transformer  # as in the reference


@pytest.fixture(scope="module")
def small(fields) -> dict[bool, dict]:
    """Encoder sections of a small decoder and of a small encoder, and their datasets."""
    encoder = {"backbone": fields["encoder"]["backbone"], "layers": None}
    decoder = {"backbone": packaged.TINY_DECODER_NAME, "init": "random"}
    return {
        decodes: (section, main.open_data(fields | {"encoder": fields["encoder"] | section}))
        for decodes, section in ((True, decoder), (False, encoder))
    }


@pytest.fixture(scope="module")
def traced() -> set[str]:
    """The reduced configs that a step was traced of; many variants have the same."""
    return set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_can_be_traced(variant, fields, small, traced):
    """The sections of a variant fit each other, up to a step of a small backbone."""
    config = vixml.get_config(variant).to_dict()
    decodes = variant.split("/")[0] in vixml.DECODERS or variant == "tiny_decoder"
    section, dataset = small[decodes]
    config["encoder"] |= section
    config["prime"] |= {"free_vectors": 16, "ff_dim": 64}
    chunks = min(config["train"]["n_chunks"], 2)
    config["train"] |= {"batch_size": 40, "epochs": 3, "n_chunks": chunks}
    config["eval"] = fields["eval"]
    untraced = ("data", "eval", "export", "fusion", "name")
    parts = {name: config[name] for name in config if name not in untraced}
    patterns = [pattern for pattern, _ in config["optimizer"]["lr"]]
    key = json.dumps(parts | {"optimizer": config["optimizer"] | {"lr": patterns}})
    if key in traced:
        return
    prompts = Prompts(head=(1, 2), tail=(3,)) if decodes else Prompts()
    program = Program(RunConfig.from_dict(config), dataset, prompts)
    batch = program.sampler.build(np.arange(200, dtype=np.int32), 0, 0)
    state, metrics = jax.eval_shape(
        program.step.train, program.abstract, program.abstract_frozen, batch
    )
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract)
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract)):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert metrics["loss"].shape == ()
    traced.add(key)


def test_names_of_runs_differ():
    names = [vixml.get_config(variant).name for variant in VARIANTS[1:]]
    assert len(set(names)) == len(names)


def test_the_default_needs_no_download():
    config = vixml.get_config()
    assert config.data.raw_dir == "bundled"
    assert config.encoder.backbone == "minilm-l6-packaged"


def test_variants_do_not_share_state():
    vixml.get_config("bert/amazon_131k").optimizer.warmup_steps = 7
    assert vixml.get_config("bert/amazon_131k").optimizer.warmup_steps == 100
    config = vixml.get_config()
    config.curriculum.start = 3
    config.optimizer.clip_norm = 1.0
    again = vixml.get_config()
    assert again.curriculum.start is None and again.optimizer.clip_norm is None


@pytest.mark.parametrize("option", ["ngame", "ema"])
def test_options_of_sampled_labels(option):
    """Our own recipe compares with all labels, which these cannot."""
    config = vixml.get_config(f"{vixml.DEFAULT},{option}")
    assert vixml.get_config().train.labels == "all" and config.train.labels == "sampled"
    assert config.loss.kind == "decoupled_softmax"


@pytest.mark.parametrize(
    "variant, batch_size, lr, max_length",
    [
        ("minilm_l3/amazontitles_131k", 2048, 5e-4, 32),
        ("distilbert/amazontitles_1_3m", 2048, 2e-4, 32),
        ("bert/mm_amazontitles_300k", 2048, 1e-4, 32),
        ("minilm_l3/amazon_131k", 2048, 5e-4, 128),
        ("distilbert/amazon_131k", 1024, 1e-4, 128),
        ("bert/amazon_131k", 512, 5e-5, 128),
        ("qwen25_0_5b/amazontitles_131k", 2048, 5e-5, 32),
        ("qwen25_3b/amazontitles_1_3m", 2048, 5e-5, 32),
        ("qwen25_7b/amazontitles_131k", 1024, 5e-5, 32),
        ("qwen25_3b/amazon_131k", 512, 2e-5, 128),
        ("gemma3_4b/mm_amazontitles_300k", 2048, 5e-5, 32),
        ("llama32_3b/amazontitles_131k", 2048, 5e-5, 32),
    ],
)
def test_paper_recipes(variant, batch_size, lr, max_length):
    """ViXML supp. A and Table 9."""
    config = vixml.get_config(variant)
    assert config.train.batch_size == batch_size
    decodes = variant.split("/")[0] in vixml.DECODERS
    assert config.train.epochs == ((40 if "1_3m" in variant else 30) if decodes else 300)
    assert config.data.max_length == max_length
    assert dict(config.optimizer.lr) == {
        "backbone/.*": lr,
        "combiner/.*": 5e-4,
        "free_vectors": 5e-4,
    }


@pytest.mark.parametrize("backbone", vixml.DECODERS)
def test_decoder_recipes(backbone):
    """ViXML supp. A, and the reference's run script for decoders."""
    config = vixml.get_config(f"{backbone}/amazontitles_131k")
    lora = config.encoder.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.scaling) == (256, 256, 0, "rslora")
    assert len(lora.targets) == 7
    assert config.optimizer.clip_norm == 1.0 and config.optimizer.warmup_steps == 100
    assert config.encoder.compute_dtype == config.encoder.frozen_dtype == "bfloat16"
    assert config.prime.free_vector_init == "cluster_mean" and config.prime.heads == 8
    assert (config.curriculum.start, config.curriculum["update"]) == (4, 2)
    assert config.curriculum.double_at == (8, 12, 16, 20, 24)
    assert config.fusion.prefix == "This product text"
    family = {"qwen": "<|endoftext|>", "llam": "<|end_of_text|>", "gemm": "<eos>"}
    assert config.fusion.suffix == family[backbone[:4]]


@pytest.mark.parametrize(
    "variant", ["minilm_l3/debian_3k,reference", "minilm_l3/debian_26k,reference"]
)
def test_reference_keeps_nothing_of_our_recipe(variant):
    """The settings of the reference runs, whatever the dataset's own recipe is."""
    config = vixml.get_config(variant).to_dict()
    for section in ("prime", "loss", "optimizer", "curriculum", "tables", "train", "eval"):
        for field, value in vixml.BASE[section].items():
            if field not in vixml._REFERENCE.get(section, {}):
                expected = value.get() if hasattr(value, "get_type") else value
                assert config[section][field] == expected, f"{section}.{field}"
    assert config["loss"]["kind"] == "margin"
    assert config["loss"]["num_negatives"] == 200 and not config["loss"]["weighted"]
    assert (config["train"]["batch_size"], config["train"]["epochs"]) == (256, 12)
    assert config["data"]["max_length"] == 16 and config["encoder"]["layers"] == 3


@pytest.mark.parametrize(
    "variant, nearest",
    [
        ("tin", "tiny"),
        ("minilm_3/debian_3k", "minilm_l3"),
        ("bert/debian_3", "debian_3k"),
        ("bert/debian_3k,ngam", "ngame"),
        ("bert", "bert/debian_3k"),
        ("bert/debian_3k/x", "debian_3k"),
    ],
)
def test_unknown_parts_name_the_nearest(variant, nearest):
    with pytest.raises(ValueError) as error:
        vixml.get_config(variant)
    assert "\n" not in str(error.value)
    assert f"did you mean {nearest!r}" in str(error.value)


@pytest.mark.parametrize(
    "variant, message",
    [
        ("bert/amazon_131k,reference", "expected debian_3k or debian_26k"),
        ("qwen25_3b/debian_3k,reference", "expected an encoder, as its runs had"),
        ("bert/amazon_131k,full", "expected a decoder"),
    ],
)
def test_options_are_refused_elsewhere(variant, message):
    with pytest.raises(ValueError, match=message):
        vixml.get_config(variant)


def parse(monkeypatch, variant: str, *overrides: str) -> dict:
    """The config that the command line gives."""
    arguments = ["test", f"--config=configs/vixml.py:{variant}", *overrides]
    monkeypatch.setattr("sys.argv", arguments)  # where config_flags looks for overrides
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    return values["config"].value.to_dict()


def test_flags_override_fields_that_are_none_and_tuples(monkeypatch):
    config = parse(
        monkeypatch,
        "tiny",
        "--config.encoder.dropout=0.2",
        "--config.encoder.layers=2",
        "--config.data.tokenizer=folder",
        "--config.optimizer.clip_norm=1.0",
        "--config.curriculum.double_at=(3,5)",
        "--config.optimizer.lr=(('backbone/.*', 1e-5), ('.*', 1e-3))",
    )
    assert config["encoder"]["dropout"] == 0.2 and config["encoder"]["layers"] == 2
    assert config["data"]["tokenizer"] == "folder" and config["optimizer"]["clip_norm"] == 1.0
    assert config["curriculum"]["double_at"] == (3, 5)
    assert config["optimizer"]["lr"] == (("backbone/.*", 1e-5), (".*", 1e-3))


@pytest.mark.parametrize(
    "variant, section, field, value",
    [
        (vixml.DEFAULT, "curriculum", "start", 3),
        (vixml.DEFAULT, "encoder", "dropout", 0.2),
        ("minilm_l3/debian_3k,reference", "encoder", "dropout", 0.2),
        ("minilm_l3/debian_3k,reference", "optimizer", "clip_norm", 1.0),
    ],
)
def test_flags_override_what_a_recipe_leaves_open(monkeypatch, variant, section, field, value):
    config = parse(monkeypatch, variant, f"--config.{section}.{field}={value}")
    assert config[section][field] == value
    assert vixml.get_config(variant)[section][field] != value
