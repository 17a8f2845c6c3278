"""Image encoders and image processors against torch transformers, on fresh random weights."""

import functools
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.images.odd_images import IMAGES, SATURATED
from xmc_jax.images import decoding, preprocessing
from xmc_jax.models import backbone, hf, hf_weights, vision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make = pytest.importorskip("tests.golden.make")

PUBLISHED = pathlib.Path(__file__).parents[1] / "models" / "published" / "vision"
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 60,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# As published: of SigLIP with both towers. 30 pixels are no whole patches of 7, as so400m's 384 are
# none of 14.
MODELS = {
    "siglip": {"model_type": "siglip", "vision_config": SIZES, "text_config": TEXT},
    "siglip2": {
        "model_type": "siglip",
        "vision_config": SIZES | {"image_size": 30, "patch_size": 7},
        "text_config": TEXT | {"projection_size": 24, "vocab_size": 90},
    },
    "siglip alone": {"model_type": "siglip_vision_model", **SIZES},
    "vit": {"model_type": "vit", **SIZES},
    "vit without biases": {"model_type": "vit", **SIZES, "qkv_bias": False},
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def tiny(name: str, seed: int, auto=transformers.AutoModel) -> torch.nn.Module:
    """A tiny random model whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    model = auto.from_config(transformers.AutoConfig.for_model(**MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def load(folder: pathlib.Path):
    source = hf.resolve(str(folder))
    config = hf.load_vision_config(source)
    return config, hf_weights.load_params(source, config)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def encode(config, dtype, params, pixels):
    return vision.Vision(config, dtype).apply({"params": params}, pixels, True)


def pixels_of(config, seed: int, n: int = 6) -> np.ndarray:
    shape = (n, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def theirs(model: torch.nn.Module, pixels: np.ndarray):
    """The output of a tower in transformers, with its hidden states."""
    with torch.no_grad():
        tower = getattr(model, "vision_model", getattr(model, "vit", model))
        channels_first = torch.tensor(pixels.transpose(0, 3, 1, 2))
        return tower(pixel_values=channels_first, output_hidden_states=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_and_the_pooled_vector(name, tmp_path):
    for seed in (1, 2, 3):  # compiled once
        model = tiny(name, seed)
        model.save_pretrained(tmp_path)
        config, params = load(tmp_path)
        pixels = pixels_of(config, seed)
        pooled, states = encode(config, jnp.float32, params, pixels)
        out = theirs(model, pixels)
        assert len(out.hidden_states) == len(states)
        for layer, (one, other) in enumerate(zip(states, out.hidden_states)):
            np.testing.assert_allclose(
                one, other, rtol=0, atol=2e-5, err_msg=f"after layer {layer}"
            )
        expected = (
            out.last_hidden_state[:, 0] if config.family == "vit" else out.pooler_output
        ).numpy()
        np.testing.assert_allclose(pooled, expected, rtol=0, atol=2e-5)
        half, _ = encode(config, jnp.bfloat16, params, pixels)
        norms = np.linalg.norm(half, axis=-1) * np.linalg.norm(expected, axis=-1)
        assert ((half * expected).sum(-1) > 0.999 * norms).all()


def test_pooled_vector_is_what_get_image_features_gives(tmp_path):
    model = tiny("siglip2", 4)
    model.save_pretrained(tmp_path)
    config, params = load(tmp_path)
    pixels = pixels_of(config, 4)
    with torch.no_grad():
        features = model.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    features = getattr(features, "pooler_output", features)  # transformers 5 wraps it
    pooled, _ = encode(config, jnp.float32, params, pixels)
    np.testing.assert_allclose(pooled, features, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_published_config_is_the_one_of_transformers(name):
    written = transformers.AutoConfig.for_model(**MODELS[name]).to_json_string(use_diff=False)
    assert backbone.images_from_hf(MODELS[name]) == backbone.images_from_hf(json.loads(written))


@pytest.mark.parametrize("name", ["siglip2", "vit"])
def test_classifiers_and_shards_give_what_the_bare_model_gives(name, tmp_path):
    whole = tiny(name, 5, transformers.AutoModelForImageClassification)
    whole.save_pretrained(tmp_path, max_shard_size="16KB")
    assert (tmp_path / hf.INDEX).is_file()
    config, params = load(tmp_path)
    pixels = pixels_of(config, 5)
    pooled, _ = encode(config, jnp.float32, params, pixels)
    out = theirs(whole, pixels)
    expected = out.last_hidden_state[:, 0] if name == "vit" else out.pooler_output
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=2e-5)


CONFIGS = [path for path in sorted(PUBLISHED.glob("*.json")) if "preproc" not in path.name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_towers_are_as_large_as_those_of_torch(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**raw))
    config = backbone.images_from_hf(raw)
    theirs = getattr(model, "vision_model", model).named_parameters()
    shape = (1, config.image_size, config.image_size, 3)
    made = jax.eval_shape(lambda: vision.Vision(config).init(jax.random.key(0), jnp.zeros(shape)))
    count = sum(leaf.size for leaf in jax.tree.leaves(made))
    assert count == sum(p.numel() for name, p in theirs if not name.startswith("pooler."))


def processor_of(raw: dict):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    siglip = "Siglip" in raw.get("image_processor_type", "")
    fields = {name: value for name, value in raw.items() if name != "image_processor_type"}
    return (SiglipImageProcessorPil if siglip else ViTImageProcessorPil).from_dict(fields)


def opened(name: str) -> Image.Image:
    """As transformers opens a file; 16 bits of grey, which it saturates, as the upper 8."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(IMAGES[name])))
    if name in SATURATED:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


@pytest.mark.parametrize(
    "path", sorted(PUBLISHED.glob("*.preprocessor.json")), ids=lambda p: p.stem
)
def test_pixels_are_those_of_the_processor(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = preprocessing.from_hf(raw), processor_of(raw)
    for name in IMAGES:
        out = theirs(images=opened(name), do_convert_rgb=True, return_tensors="np")
        expected = out["pixel_values"][0].transpose(1, 2, 0)
        pixels = ours(decoding.decode(IMAGES[name]))
        assert pixels.shape == expected.shape and pixels.dtype == expected.dtype == np.float32
        # normalised, so that a level is 2/255: they are the same
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", [name for name in IMAGES if name not in SATURATED])
def test_alpha_dropped_is_what_load_image_gives(name):
    theirs = transformers.image_utils.load_image(Image.open(io.BytesIO(IMAGES[name])))
    np.testing.assert_array_equal(decoding.decode(IMAGES[name], alpha="drop"), theirs)


def test_processor_as_transformers_writes_it(tmp_path):
    raw = json.loads((PUBLISHED / "siglip2-base-patch16-224.preprocessor.json").read_text())
    processor_of(raw).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessing.from_hf(written) == preprocessing.from_hf(raw)
