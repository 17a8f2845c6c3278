"""The language models of docs/models.md: their published config.json gives their published size."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from xmc_jax.models import backbone, decoder, decoder_config

FOLDER = pathlib.Path(__file__).parent / "published"
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "models.md"


@dataclasses.dataclass(frozen=True)
class Published:
    """Parameters of a model: of its text tower (embedding, layers, final norm), and as published.

    Attributes:
        tower: what is loaded.
        total: of the weights on the hub, as the model's card says.
        besides: what else the total counts.
    """

    tower: int
    total: int
    besides: dict[str, int] = dataclasses.field(default_factory=dict)


PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": Published(494_032_768, 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": Published(1_543_714_304, 1_543_714_304),
    "Qwen/Qwen2.5-3B-Instruct": Published(3_085_938_688, 3_085_938_688),
    "Qwen/Qwen2.5-7B-Instruct": Published(7_070_619_136, 7_615_616_512, {"head": 152_064 * 3_584}),
    # Its file holds the tied head too, so that the card counts the embedding twice.
    "Qwen/Qwen3-0.6B": Published(596_049_920, 751_632_384, {"tied head": 151_936 * 1_024}),
    "Qwen/Qwen3-4B": Published(4_022_468_096, 4_022_468_096),
    "Qwen/Qwen3-Embedding-4B": Published(4_021_774_336, 4_021_774_336),
    "meta-llama/Llama-3.2-1B-Instruct": Published(1_235_814_400, 1_235_814_400),
    "meta-llama/Llama-3.2-3B-Instruct": Published(3_212_749_824, 3_212_749_824),
    "google/gemma-3-1b-it": Published(999_885_952, 999_885_952),
    "google/gemma-3-4b-it": Published(
        3_880_263_168, 4_300_079_472, {"vision tower": 416_866_032, "projector": 2_950_272}
    ),
}
MODELS = pytest.mark.parametrize("name", PUBLISHED)


def published(name: str) -> dict:
    path = FOLDER / f"{name.rsplit('/')[-1].lower()}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def rows() -> dict[str, list[str]]:
    """The tables of docs/models.md: their other cells, by the first of each row."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_every_file_is_of_a_model_here():
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files == {name.split("/")[1].lower() for name in PUBLISHED}


@MODELS
def test_tower_has_the_published_parameters(name):
    config = backbone.from_hf(published(name))
    zeros = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(
        lambda: decoder.Decoder(config).init(jax.random.key(0), zeros, zeros, zeros)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = PUBLISHED[name]
    assert count == expected.tower
    assert count + sum(expected.besides.values()) == expected.total


@MODELS
def test_table_of_the_docs(name):
    config, expected = backbone.from_hf(published(name)), PUBLISHED[name]
    family, count, width, heads, ff, vocabulary, tower, total, besides, _ = rows()[name]
    assert family == config.family
    assert number(count) == config.layers
    assert number(width) == config.hidden
    assert heads == f"{config.heads}/{config.kv_heads} × {config.head_dim}"
    assert number(ff) == config.ff
    assert number(vocabulary) == config.vocab_size
    assert (number(tower), number(total)) == (expected.tower, expected.total)
    parts = [f"{part} {size:,}" for part, size in expected.besides.items()]
    assert besides == (", ".join(parts) or "–")


def test_tables_of_the_docs_are_complete():
    assert {first for first in rows() if "/" in first} == set(PUBLISHED)
    model_types = {first.strip("`") for first in rows() if first.startswith("`")}
    assert model_types - {"model_type"} == {
        kind for family in backbone.FAMILIES.values() for kind in family.model_types
    }


@MODELS
def test_to_hf_is_read_back(name):
    config = backbone.from_hf(published(name))
    # as it is written to a file, so that tuples become lists
    assert backbone.from_hf(json.loads(json.dumps(backbone.to_hf(config)))) == config


def expected_fields(name: str) -> dict:
    """What a config.json says beyond sizes, by our names, written down by hand."""
    qwen = {"bos_id": 151_643, "eos_id": 151_645, "rope_theta": 1e6, "eps": 1e-6}
    llama3 = decoder_config.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    llama = {
        "bos_id": 128_000,
        "eos_id": (128_001, 128_008, 128_009),
        "rope_theta": 5e5,
        "rope": llama3,
        "eps": 1e-5,
        "max_positions": 131_072,
    }
    gemma = {
        "rope_theta": 1e6,
        "local_rope_theta": 1e4,
        "hidden_act": "gelu_pytorch_tanh",
        "query_width": 256,
        "norm_offset": 1.0,
        "post_norms": True,
        "qk_norm": True,
        "pad_id": 0,
        "bos_id": 2,
        "eps": 1e-6,
    }
    if name.startswith("Qwen/Qwen2.5-"):
        # sliding_window is stated, but not used
        tied = name != "Qwen/Qwen2.5-7B-Instruct"
        return qwen | {"qkv_bias": True, "max_positions": 32_768, "tied": tied}
    if name.startswith("Qwen/Qwen3-"):
        return qwen | {"qk_norm": True, "max_positions": 40_960}
    if name.startswith("meta-llama/"):
        return llama
    if name == "google/gemma-3-1b-it":
        return gemma | {
            "sliding": tuple(layer not in (5, 11, 17, 23) for layer in range(26)),
            "window": 512,
            "embedding_scale": math.sqrt(1152),
            "max_positions": 32_768,
            "eos_id": (1, 106),
        }
    assert name == "google/gemma-3-4b-it"
    return gemma | {
        "sliding": tuple(layer not in (5, 11, 17, 23, 29) for layer in range(34)),
        "window": 1024,
        "rope": decoder_config.RopeScaling("linear", 8.0),
        "embedding_scale": math.sqrt(2560),
        "max_positions": 131_072,
        "eos_id": 1,
    }


@MODELS
def test_every_field_comes_through(name):
    config = backbone.from_hf(published(name))
    sizes = ("family", "vocab_size", "hidden", "layers", "heads", "kv_heads", "head_dim", "ff")
    kept = {field: getattr(config, field) for field in sizes}
    # Sizes are those of the docs; every other field is as stated here, or its default.
    assert config == decoder_config.DecoderConfig(**kept, **expected_fields(name))
