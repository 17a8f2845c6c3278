"""Recipes: `--config=configs/vixml.py[:variant]`.

A variant is `backbone/dataset[,option...]`, or a name by itself. Without one it is `DEFAULT`, which
trains on the bundled dataset, on a CPU, with nothing to download. Where a dataset has images, they
are used unless the option `text_only` is given. The config is
`BASE <- DATASETS[d] <- BACKBONES[b] <- RECIPES <- options`, merged field by field; then flags:
`--config.train.batch_size=1024`. Sections and fields are the dataclasses of the package.

Where numbers come from:
    [V]       the ViXML paper, arXiv 2511.13189v1, with its supplement
    [script]  the run scripts of the reference for encoders and, where decoders are meant, for
              decoders, LF-AmazonTitles-131K with images
    [Debian]  the settings of the reference runs on LF-DebianTitles-3K (docs/reproduce.md)
    [ours]    chosen here; on the Debian sets by validation on held-out source packages
"""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from xmc_jax.config import RunConfig
from xmc_jax.config.declare import options

DEFAULT = "minilm_l6/debian_3k"


BASE = dataclasses.asdict(RunConfig())


def _lr(backbone: float) -> tuple[tuple[str, float], ...]:
    """Peak learning rates; `_groups` drops the projection's if there are no images."""
    return (("backbone/.*", backbone), *BASE["optimizer"]["lr"][1:])


_AMAZON = {"encoder": {"compute_dtype": "bfloat16"}}  # Departs: the reference has fp16 autocast


def _dataset(name: str, raw_dir: str | None = None, **fields) -> dict:
    return {"data": {"dataset": name, "raw_dir": raw_dir or f"data/raw/{name}", **fields}}


_SIGLIP2 = {"name": "siglip2"}
# A frozen descriptor, where no pretrained image encoder is at hand.
_DESCRIPTOR = {"name": "hog-colour", "encoder": "hog-colour", "layout": "stretch"}

# Records of any kind: --config.data.records=path. Title and content are read, up to 64 tokens.
_OWN = {
    "data": {
        "dataset": "Own",
        "text": "title_content",
        "max_length": 64,
        "propensity_a": 0.55,  # pyxclib's for data that is neither Amazon's nor Wikipedia's
        "propensity_b": 1.5,
    }
}

DATASETS = {
    "debian_3k": _dataset("LF-DebianTitles-3K", "bundled"),
    "debian_26k": _dataset("LF-DebianTitles-26K"),
    "mm_debian_3k": _dataset("MM-DebianTitles-3K", images=_DESCRIPTOR | {"per_item": 1}),
    "synthetic": _dataset("Synthetic", "synthetic", images=_DESCRIPTOR),
    "own": _OWN,
    "mm_own": _OWN | {"data": _OWN["data"] | {"images": _SIGLIP2}},
    "amazontitles_131k": _AMAZON | _dataset("LF-AmazonTitles-131K", images=_SIGLIP2),
    # [V] supp. A: 128 tokens of title and content.
    "amazon_131k": _AMAZON
    | _dataset("LF-Amazon-131K", text="title_content", max_length=128, images=_SIGLIP2),
    # The bank and the centroids of 1.3M labels take 10.7 GB in float32 at width 768.
    "amazontitles_1_3m": _AMAZON
    | _dataset("LF-AmazonTitles-1.3M", images=_SIGLIP2)
    | {"tables": {"dtype": "bfloat16"}},
    "mm_amazontitles_300k": _AMAZON | _dataset("MM-AmazonTitles-300K", images=_SIGLIP2),
}

AMAZON = [name for name, override in DATASETS.items() if "encoder" in override]


def _encoder(name: str, lr: float) -> dict:
    return {"encoder": {"backbone": name}, "optimizer": {"lr": _lr(lr)}}


# Checkpoints and learning rates: [V] Table 9; rate of all other parameters: [V] supp. A.
ENCODERS = {
    "minilm_l3": _encoder("sentence-transformers/paraphrase-MiniLM-L3-v2", 5e-4),
    "minilm_l6": _encoder("minilm-l6-packaged", 5e-4),  # [ours]: the rate is MiniLM-L3's
    "distilbert": _encoder("sentence-transformers/msmarco-distilbert-base-v4", 2e-4),
    "bert": _encoder("intfloat/e5-base-v2", 1e-4),
}

_LORA_ONLY = ((".*/lora_[ab]", True), ("backbone/.*", False), (".*", True))


def _decoder(name: str, suffix: str, lr: float = 5e-5, chunks: int = 16, **encoder) -> dict:
    """A decoder LLM with adapters; [V] supp. A and Table 9, and the run script for decoders.

    The suffix ends a text; a batch is encoded in so many chunks to fit in 80 GB (docs/models.md).
    """
    return {
        "encoder": {
            "backbone": name,
            "compute_dtype": "bfloat16",
            "frozen_dtype": "bfloat16",
            "remat": "projections",  # [ours]: a fifth less to compute than keeping nothing
            "lora": {"rank": 256},
            **encoder,
        },
        "fusion": {
            "prefix": "This product text",
            "image_prefix": "and its image",
            "suffix": suffix,
            "order": "text_image",
        },
        "prime": {"free_vector_init": "cluster_mean"},  # [script]; [V] is silent
        "optimizer": {
            "lr": _lr(lr),  # [script]; [V] has 1e-4 for the others than the adapters
            "weight_decay": ((".*bias", 0.0), ("free_vectors", 0.0), (".*", 0.01)),
            "trainable": _LORA_ONLY,
            "clip_norm": 1.0,  # reference code
        },
        "curriculum": {"start": 4, "update_every": 2, "double_at": (8, 12, 16, 20, 24)},  # [script]
        "train": {
            "epochs": 30,  # [V] supp. A
            "n_chunks": chunks,
            "eval_every": 5,  # [script]
        },
    }


# Instruction-tuned throughout, as in [V]; the sizes that [V] does not train have its settings.
DECODERS = {
    "qwen25_0_5b": _decoder("Qwen/Qwen2.5-0.5B-Instruct", "<|endoftext|>", chunks=8),
    "qwen25_1_5b": _decoder("Qwen/Qwen2.5-1.5B-Instruct", "<|endoftext|>"),
    "qwen25_3b": _decoder("Qwen/Qwen2.5-3B-Instruct", "<|endoftext|>"),
    "qwen25_7b": _decoder("Qwen/Qwen2.5-7B-Instruct", "<|endoftext|>")
    | {"train": {"batch_size": 1024, "epochs": 30, "n_chunks": 16, "eval_every": 5}},  # [V] supp. A
    "qwen3_0_6b": _decoder("Qwen/Qwen3-0.6B", "<|endoftext|>", chunks=8),
    "qwen3_4b": _decoder("Qwen/Qwen3-4B", "<|endoftext|>"),
    "qwen3_embedding_4b": _decoder(
        "Qwen/Qwen3-Embedding-4B", "<|endoftext|>", pooling="mean"
    ),  # [V] sec. 3.1
    "llama32_1b": _decoder("meta-llama/Llama-3.2-1B-Instruct", "<|end_of_text|>"),
    "llama32_3b": _decoder("meta-llama/Llama-3.2-3B-Instruct", "<|end_of_text|>"),
    "gemma3_1b": _decoder("google/gemma-3-1b-it", "<eos>"),
    "gemma3_4b": _decoder("google/gemma-3-4b-it", "<eos>"),
}
BACKBONES = ENCODERS | DECODERS

# [Debian]
_REFERENCE = {
    "prime": {"free_vectors": 2048},
    # The script's own loss collapses on this set within two epochs.
    "loss": {"num_negatives": 200, "weighted": False},
    "optimizer": {"lr": _lr(2e-4), "warmup_steps": 20},
    "curriculum": {"start": 2, "update_every": 2, "double_at": (4, 6, 8)},
    "train": {"batch_size": 256, "epochs": 12, "eval_every": 4},
}
# [ours]: every document against all labels (DEXML's softmax, over prototypes); see README, "The
# default recipe".
_OURS = {
    "encoder": {"dropout": 0.0},
    "prime": {"combiner": "sum", "free_vector_init": "zero"},
    "loss": {"kind": "decoupled_softmax"}
    | dict.fromkeys(("document_to_label", "label_to_document", "regularizer"), 0.0),
    "optimizer": {
        "lr": (("backbone/.*", 4e-4), ("free_vectors", 5e-3), ("projection/.*", 5e-3)),
        "warmup_steps": 5,
    },
    "curriculum": {"start": None},
    "train": {"batch_size": 256, "epochs": 3, "labels": "all", "eval_every": 0, "log_every": 4},
    "eval": {
        "augmented": {"labels": 200, "label_weight": 0.8, "separate_softmax": True},
        "compare_scann": True,
    },
}
# MiniLM-L3 is here the first three layers of the packaged all-MiniLM-L6-v2: nothing to download.
_PACKAGED_L3 = {"encoder": {"backbone": "minilm-l6-packaged", "layers": 3}}

# [ours], not tuned: the same objective, and what the family needs.
_OURS_DECODER = _OURS | {
    "optimizer": {
        "lr": (("backbone/.*", 1e-4), ("free_vectors", 5e-3), ("projection/.*", 5e-3)),
        "weight_decay": (("free_vectors", 0.0), (".*", 0.01)),
        "warmup_steps": 5,
    }
}
_DEBIAN = _OURS | {"data": {"max_length": 24}}
_OUR_SETS = ("debian_3k", "debian_26k", "mm_debian_3k", "synthetic", "own", "mm_own")


def _long_texts(batch_size: int, lr: float) -> dict:
    return {"train": {"batch_size": batch_size}, "optimizer": {"lr": _lr(lr)}}


# By (family or backbone, dataset); the family's comes first.
RECIPES = {
    ("encoder", "debian_3k"): _DEBIAN,
    ("encoder", "debian_26k"): _DEBIAN | {"train": _DEBIAN["train"] | {"epochs": 2}},
    ("encoder", "mm_debian_3k"): _DEBIAN,
    # Chosen on data made with another seed.
    ("encoder", "synthetic"): _DEBIAN | {"train": _DEBIAN["train"] | {"epochs": 6}},
    ("encoder", "own"): _OURS,  # for texts of any length
    ("encoder", "mm_own"): _OURS,
    **{("decoder", dataset): _OURS_DECODER for dataset in _OUR_SETS},
    # [V] supp. A: with images; the option text_only has its own
    **{("encoder", dataset): {"train": {"epochs": 150}} for dataset in AMAZON},
    # [V] supp. A
    ("decoder", "amazontitles_1_3m"): {"train": {"epochs": 40}},
    ("decoder", "amazon_131k"): _long_texts(512, 2e-5),
    **{("minilm_l3", dataset): _PACKAGED_L3 for dataset in _OUR_SETS},
    # [V] supp. A: what fits in 80 GB at 128 tokens.
    ("distilbert", "amazon_131k"): _long_texts(1024, 1e-4),
    ("bert", "amazon_131k"): _long_texts(512, 5e-5),
}


def _reference(config: Mapping[str, Any]) -> dict:
    dataset = config["data"]["dataset"]
    if not dataset.startswith("LF-Debian"):
        raise ValueError(
            f"option reference: expected debian_3k or debian_26k, whose reference runs it repeats, "
            f"got {dataset}; the Amazon recipes are the reference's without it"
        )
    if config["encoder"]["lora"]["rank"]:
        raise ValueError("option reference: expected an encoder, as its runs had, got a decoder")
    # Back to BASE first: nothing that our own recipe for the dataset sets may remain.
    sections = ("prime", "loss", "optimizer", "curriculum", "tables", "train", "eval")
    override = copy.deepcopy({section: BASE[section] for section in sections})
    _merge(override, _REFERENCE)
    return override | {"data": {"max_length": 16}, "encoder": {"dropout": None}}


def _ngame(config: Mapping[str, Any]) -> dict:
    kept = ("backbone", "projection")
    rates = [(path, rate) for path, rate in config["optimizer"]["lr"] if path.startswith(kept)]
    decays = [pair for pair in config["optimizer"]["weight_decay"] if pair[0] != "free_vectors"]
    return {
        "prime": {"enabled": False},
        "loss": {"document_to_label": 1.0},  # our own recipe has none, and trains no label text
        "optimizer": {"lr": tuple(rates), "weight_decay": tuple(decays)},
        "train": {"labels": "sampled"},
    }


def _full(config: Mapping[str, Any]) -> dict:
    if not config["encoder"]["lora"]["rank"]:
        raise ValueError("option full: expected a decoder; encoders are trained whole without it")
    decays = (("backbone/.*norm.*", 0.0), *config["optimizer"]["weight_decay"])
    optimizer = {"trainable": ((".*", True),), "weight_decay": decays}
    return {"encoder": {"lora": {"rank": 0}}, "optimizer": optimizer}


def _images(config: Mapping[str, Any], name: str, /, **fields) -> dict:
    if not _has_images(config):
        known = [name for name, override in DATASETS.items() if "images" in override["data"]]
        raise ValueError(
            f"option {name}: expected a dataset with images, one of {', '.join(known)}, and no "
            f"option text_only before it, got {config['data']['dataset']}"
        )
    return {"data": {"images": fields}}


def _text_only(config: Mapping[str, Any]) -> dict:
    published = {DATASETS[name]["data"]["dataset"] for name in AMAZON}
    encoder = not config["encoder"]["lora"]["rank"]
    longer = encoder and config["data"]["dataset"] in published
    epochs = {"epochs": BASE["train"]["epochs"]} if longer else {}
    return {"data": {"images": {"name": None}}, "train": epochs}


def _compare(config: Mapping[str, Any]) -> dict:
    _images(config, "compare")
    different = _text_only(config)
    without = copy.deepcopy(dict(config))
    _merge(without, different)
    return {"baseline": {"name": "text only", **different, **_groups(without)}}


def _image_text(config: Mapping[str, Any]) -> dict:
    if config["fusion"]["order"] == "image_text":
        raise ValueError("option image_text: expected a decoder; encoders have images first anyway")
    # [V] Table 6 has such prompts and does not print them: the words are ours.
    prompts = {"image_prefix": "This product image", "prefix": "and its text"}
    prompts = {name: prompt for name, prompt in prompts.items() if config["fusion"][name]}
    return _images(config, "image_text") | {"fusion": {"order": "image_text", **prompts}}


def _has_images(config: Mapping[str, Any]) -> bool:
    return config["data"]["images"]["name"] is not None


def _groups(config: Mapping[str, Any]) -> dict:
    """The optimizer's groups but those of parameters that the model does not have."""
    groups = config["optimizer"]
    rates, decays, trainable = groups["lr"], groups["weight_decay"], groups["trainable"]
    if not _has_images(config):
        rates = tuple(pair for pair in rates if not pair[0].startswith("projection"))
        if not config["prime"]["enabled"] and trainable == _LORA_ONLY:  # adapters alone are left
            trainable = _LORA_ONLY[:-1]
            decays = tuple(pair for pair in decays if pair[0] != ".*bias")
    return {"optimizer": {"lr": rates, "weight_decay": decays, "trainable": trainable}}


def _no_prompt(config: Mapping[str, Any], *names: str) -> dict:
    if not any(config["fusion"][name] for name in names):
        raise ValueError(f"option no_{names[0]}: expected a decoder that has one, got none")
    return {"fusion": dict.fromkeys(names, "")}


# An option overrides fields; it is given the config made so far.
OPTIONS: dict[str, Callable[[Mapping[str, Any]], dict]] = {
    "text_only": _text_only,  # without images: [V] Table 1
    "compare": _compare,  # train on text alone first, and show both side by side
    "images_1": lambda config: _images(config, "images_1", per_item=1),  # [V] Table 10
    "images_2": lambda config: _images(config, "images_2", per_item=2),
    "images_5": lambda config: _images(  # in another folder: the usual one has three of each
        config, "images_5", name=f"{config['data']['images']['name']}-5", per_item=5
    ),
    "vit": lambda config: _images(  # [V] Tables 4, 9: MUFIN's image encoder
        config, "vit", name="vit", encoder="google/vit-base-patch16-224-in21k"
    ),
    "image_text": _image_text,  # images first in decoders: [V] Table 6
    "no_prefix": lambda config: _no_prompt(config, "prefix", "image_prefix"),  # [V] Table 6
    "no_suffix": lambda config: _no_prompt(config, "suffix"),  # [V] Table 6
    "last_token": lambda config: {"encoder": {"pooling": "last"}},  # [V] Table 11
    "reference": _reference,  # the settings of the reference runs on the Debian sets
    "full": _full,  # a decoder without adapters, trained whole; not in the paper
    "ngame": _ngame,  # PRIME off: document-to-label term alone, over sampled labels
    "margin": lambda config: {"loss": {"kind": "margin"}},
    "decoupled_softmax": lambda config: {"loss": {"kind": "decoupled_softmax"}},
    "exact": lambda config: {"tables": {"centroids": "exact"}},
    # Only the centroids of sampled labels move.
    "ema": lambda config: {"tables": {"centroids": "ema"}, "train": {"labels": "sampled"}},
    "scann": lambda config: {"eval": {"index": "scann"}},
}

NAMES = {
    # Seconds on a CPU: one layer with random weights. For tests and smoke runs.
    "tiny": (
        "minilm_l3/debian_3k",
        {
            "data": {"max_length": 8},
            "encoder": {"layers": 1, "init": "random"},
            "prime": {"free_vectors": 64, "ff_dim": 128},
            "curriculum": {"start": 0, "update_every": 1},
            "optimizer": {"warmup_steps": 2},
            "train": {"batch_size": 512, "epochs": 2, "log_every": 2},
        },
    ),
    # A minute on a CPU: a random two-layer Qwen2 through all that the paper's decoders go through
    # (adapters, prompts, chunks, sampled labels, PRIME) but the margin loss, which collapses here.
    "tiny_decoder": (
        "qwen25_0_5b/debian_3k",
        {
            "data": {"max_length": 24},
            "encoder": {
                "backbone": "tiny-qwen2-bundled",
                "compute_dtype": "float32",
                "init": "random",
                "lora": {"rank": 8, "alpha": 8.0},
            },
            "prime": {
                "combiner": "transformer",
                "free_vector_init": "cluster_mean",
                "free_vectors": 2048,
                "ff_dim": 128,
            },
            "loss": {"document_to_label": 1.0, "label_to_document": 1.0},
            "optimizer": {
                "lr": (("backbone/.*", 5e-3), ("free_vectors", 5e-3), (".*", 2e-3)),
                "weight_decay": ((".*bias", 0.0), ("free_vectors", 0.0), (".*", 0.01)),
            },
            "curriculum": {"start": 0, "update_every": 1},
            "train": {"labels": "sampled", "epochs": 4, "n_chunks": 2},
        },
    ),
    # Text alone and text with images on synthetic products, side by side: minutes on a CPU.
    "mm": ("minilm_l3/synthetic,compare", {}),
}


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant, locked.

    Args:
        variant: see the module's docstring; "" for `DEFAULT`.

    Raises:
        ValueError: a part of the variant is unknown; names the nearest one, in one line.
    """
    head, *options = (variant or DEFAULT).split(",")
    named: dict = {}
    if "/" not in head:
        _expect(variant, "name or backbone/dataset", head, [*NAMES, *_pairs()])
        head, named = NAMES.get(head, (head, {}))
    head, *named_options = head.split(",")
    backbone, _, dataset = head.partition("/")
    _expect(variant, "backbone", backbone, BACKBONES)
    _expect(variant, "dataset", dataset, DATASETS)
    config = copy.deepcopy(BASE)
    for override in (
        DATASETS[dataset],
        BACKBONES[backbone],
        RECIPES.get(("decoder" if backbone in DECODERS else "encoder", dataset), {}),
        RECIPES.get((backbone, dataset), {}),
        named,
    ):
        _merge(config, override)
    # The option compare comes last: it compares with all others applied.
    for option in sorted((*named_options, *options), key="compare".__eq__):
        _expect(variant, "option", option, OPTIONS)
        _merge(config, OPTIONS[option](config))
    _merge(config, _groups(config))
    config["name"] = (variant or DEFAULT).replace("/", "-").replace(",", "-")
    return ConfigDict(_settable(config, RunConfig)).lock()


def _settable(config: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The same with placeholders for None, which take values of the field's type from flags."""
    values = dict(config)
    for option in options(kind):
        name = option.name
        if option.section:
            values[name] = _settable(config[name], option.section)
        elif option.optional and config[name] is None:
            value_type = option.kind if option.kind in (int, float) else str
            values[name] = config_dict.placeholder(value_type)
    return values


def _pairs() -> list[str]:
    return [f"{backbone}/{dataset}" for backbone in BACKBONES for dataset in DATASETS]


def _expect(variant: str, what: str, got: str, known: Iterable[str]) -> None:
    if got not in known:
        nearest = difflib.get_close_matches(got, known, 1, 0)[0]
        raise ValueError(f"variant {variant!r}: no {what} {got!r}; did you mean {nearest!r}?")


def _merge(config: dict, override: Mapping[str, Any]) -> None:
    for key, value in override.items():
        if isinstance(value, Mapping) and key != "baseline":
            _merge(config[key], value)
        else:
            config[key] = copy.deepcopy(value)
