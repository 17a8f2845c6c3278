"""An image encoder on random weights: images per second, memory, share of matmul rate.

python -m benchmarks.vision_embed --model=so400m-384 --batch=128

Timed is what `xmc_jax.images.embed` runs on a device: pixels as bytes, which lie there already, to
vectors. A batch is computed --steps times in a row and waited for once, as a pipeline that is never
short of images would; of --repeats such times the best counts. Weights and pixels are drawn, so
that nothing is read and nothing of it means anything.

TFLOP/s counts 2 FLOPs for every multiplication of matrices that an image needs: patches, layers,
attention's own products and the pooling head. It is relative to the rate of a large product that is
timed in the same process.

--torch also times the same architecture of transformers in the same type with torch's fused
attention, on the same kind of device, in turns with ours; it needs both packages.

The results go to --out: "benchmark", "model", "settings", environment ("device", "processor",
"cores", "python", "versions", "date", "commit") and "results"; bytes, seconds, images, TFLOP/s. The
commit is git's, else that in the environment variable COMMIT.

Needs jax, flax, optax and numpy only.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks.decoder_step import matmul_rate, memory
from benchmarks.environment import environment, save
from xmc_jax.config import MeshConfig
from xmc_jax.models.vision import Vision, VisionConfig
from xmc_jax.runtime import rng, sharding

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
DTYPES = ("bfloat16", "float32")
# The published sizes: D, layers, H, F, pixels, P.
MODELS = {
    "tiny": VisionConfig("siglip", 64, 2, 4, 128, 32, 8),
    "base-224": VisionConfig("siglip", 768, 12, 12, 3072, 224, 16),
    "large-256": VisionConfig("siglip", 1024, 24, 16, 4096, 256, 16),
    "so400m-384": VisionConfig("siglip", 1152, 27, 16, 4304, 384, 14),
    "vit-base-224": VisionConfig("vit", 768, 12, 12, 3072, 224, 16, eps=1e-12, hidden_act="gelu"),
}
_FLOAT32 = ("norm", "position_embedding", "class_token")  # as `xmc_jax.images.encoders` keeps them


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a name of `MODELS`.
        batch: images per call.
        dtype: of products, and of the weights that take part in them.
        steps: calls that are timed together.
        repeats: of that.
        seed: of everything drawn.
    """

    model: str
    batch: int = 128
    dtype: str = "bfloat16"
    steps: int = 8
    repeats: int = 5
    seed: int = 0

    def __post_init__(self):
        for name in ("batch", "steps", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected one of {DTYPES}, got {self.dtype!r}")


ON_CPU = {"batch": 8, "dtype": "float32", "steps": 1, "repeats": 3}


def flops(sizes: VisionConfig) -> int:
    """FLOPs of the matrix products that one image needs.

    Args:
        sizes: of the encoder.
    """
    D, F, patches = sizes.hidden, sizes.ff, sizes.side**2
    T = patches + (sizes.family == "vit")
    total = patches * 3 * sizes.patch_size**2 * D
    total += sizes.layers * (T * (4 * D * D + 2 * D * F) + 2 * T * T * D)
    if sizes.family == "siglip":  # keys and values of all patches, all else of one query
        total += 2 * T * D * D + 2 * T * D + 2 * D * D + 2 * D * F
    return 2 * total


class Program:
    """The jitted encoder on one device, as `xmc_jax.images.encoders.ImageTower` makes it.

    Args:
        settings: what is measured.
        device: where.
    """

    def __init__(self, settings: Settings, device: jax.Device):
        self.settings, self.sizes = settings, MODELS[settings.model]
        self.mesh = sharding.make_mesh(MeshConfig(), [device])
        self.whole = sharding.replicated(self.mesh)
        model = Vision(self.sizes, jnp.dtype(settings.dtype))
        side = self.sizes.image_size
        self.pixels = jax.ShapeDtypeStruct(
            (settings.batch, side, side, 3), np.uint8, sharding=self.whole
        )

        def run(params: Any, pixels: jax.Array) -> jax.Array:
            normal = (pixels.astype(np.float32) * np.float32(1 / 255) - 0.5) / np.float32(0.5)
            return model.apply({"params": params}, normal)

        self.jitted = jax.jit(sharding.under(self.mesh, run))
        one = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        made = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), one))["params"]
        self.abstract = {}
        for path, leaf in traverse_util.flatten_dict(made, sep="/").items():
            wide = any(part in path for part in _FLOAT32)
            dtype = np.float32 if wide else jnp.dtype(settings.dtype)
            self.abstract[path] = leaf.update(dtype=dtype, sharding=self.whole)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(leaf.size for leaf in self.abstract.values())

    def compile(self) -> tuple[Any, float]:
        """The compiled encoder, and the seconds it took to trace and compile."""
        start = time.perf_counter()
        params = traverse_util.unflatten_dict(self.abstract, sep="/")
        compiled = self.jitted.lower(params, self.pixels).compile()
        return compiled, time.perf_counter() - start

    def draw(self) -> tuple[dict[str, Any], jax.Array]:
        """Parameters and pixels on the device."""

        def params() -> dict[str, jax.Array]:
            drawn = {}
            for i, (path, leaf) in enumerate(self.abstract.items()):
                if path.endswith("scale"):
                    drawn[path] = jnp.ones(leaf.shape, leaf.dtype)
                else:  # of a standard deviation of 0.02
                    key = jax.random.key(self.settings.seed + i, impl="rbg")  # compiles fast
                    drawn[path] = jax.random.uniform(key, leaf.shape, leaf.dtype, -0.035, 0.035)
            return drawn

        drawn = jax.jit(params, out_shardings=self.whole)()
        generator = rng.host(self.settings.seed, rng.Stream.SAMPLE, 0)
        pixels = generator.integers(0, 256, self.pixels.shape, np.uint8)
        return traverse_util.unflatten_dict(drawn, sep="/"), jax.device_put(pixels, self.whole)


def measure(settings: Settings, device: jax.Device, compare: bool = False) -> dict[str, Any]:
    """Compiles, draws, runs and times the encoder.

    Args:
        settings: what is measured.
        device: where.
        compare: with transformers' on torch, too.

    Raises:
        RuntimeError: a vector is not finite.
    """
    program = Program(settings, device)
    tflops = matmul_rate(device, settings.dtype)
    compiled, compile_seconds = program.compile()
    params, pixels = program.draw()
    vectors = np.asarray(compiled(params, pixels))
    if not np.isfinite(vectors).all():
        raise RuntimeError("expected finite vectors, got others")

    def ours() -> None:
        for _ in range(settings.steps):
            last = compiled(params, pixels)
        jax.block_until_ready(last)

    theirs = _torch(settings, device.platform) if compare else None
    own, other = [], []
    for _ in range(settings.repeats):
        own.append(_seconds(ours) / settings.steps)
        if theirs is not None:
            other.append(_seconds(theirs) / settings.steps)
    seconds = min(own)
    reached = settings.batch * flops(program.sizes) / seconds / 1e12
    results = {
        "parameters": program.parameters,
        "gflop_per_image": flops(program.sizes) / 1e9,
        "compile_seconds": compile_seconds,
        "batch_seconds": seconds,
        "batch_seconds_each": own,
        "images_per_second": settings.batch / seconds,
        "milliseconds_per_image": 1e3 * seconds / settings.batch,
        "tflops": reached,
        "matmul_tflops": tflops,
        "share_of_matmul_rate": reached / tflops,
        "memory": memory(compiled, device),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if other:
        results |= {
            "torch_batch_seconds": min(other),
            "torch_batch_seconds_each": other,
            "torch_images_per_second": settings.batch / min(other),
            "times_torch": min(other) / seconds,
        }
    return results


def _torch(settings: Settings, platform: str) -> Callable[[], None]:
    """The same sizes in transformers, ready to be timed; bytes are normalised there, too."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

    sizes = MODELS[settings.model]
    siglip = sizes.family == "siglip"
    config = (SiglipVisionConfig if siglip else ViTConfig)(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.ff,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        layer_norm_eps=sizes.eps,
        hidden_act=sizes.hidden_act,
        attn_implementation="sdpa",
    )
    dtype = getattr(torch, settings.dtype)
    where = "cpu" if platform == "cpu" else "cuda"
    torch.manual_seed(settings.seed)
    model = (SiglipVisionModel if siglip else ViTModel)(config).eval().to(where, dtype)
    shape = (settings.batch, 3, sizes.image_size, sizes.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=where)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(settings.steps):
            normal = (pixels.float() / 255 - 0.5) / 0.5
            model(pixel_values=normal.to(dtype))
        if where == "cuda":
            torch.cuda.synchronize()

    run()
    return run


def lines(results: dict[str, Any]) -> list[str]:
    """The results as they are printed, one figure a line.

    Args:
        results: of `measure`.
    """
    each = " ".join(f"{seconds:.4f}" for seconds in results["batch_seconds_each"])
    found = {
        "parameters": f"{results['parameters']:,}",
        "products": f"{results['gflop_per_image']:,.1f} GFLOP per image",
        "compilation": f"{results['compile_seconds']:.1f} s",
        "batch": f"{results['batch_seconds']:.4f} s, best of {each}",
        "images": f"{results['images_per_second']:,.1f} /s",
        "an image": f"{results['milliseconds_per_image']:.3f} ms",
        "rate": f"{results['tflops']:.4g} TFLOP/s, {100 * results['share_of_matmul_rate']:.1f} % "
        f"of a large product's {results['matmul_tflops']:.4g}",
    }
    sizes = results["memory"] | {"peak in use": results["peak_bytes"]}
    found |= {f"memory, {name}": f"{n / 1e9:.3f} GB" for name, n in sizes.items() if n is not None}
    if "times_torch" in results:
        each = " ".join(f"{seconds:.4f}" for seconds in results["torch_batch_seconds_each"])
        found["torch, batch"] = f"{results['torch_batch_seconds']:.4f} s, best of {each}"
        found["torch, images"] = f"{results['torch_images_per_second']:,.1f} /s"
        found["times torch"] = f"{results['times_torch']:.2f}"
    return [f"{name:<28}{value}" for name, value in found.items()]


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; exits with a message if it is mistaken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=MODELS, help="default: tiny on CPU, else so400m-384")
    for field in dataclasses.fields(Settings)[1:]:
        shown = f"default {field.default}"
        if field.name in ON_CPU:
            shown += f"; on CPU: {ON_CPU[field.name]}"
        parser.add_argument(f"--{field.name}", type=type(field.default), help=shown)
    parser.add_argument("--torch", action="store_true", help="time transformers' on torch, too")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    chosen = dict(ON_CPU) if on_cpu else {}
    chosen |= {
        field.name: value
        for field in dataclasses.fields(Settings)[1:]
        if (value := getattr(arguments, field.name)) is not None
    }
    try:
        settings = Settings(arguments.model or ("tiny" if on_cpu else "so400m-384"), **chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure(settings, device, arguments.torch)
    packages = PACKAGES + (("torch", "transformers") if arguments.torch else ())
    content = {
        "benchmark": "vision_embed",
        "model": settings.model,
        "settings": dataclasses.asdict(settings)
        | {"sizes": dataclasses.asdict(MODELS[settings.model])},
        "device": {"platform": device.platform, "kind": device.device_kind, "count": 1},
        **environment(packages),
        "results": results,
    }
    print(f"\n{settings.model}, {device.device_kind}, {settings}\n")
    print("\n".join(lines(results)))
    kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower())
    name = f"vision_embed_{settings.model}_{kind}.json"
    out = arguments.out or pathlib.Path(__file__).parent / "results" / name
    save(out, content)
    return content


if __name__ == "__main__":
    main()
