"""Every variant of configs/vixml.py: merged, locked, each section what its consumer takes."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax.core import meta
from ml_collections import config_dict, config_flags

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.config.run_config import override
from xmc_jax.data import packaged
from xmc_jax.data.known import KNOWN
from xmc_jax.data.records.own_records import RecordsConfig
from xmc_jax.data.synthetic.product_set import SyntheticConfig
from xmc_jax.data.types import Prompts
from xmc_jax.images.embed import ImagesConfig
from xmc_jax.models import dual
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import build, optimizer
from xmc_jax.training.run import Run

SMALL_ENCODER = BertConfig(vocab_size=64, hidden=8, layers=1, heads=2, ff=16, max_positions=16)
SMALL_DECODER = DecoderConfig(
    family="qwen2",
    vocab_size=64,
    hidden=8,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ff=16,
    qkv_bias=True,
)
PAIRS = [f"{backbone}/{dataset}" for backbone in vixml.BACKBONES for dataset in vixml.DATASETS]
ENCODER, DECODER = "minilm_l3/amazontitles_131k", "qwen25_3b/amazontitles_131k"  # with images
# Where an option can be tried; the others everywhere.
OF_DECODERS = {"full": DECODER, "image_text": DECODER, "no_prefix": DECODER, "no_suffix": DECODER}
OF_IMAGES = dict.fromkeys(("compare", "images_1", "images_2", "images_5", "vit"), ENCODER)
VARIANTS = [
    "",
    *vixml.NAMES,
    *PAIRS,
    *(
        f"{(OF_DECODERS | OF_IMAGES).get(option, vixml.DEFAULT)},{option}"
        for option in vixml.OPTIONS
    ),
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
        f"{DECODER},{options}"
        for options in ("ngame", "full,ngame", "decoupled_softmax,exact", "ema,scann")
    ),
    *(
        f"{pair},{options}"
        for pair in (ENCODER, DECODER)
        for options in ("text_only", "ngame,compare", "text_only,ngame", "last_token,images_1")
    ),
    *(f"{DECODER},{options}" for options in ("full,compare", "image_text,no_prefix,no_suffix")),
]
WITH_IMAGES = {name for name, override in vixml.DATASETS.items() if "images" in override["data"]}


def runs(config: dict) -> list[dict]:
    """What a config trains: itself, and the run that it is compared with."""
    if not (baseline := config["baseline"]):
        return [config]
    differing = {section: fields for section, fields in baseline.items() if section != "name"}
    return [config, override(config, differing)]


def test_every_variant_is_a_config():
    """Locked, every field there for flags, each value one that its section takes."""
    for variant in VARIANTS:
        config = vixml.get_config(variant)
        assert config.is_locked
        fields = config.to_dict()
        assert dataclasses.asdict(RunConfig.from_dict(fields)) == fields, variant
        known = KNOWN.get(config.data.dataset, KNOWN["LF-DebianTitles-3K"])
        constants = (0.55, 1.5) if config.data.dataset == "Own" else (known.a, known.b)
        assert (config.data.propensity_a, config.data.propensity_b) == constants
        assert "/" not in config.name and "," not in config.name
        for run in runs(fields)[1:]:
            RunConfig.from_dict(run)


def test_the_record_and_image_options_are_those_of_their_makers():
    """The sections have the fields and defaults of the classes that take them."""
    data = vixml.get_config("mm").to_dict()["data"]
    ImagesConfig(dataset="x", data_dir="x", **data["images"] | {"source": "x"})
    SyntheticConfig(**data["synthetic"])
    assert RecordsConfig("x", **data["records_options"]).options == RecordsConfig("x").options


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        "",
        f"{vixml.DEFAULT},ngame",
        f"{vixml.DEFAULT},reference",
        "mm",
        *(f"{pair},compare" for pair in (ENCODER, DECODER)),
        *(f"{pair},compare,ngame" for pair in (ENCODER, DECODER)),
        f"{DECODER},compare,full,ngame",
    ],
)
def test_optimizer_groups_fit_the_parameters(variant):
    """Every parameter has a rate and a decay, and every pattern decides one (else build raises)."""
    for run in runs(vixml.get_config(variant).to_dict()):
        config, images = RunConfig.from_dict(run), run["data"]["images"]["name"] is not None
        trained, update = first_decay(config, image_width=3 if images else 0)
        decayed = {path for path, leaf in update.items() if np.any(leaf)}
        lora = config.encoder.lora.rank > 0
        assert f"backbone/layers/up/{'lora_a' if lora else 'kernel'}" in decayed
        kept = {name for name in decayed if name.endswith("bias") or name == "free_vectors"}
        assert not kept
        assert not any("norm" in name for name in decayed if name.startswith("backbone"))
        combines = config.prime.enabled and config.prime.combiner == "transformer"
        assert ("combiner/norm1/scale" in decayed) == combines  # as in the reference
        assert ("projection/kernel" in decayed) == ("projection/bias" in trained) == images
        if lora:
            backbone = {name for name in trained if name.startswith("backbone")}
            assert {name.rpartition("/")[2] for name in backbone} == {"lora_a", "lora_b"}


def first_decay(config: RunConfig, image_width: int) -> tuple[set[str], dict[str, np.ndarray]]:
    """What is trained of a small model, and its update without a gradient: decay alone."""
    encoder, prime = config.encoder, config.prime if config.prime.enabled else None
    sizes = SMALL_DECODER if encoder.lora.rank or config.fusion.prefix else SMALL_ENCODER
    model = dual.DualEncoder(
        sizes,
        encoder.pooling,
        lora=dataclasses.replace(encoder.lora, rank=min(encoder.lora.rank, 2)),
        prime=prime and dataclasses.replace(prime, heads=2, ff_dim=8),
        num_free_vectors=4 if prime else 0,
        image_width=image_width,
    )
    params = meta.unbox(jax.eval_shape(lambda: dual.init_params(model, 0)))
    params, _ = optimizer.partition(params, config.optimizer.trainable)
    transform = optimizer.build(config.optimizer, params, 10)

    @jax.jit
    def update():
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        ones = jax.tree.map(jnp.ones_like, zeros)
        # The schedule is past its first step, whose rate is 0.
        _, state = transform.update(zeros, transform.init(ones), ones)
        return transform.update(zeros, state, ones)[0]

    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(update())
    }
    return set(leaves), leaves


@pytest.fixture(scope="module")
def small(fields, with_random_images, tmp_path_factory) -> dict[bool, tuple]:
    """Of a small decoder and of a small encoder the section, the dataset, and that with images."""
    encoder = {"backbone": fields["encoder"]["backbone"], "layers": None}
    decoder = {"backbone": packaged.TINY_DECODER_NAME, "init": "random"}
    found = {}
    for decodes, section in ((True, decoder), (False, encoder)):
        data = build.data(RunConfig.from_dict(fields | {"encoder": fields["encoder"] | section}))
        folder = tmp_path_factory.mktemp("images") / "images-random"
        found[decodes] = (section, data, with_random_images(data, folder))
    return found


@pytest.fixture(scope="module")
def traced() -> set[str]:
    """The reduced configs that a step was traced of; many variants have the same."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_can_be_traced(variant, fields, small, traced):
    """The sections of a variant fit each other, up to a step of a small backbone."""
    decodes = variant.split("/")[0] in vixml.DECODERS or variant == "tiny_decoder"
    section, texts, images = small[decodes]
    for config in runs(vixml.get_config(variant).to_dict()):
        config["encoder"] |= section
        config["prime"] |= {"free_vectors": 16, "ff_dim": 64}
        chunks = min(config["train"]["n_chunks"], 2)
        config["train"] |= {"batch_size": 48, "epochs": 3, "n_chunks": chunks}
        config["eval"] = fields["eval"]
        dataset = texts if config["data"]["images"]["name"] is None else images
        untraced = ("data", "eval", "export", "fusion", "name", "baseline")
        parts = {name: config[name] for name in config if name not in untraced}
        patterns = [pattern for pattern, _ in config["optimizer"]["lr"]]
        parts["optimizer"] = config["optimizer"] | {"lr": patterns}
        key = json.dumps([parts, dataset is images, config["fusion"]["order"]])
        if key not in traced:
            trace(config, dataset, Prompts((1, 2), (4,), (3,)) if decodes else Prompts())
            traced.add(key)


def trace(config: dict, dataset, prompts: Prompts) -> None:
    program = Run(RunConfig.from_dict(config), dataset, prompts)
    batch = program.sampler.build(np.arange(200, dtype=np.int32), 0, 0)
    step = sharding.under(program.mesh, program.step.train)
    state, metrics = jax.eval_shape(step, program.abstract, program.abstract_frozen, batch)
    assert jax.tree.structure(state) == jax.tree.structure(program.abstract)
    for after, before in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract)):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert metrics["loss"].shape == ()
    assert ("projection" in state.params) == (dataset.shape.image_width > 0)


def test_names_of_runs_differ():
    variants = set(VARIANTS) - {""}
    assert len({vixml.get_config(variant).name for variant in variants}) == len(variants)


def test_datasets_have_images_or_not():
    assert len(WITH_IMAGES) == len(vixml.DATASETS) - 3
    for pair in PAIRS:
        config = vixml.get_config(pair)
        has = pair.split("/")[1] in WITH_IMAGES
        assert (config.data.images.name is not None) == has
        assert any(path == "projection/.*" for path, _ in config.optimizer.lr) == has
    for dataset in ("mm_debian_3k", "synthetic"):  # nothing to download
        images = vixml.get_config(f"minilm_l3/{dataset}").data.images
        assert (images.name, images.encoder, images.layout) == ("hog-colour",) * 2 + ("stretch",)


def differences(variant: str, option: str) -> dict[str, object]:
    """Fields that an option changes, by their paths; not the name, and the baseline as a whole."""
    before, after = (
        dict(leaves(vixml.get_config(v).to_dict())) for v in (variant, f"{variant},{option}")
    )
    assert before.keys() == after.keys()
    return {path: value for path, value in after.items() if value != before[path]}


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict) and name != "baseline":
            yield from leaves(value, f"{prefix}{name}.")
        elif prefix or name != "name":
            yield prefix + name, value


@pytest.mark.parametrize("pair", [ENCODER, DECODER])
def test_options_of_images_change_these_fields_alone(pair):
    images = "data.images."
    assert differences(pair, "images_1") == {f"{images}per_item": 1}
    assert differences(pair, "images_2") == {f"{images}per_item": 2}
    five = {f"{images}per_item": 5, f"{images}name": "siglip2-5"}
    assert differences(pair, "images_5") == five
    vit = {f"{images}name": "vit", f"{images}encoder": "google/vit-base-patch16-224-in21k"}
    assert differences(pair, "vit") == vit
    assert differences(pair, "last_token") == {"encoder.pooling": "last"}


def test_options_of_prompts_change_these_fields_alone():
    order = {
        "fusion.order": "image_text",
        "fusion.image_prefix": "This product image",
        "fusion.prefix": "and its text",
    }
    assert differences(DECODER, "image_text") == order
    no_prefix = {"fusion.prefix": "", "fusion.image_prefix": ""}
    assert differences(DECODER, "no_prefix") == no_prefix
    assert differences(DECODER, "no_suffix") == {"fusion.suffix": ""}
    for options in ("image_text,no_prefix", "no_prefix,image_text"):
        assert differences(DECODER, options) == no_prefix | {"fusion.order": "image_text"}


@pytest.mark.parametrize("pair", [ENCODER, DECODER, "minilm_l3/synthetic", "bert/mm_debian_3k"])
def test_compare_adds_the_run_of_text_alone(pair):
    assert list(differences(pair, "compare")) == ["baseline"]
    expected = dict(leaves(vixml.get_config(f"{pair},text_only").to_dict()))
    config, baseline = runs(vixml.get_config(f"{pair},compare").to_dict())
    assert config["baseline"]["name"] == "text only"
    assert dict(leaves(baseline | {"baseline": {}})) == expected


def test_compare_comes_last_wherever_it_stands():
    others = ("ngame", "images_1", "last_token", "decoupled_softmax")
    for pair in (ENCODER, DECODER):
        configs = []
        for place in range(len(others) + 1):
            options = (*others[:place], "compare", *others[place:])
            config = vixml.get_config(",".join((pair, *options))).to_dict()
            configs.append({name: config[name] for name in config if name != "name"})
        assert all(config == configs[0] for config in configs[1:])
        assert not any("free" in path for path, _ in configs[0]["baseline"]["optimizer"]["lr"])
    mm = vixml.get_config("mm,ngame").to_dict()["baseline"]
    assert mm == vixml.get_config("minilm_l3/synthetic,ngame,compare").to_dict()["baseline"]


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
    assert config.train.epochs == ((40 if "1_3m" in variant else 30) if decodes else 150)
    assert config.data.max_length == max_length
    rates = {"backbone/.*": lr, "combiner/.*": 5e-4, "free_vectors": 5e-4}
    assert dict(config.optimizer.lr) == rates | {"projection/.*": 5e-4}
    images = config.data.images
    assert (images.name, images.per_item, images.layout) == ("siglip2", 3, "pad")
    assert images.encoder == "google/siglip2-so400m-patch14-384"
    assert config.fusion.order == ("text_image" if decodes else "image_text")
    without = vixml.get_config(f"{variant},text_only")
    assert without.train.epochs == (config.train.epochs if decodes else 300)
    assert without.data.images.name is None and dict(without.optimizer.lr) == rates
    fields = config.to_dict()
    for name, fields_without in without.to_dict().items():
        if name not in ("name", "data", "train", "optimizer"):
            assert fields_without == fields[name], name


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
    assert (config.curriculum.start, config.curriculum.update_every) == (4, 2)
    assert config.curriculum.double_at == (8, 12, 16, 20, 24)
    assert config.fusion.prefix == "This product text"
    assert config.fusion.image_prefix == "and its image" and config.fusion.order == "text_image"
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
        ("bert", "bert/own"),
        ("bert/amazon_131k,image_1", "images_1"),
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
        *((f"bert/debian_3k,{option}", "a dataset with images, one of") for option in OF_IMAGES),
        ("qwen25_3b/debian_26k,image_text", "a dataset with images, one of mm_debian_3k, synth"),
        (f"{DECODER},image_text,image_text", "expected a decoder"),
        ("bert/amazon_131k,text_only,compare", "option compare: expected a dataset with images"),
        *((f"{ENCODER},{option}", "expected a decoder") for option in OF_DECODERS),
        (f"{DECODER},no_suffix,no_suffix", "option no_suffix: expected a decoder that has one"),
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


def test_no_field_is_called_as_a_method_that_a_flag_would_find_instead():
    def names(config):
        for name, value in config.items():
            yield name
            if isinstance(value, dict):
                yield from names(value)

    found = set(names(vixml.get_config("mm").to_dict()))
    assert {"update_every", "records_options", "lr"} <= found
    assert not found & set(dir(config_dict.ConfigDict))


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
