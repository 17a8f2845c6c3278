"""Where parameters lie: all families and all published models, on meshes of all kinds."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from xmc_jax.config import LoraConfig, PrimeConfig
from xmc_jax.models import backbone, dual, vision
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.runtime import sharding

PUBLISHED = pathlib.Path(__file__).parent / "models" / "published"
ENCODERS = {
    "minilm": BertConfig(hidden=384, layers=6, ff=1536),
    "distilbert": BertConfig(family="distilbert", layers=6, type_vocab=0),
    "bert": BertConfig(),
}
DECODERS = tuple(path.stem for path in sorted(PUBLISHED.glob("*.json")))
# What stands in the way, one after the other, by model and size of the axis `tensor`.
IN_THE_WAY = {
    ("qwen2.5-0.5b-instruct", 4): (("kv", 2), ("heads", 14)),
    ("qwen2.5-0.5b-instruct", 8): (("kv", 2), ("heads", 14)),
    ("qwen2.5-1.5b-instruct", 4): (("kv", 2),),
    ("qwen2.5-1.5b-instruct", 8): (("kv", 2), ("heads", 12)),
    ("qwen2.5-3b-instruct", 4): (("kv", 2),),
    ("qwen2.5-3b-instruct", 8): (("kv", 2),),
    ("qwen2.5-7b-instruct", 8): (("kv", 4), ("heads", 28)),
    ("gemma-3-1b-it", 4): (("kv", 1),),
    ("gemma-3-1b-it", 8): (("kv", 1), ("heads", 4)),
    ("gemma-3-4b-it", 8): (("kv", 4),),
    **{(name, 8): (("heads", 12),) for name in ENCODERS},
}


def mesh_of(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, sharding.AXES)


def tiny(**fields) -> dual.DualEncoder:
    sizes = {"heads": 8, "kv_heads": 2, "head_dim": 4, "ff": 64} | fields
    return dual.DualEncoder(
        DecoderConfig("qwen2", vocab_size=50, hidden=32, layers=2, qkv_bias=True, **sizes),
        lora=LoraConfig(rank=4),
        image_width=5,
        prime=PrimeConfig(heads=8, ff_dim=16),
        num_free_vectors=7,
    )


def abstract(model: dual.DualEncoder):
    return jax.eval_shape(lambda: dual.init_params(model, 0))


@functools.cache
def published(name: str):
    """Parameters as they are trained, with images and PRIME; of decoders, with adapters."""
    if name in ENCODERS:
        sizes, lora = ENCODERS[name], LoraConfig()
    else:
        raw = (PUBLISHED / f"{name}.json").read_text(encoding="utf-8")
        sizes, lora = backbone.from_hf(json.loads(raw)), LoraConfig(rank=256)
    return abstract(
        dual.DualEncoder(
            sizes, lora=lora, image_width=1152, prime=PrimeConfig(), num_free_vectors=65536
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 16, 1), (4, 4, 1), (2, 2, 4), (1, 2, 8)], ids=str)
@pytest.mark.parametrize("name", (*ENCODERS, *DECODERS))
def test_published_models_divide_or_say_what_does_not(name, sizes):
    boxed, mesh, replicate = published(name), mesh_of(*sizes), ()
    for axis, heads in IN_THE_WAY.get((name, sizes[2]), ()):
        with pytest.raises(
            ValueError,
            match=rf"sharding: backbone/layers/\w+/\w+ \(.*\): axis '{axis}' of {heads} heads does "
            rf"not divide into the {sizes[2]} shards of mesh axes \('tensor',\); choose a mesh .*, "
            rf"or --config\.mesh\.replicate=\"\('{axis}',\)\"",
        ) as refused:
            sharding.of_params(boxed, mesh, replicate)
        assert "\n" not in str(refused.value)
        replicate += (axis,)
    split = jax.tree_util.tree_leaves_with_path(sharding.of_params(boxed, mesh, replicate))
    for (path, where), leaf in zip(split, jax.tree.leaves(meta.unbox(boxed)), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shards = leaf.size // math.prod(where.shard_shape(leaf.shape))
        if name.endswith(("token_embedding", "up/kernel", "down/kernel")):
            assert shards == sizes[1] * sizes[2], name
        elif name.endswith(("lora_a", "lora_b")):
            assert shards % sizes[1] == 0, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(PUBLISHED.glob("vision/*[0-9k].json")), ids=lambda p: p.stem
)
def test_published_image_encoders_divide(path):
    config = backbone.images_from_hf(json.loads(path.read_text(encoding="utf-8")))
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    boxed = jax.eval_shape(vision.Vision(config).init, jax.random.key(0), images)["params"]
    for sizes in ((1, 16, 1), (4, 4, 1), (2, 2, 4)):
        kernel = sharding.of_params(boxed, mesh_of(*sizes))["layers"]["up"]["kernel"]
        assert kernel.spec == P(
            None, *(axes if n > 1 else None for axes, n in zip((("fsdp",), ("tensor",)), sizes[1:]))
        )


def test_heads_are_never_cut():
    """Two heads 4 wide are 8 columns, which 4 would divide."""
    boxed = abstract(tiny())
    with pytest.raises(
        ValueError, match=r"layers/key/bias \(2, 8\): axis 'kv' of 2 heads does not"
    ):
        sharding.of_params(boxed, mesh_of(1, 1, 4))
    with pytest.raises(
        ValueError, match=r"layers/out/kernel \(2, 24, 32\): axis 'heads' of 6 heads"
    ):
        sharding.of_params(abstract(tiny(heads=6)), mesh_of(1, 1, 4), ("kv",))


def test_a_name_may_be_replicated():
    boxed, mesh = abstract(tiny()), mesh_of(1, 2, 4)
    stack = sharding.of_params(boxed, mesh, ("kv",))["backbone"]["layers"]
    assert stack["key"]["kernel"].spec == P(None, ("fsdp",), None)
    assert stack["value"]["lora_b"].spec == P(None, ("fsdp",), None)
    assert stack["query"]["kernel"].spec == P(None, ("fsdp",), ("tensor",))
    both = sharding.of_params(boxed, mesh, ("kv", "embed"))["backbone"]["layers"]
    assert both["query"]["kernel"].spec == P(None, None, ("tensor",))


def test_an_axis_that_does_not_divide_is_an_error_naming_the_parameter():
    with pytest.raises(
        ValueError,
        match=r"backbone/layers/down/kernel \(2, 66, 32\): axis 'mlp' of size 66 does not",
    ):
        sharding.of_params(abstract(tiny(ff=66)), mesh_of(1, 1, 4), ("kv",))
    with pytest.raises(ValueError, match=r"combiner/\w+/\w+ .*: axis '\w+' of .* does not divide"):
        sharding.of_params(abstract(tiny(heads=16, kv_heads=16)), mesh_of(1, 1, 16))


def test_tables_are_split_by_as_many_devices_as_divide_their_width():
    for sizes, width, shards in (((4, 2, 1), 16, 8), ((4, 2, 1), 12, 4), ((3, 2, 1), 8, 2)):
        where = sharding.named((None, "table_width"), (7, width), mesh_of(*sizes), "bank")
        assert where.shard_shape((7, width)) == (7, width // shards)
