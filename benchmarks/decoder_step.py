"""One training step of a decoder with LoRA, on random weights: time, memory, share of matmul rate.

python -m benchmarks.decoder_step --model=qwen2.5-3b --batch=2048 --length=32 --chunks=16

The step is that of training: documents and sampled labels through the tower in chunks, prototypes,
the four-part loss, AdamW over adapters, combiner and free vectors, the write to the document bank.
Weights, texts and tables are drawn, so that nothing is read and nothing of it means anything.

MFU counts what training needs: 4 FLOPs per token and matmul parameter of the frozen layers
(forward, and the gradient of activations), 6 per token and LoRA parameter; real tokens, prompts
included. The embedding table, attention's own products, combiner, similarities, padding and what is
computed again in the backward pass do not count. It is relative to the rate of a large product that
is timed in the same process.

--compile_only allocates nothing and prints the memory that the compiled step asks for; with
--topology=v5p:2x2x1 that of one chip of a TPU, which needs the package libtpu and no TPU.

The results go to --out: "benchmark", "model", "settings", environment ("device", "processor",
"cores", "python", "versions", "date", "commit") and "results"; bytes, seconds, tokens, TFLOP/s. The
commit is git's, else that in the environment variable COMMIT.

Needs jax, flax, optax and numpy only.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from benchmarks import decoder_peer
from benchmarks.decoder_workload import (
    CHOSEN,
    EPOCHS,
    MODELS,
    DrawnBatch,
    Settings,
    batch_of,
    real_tokens,
)
from benchmarks.environment import environment, save
from xmc_jax.config import (
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PrimeConfig,
    TablesConfig,
)
from xmc_jax.data import rows as row_layout
from xmc_jax.data.types import Batch, Inputs
from xmc_jax.models import backbone, dual
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.runtime import rng, sharding
from xmc_jax.training import optimizer
from xmc_jax.training.state import Tables, TrainState
from xmc_jax.training.step import Step

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
WARM_UP = 2  # steps before those that are timed
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event of a compilation


class Program:
    """The training step on one device, as `xmc_jax.training.program` makes it, without a dataset.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        device: where it runs, or is compiled for.

    Attributes:
        layout: how items become rows.
        rows: of a chunk; as many as any batch that is timed needs.
        abstract: the TrainState as ShapeDtypeStructs with shardings.
        frozen: the base likewise.
    """

    def __init__(self, settings: Settings, sizes: DecoderConfig, device: jax.Device):
        s = self.settings = settings
        self.mesh = sharding.make_mesh(MeshConfig(data=1), [device])
        self.model = dual.DualEncoder(
            sizes=sizes,
            compute_dtype=s.dtype,
            remat=s.remat,
            lora=LoraConfig(rank=s.lora_rank, alpha=256.0),
            image_width=s.image_width if s.images else 0,
            prime=PrimeConfig(
                heads=s.combiner_heads, ff_dim=s.combiner_ff, dropout=s.combiner_dropout
            ),
            num_free_vectors=s.free_vectors,
        )
        multiple = None if s.padded else sharding.row_multiple(self.mesh)
        self.layout = row_layout.layout(
            *(s.prompts, "text_image", "contiguous", s.length, s.images, multiple)
        )
        self.rows = max(
            self._fitted(batch_of(s, sizes, step))[1].rows for step in range(WARM_UP + s.steps)
        )
        config = OptimizerConfig(
            lr=(("backbone/.*", 5e-5), (".*", 5e-4)),
            trainable=((".*/lora_[ab]", True), ("backbone/.*", False), (".*", True)),
            weight_decay=((".*", 0.01),),
            clip_norm=1.0,
        )
        boxed = jax.eval_shape(lambda: dual.init_params(self.model, s.seed))
        params = jax.tree.map(
            lambda leaf, split: leaf.update(sharding=split),
            meta.unbox(boxed),
            sharding.of_params(boxed, self.mesh),
        )
        trainable, frozen = optimizer.partition(params, config.trainable)
        self.frozen = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), frozen)
        self.step = Step(
            model=self.model,
            transform=optimizer.build(config, trainable, EPOCHS * math.ceil(s.documents / s.batch)),
            loss=LossConfig(),
            tables=TablesConfig(),
            n_chunks=s.chunks,
            seed=s.seed,
        )
        self.abstract = self._whole(jax.eval_shape(self._state, trainable))
        self.jitted = jax.jit(
            sharding.under(self.mesh, self.step.train),
            donate_argnums=0,
            out_shardings=(
                jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
                sharding.replicated(self.mesh),
            ),
        )

    def compile(self) -> tuple[Any, float]:
        """The compiled step, and the seconds it took to trace and compile."""
        batch = self.batch(batch_of(self.settings, self.model.sizes, 0))
        batch = self._whole(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch))
        start = time.perf_counter()
        compiled = self.jitted.lower(self.abstract, self.frozen, batch).compile()
        return compiled, time.perf_counter() - start

    def draw(self) -> tuple[TrainState, Any]:
        """State and base on the device, each array in its own type from the start."""
        flat = traverse_util.flatten_dict(self.frozen, sep="/")
        frozen = {}
        for i, (path, leaf) in enumerate(flat.items()):
            key = jax.random.fold_in(rng.key(self.settings.seed, rng.Stream.INIT, 0), i)
            draw = functools.partial(_draw_frozen, path, leaf, self.model.sizes.norm_offset)
            frozen[path] = jax.jit(draw, out_shardings=leaf.sharding)(key)

        def state() -> TrainState:
            params = meta.unbox(dual.init_params(self.model, self.settings.seed))
            every = traverse_util.flatten_dict(params, sep="/")
            wanted = traverse_util.flatten_dict(self.abstract.params, sep="/")
            kept = {path: every[path] for path in wanted}  # XLA draws only these
            return self._state(traverse_util.unflatten_dict(kept, sep="/"))

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return (
            jax.jit(state, out_shardings=shardings)(),
            traverse_util.unflatten_dict(frozen, sep="/"),
        )

    def batch(self, drawn: DrawnBatch) -> Batch:
        """A batch as the step takes it: each document next to its label, in the chunk it is in."""
        s = self.settings
        items, fitted = self._fitted(drawn)
        slots = s.batch, 2
        return Batch(
            items=row_layout.compose(
                *(self.layout, items, fitted, self.rows, None, slots, s.chunks, s.chunks)
            ),
            document_ids=drawn.document_ids,
            label_ids=drawn.label_ids,
            columns=np.arange(s.batch, dtype=np.int32),
            relevance=drawn.relevance,
        )

    def put(self, drawn: DrawnBatch) -> Batch:
        """Hands a batch over to the device."""
        batch = self.batch(drawn)
        return jax.device_put(batch, sharding.of_batch(batch, self.mesh))

    def _fitted(self, drawn: DrawnBatch) -> tuple[Inputs, row_layout.Fit]:
        """The items of a batch, and where they lie."""
        s = self.settings
        items = jax.tree.map(
            lambda *sides: np.stack(sides, axis=1).reshape(-1, *sides[0].shape[1:]),
            *(drawn.document, drawn.label),
        )
        chunk = np.repeat(np.arange(s.batch) % s.chunks, 2)
        return items, row_layout.fit(self.layout, self.layout.own_tokens(items), chunk)

    @property
    def positions(self) -> int:
        """Places that a step computes, whether a token is there or not."""
        return self.settings.chunks * self.rows * self.layout.width

    def parameters(self) -> dict[str, int]:
        """Parameters by what the step does with them."""
        frozen = traverse_util.flatten_dict(self.frozen, sep="/")
        trainable = traverse_util.flatten_dict(self.abstract.params, sep="/")

        def count(params: dict[str, Any], pattern: str) -> int:
            return sum(leaf.size for path, leaf in params.items() if re.fullmatch(pattern, path))

        return {
            "frozen": count(frozen, ".*"),
            "frozen_matmul": count(frozen, "backbone/layers/.*/kernel"),
            "frozen_embedding": count(frozen, "backbone/token_embedding"),
            "lora": count(trainable, ".*/lora_[ab]"),
            "trainable": count(trainable, ".*"),
        }

    def _state(self, params: Any) -> TrainState:
        s, width = self.settings, self.model.sizes.hidden
        centroids = jax.random.normal(rng.key(s.seed, rng.Stream.KMEANS, 0), (s.labels, width))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            boundaries=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.step.transform.init(params),
            tables=Tables(
                document_bank=jnp.zeros((s.documents, width)),  # is written to, not read
                centroids=centroids * width**-0.5,
                label_bank=None,
                free_vector_of=jnp.arange(s.labels, dtype=jnp.int32) % s.free_vectors,
                leaf_order=jnp.arange(s.documents, dtype=jnp.int32),
            ),
        )

    def _whole(self, tree: Any) -> Any:
        # One device holds everything whole.
        split = sharding.replicated(self.mesh)
        return jax.tree.map(lambda leaf: leaf.update(sharding=split), tree)


def _draw_frozen(
    path: str, leaf: jax.ShapeDtypeStruct, norm_offset: float, key: jax.Array
) -> jax.Array:
    """One array of the base; layer by layer, so that nothing wider than it is ever whole."""
    shape, dtype = leaf.shape, leaf.dtype
    if path.endswith("/scale"):
        return jnp.full(shape, 1 - norm_offset, dtype)
    if path.endswith("/bias"):
        return jnp.zeros(shape, dtype)

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)

    if not path.startswith("backbone/layers/"):
        return normal(key, shape)
    return jax.lax.map(lambda key: normal(key, shape[1:]), jax.random.split(key, shape[0]))


def matmul_rate(device: jax.Device, dtype: str) -> float:
    """TFLOP/s of the product of two square matrices, the best of several.

    Args:
        device: where.
        dtype: of the matrices.
    """
    size, products = (1024, 4) if device.platform == "cpu" else (8192, 16)
    a, b = (
        jax.device_put(jax.random.normal(jax.random.key(i), (size, size), dtype), device)
        for i in range(2)
    )
    b *= jnp.asarray(size**-0.5, dtype)

    @jax.jit
    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: x @ b, a)

    jax.block_until_ready(chain(a, b))
    best = min(_seconds(lambda: jax.block_until_ready(chain(a, b))) for _ in range(6))
    return products * 2 * size**3 / best / 1e12


def flops(parameters: dict[str, int], tokens: float) -> float:
    """FLOPs that a step needs; see the module for what counts.

    Args:
        parameters: of `Program.parameters`.
        tokens: real ones per step.
    """
    return (4 * parameters["frozen_matmul"] + 6 * parameters["lora"]) * tokens


def memory(compiled: Any, device: jax.Device) -> dict[str, int | None]:
    """Bytes that a compiled step asks for. Donated outputs are in the arguments' place (aliased).

    Args:
        compiled: of `Program.compile`.
        device: what it is compiled for.

    Returns:
        `total` adds the others up, which on TPU counts some temporary bytes twice; `peak` is XLA's
        own figure of what is alive at one time, None on CPU, where it leaves temporary bytes out.
    """
    analysis = compiled.memory_analysis()
    found = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    beside = found["outputs"] - found["aliased"]
    found["total"] = found["arguments"] + beside + found["temporary"] + found["code"]
    return found | {
        "peak": None if device.platform == "cpu" else analysis.peak_memory_in_bytes or None
    }


def measure(
    program: Program, device: jax.Device, after: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """Compiles, draws, runs and times the step.

    Args:
        program: what runs.
        device: where.
        after: called after each step with its number, outside the time that counts.

    Raises:
        RuntimeError: a loss is not finite, or something was compiled while steps were timed.
    """
    s, sizes = program.settings, program.model.sizes
    tflops = matmul_rate(device, s.dtype)
    compiled, compile_seconds = program.compile()
    state, frozen = program.draw()
    seconds, reported, tokens = [], [], []
    with _compilations() as compilations:
        for step in range(WARM_UP + s.steps):
            if step == WARM_UP:
                compilations.clear()
            host = batch_of(s, sizes, step)
            batch = jax.block_until_ready(program.put(host))
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
            seconds.append(time.perf_counter() - start)
            del metrics["health"]
            reported.append({name: float(value) for name, value in metrics.items()})
            tokens.append(real_tokens(host, s.prompts))
            if not math.isfinite(reported[-1]["loss"]):
                raise RuntimeError(f"step {step}: expected a finite loss, got {reported[-1]}")
            after(step)
    if compilations:
        raise RuntimeError(
            f"expected no compilation after {WARM_UP} steps, got {len(compilations)}; a shape, a "
            "type or a sharding changes from step to step"
        )
    timed, tokens = seconds[WARM_UP:], tokens[WARM_UP:]
    step_seconds, mean_tokens = statistics.median(timed), statistics.mean(tokens)
    parameters = program.parameters()
    needed = flops(parameters, mean_tokens)
    return {
        "parameters": parameters,
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "step_seconds_each": timed,
        "pairs_per_second": s.batch / step_seconds,
        "tokens_per_step": mean_tokens,
        "flops_per_step": needed,
        "positions_per_step": program.positions,
        "matmul_tflops": tflops,
        "mfu": needed / step_seconds / (tflops * 1e12),
        "memory": memory(compiled, device),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "loss_each": [metrics["loss"] for metrics in reported],
        "metrics": reported[-1],
    }


def beside_torch(
    program: Program, device: jax.Device, apart: bool, checkpointing: bool
) -> dict[str, Any]:
    """`measure` with torch's steps of the same batches, as results "torch".

    Args:
        program: what runs.
        device: where; torch takes the same kind.
        apart: take all of torch's steps first, and end its process, so that device memory needs to
            hold one of the two at a time; otherwise steps are taken in turn.
        checkpointing: see `decoder_peer.Peer`.
    """
    s = program.settings
    peer = decoder_peer.Peer(s, program.model.sizes, device.platform, WARM_UP, checkpointing)
    with peer:
        if apart:
            for step in range(WARM_UP + s.steps):
                peer.take(step)
        else:
            results = measure(program, device, peer.take)
    if apart:
        results = measure(program, device)
    theirs = peer.results(
        results["step_seconds_each"], results["flops_per_step"], results["matmul_tflops"]
    )
    return results | {"torch": {"apart": apart} | theirs}


def plan(program: Program, device: jax.Device) -> dict[str, Any]:
    """Compiles the step without allocating anything, for the memory it would ask for.

    Args:
        program: what is compiled.
        device: for what.
    """
    compiled, compile_seconds = program.compile()
    return {
        "parameters": program.parameters(),
        "compile_seconds": compile_seconds,
        "positions_per_step": program.positions,
        "memory": memory(compiled, device),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The results as they are printed, one figure a line.

    Args:
        results: of `measure` or `plan`.
    """
    found = {f"{name} parameters": f"{n:,}" for name, n in results["parameters"].items()}
    found["compilation"] = f"{results['compile_seconds']:.1f} s"
    if "step_seconds" in results:
        each = " ".join(f"{seconds:.4f}" for seconds in results["step_seconds_each"])
        found |= {
            "step": f"{results['step_seconds']:.4f} s, median of {each}",
            "pairs": f"{results['pairs_per_second']:,.1f} /s",
            "tokens": f"{results['tokens_per_step']:,.0f} a step, real ones with prompts",
            "matmul rate": f"{results['matmul_tflops']:.4g} TFLOP/s",
            "MFU": f"{100 * results['mfu']:.1f} %",
            "loss": " ".join(f"{loss:.4f}" for loss in results["loss_each"]),
        }
    found["positions"] = f"{results['positions_per_step']:,} a step that are computed"
    sizes = results["memory"] | {"peak in use": results.get("peak_bytes")}
    found |= {f"memory, {name}": _gigabytes(n) for name, n in sizes.items() if n is not None}
    if "torch" in results:
        found |= decoder_peer.lines(results["torch"])
    return [f"{name:<28}{value}" for name, value in found.items()]


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """A list that grows by one event with everything that is compiled meanwhile."""
    found: list[str] = []

    def heard(event: str, duration: float, **more) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def device_of(topology: str | None) -> jax.Device:
    """The first device here; or of a TPU topology, to compile for, which takes libtpu and no TPU.

    Args:
        topology: such as "v5p:2x2x1", or None.
    """
    if topology is None:
        return jax.devices()[0]
    from jax.experimental import topologies

    # There is no TPU here to start, nor a cloud machine's metadata to ask for one.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(topology, platform="tpu").devices[0]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; exits with a message if it is mistaken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: tiny on CPU, else qwen2.5-3b")
    parser.add_argument("--config_json", type=pathlib.Path, help="sizes of another decoder")
    for field in dataclasses.fields(Settings)[1:]:
        shown = f"default {field.default}"
        for model, chosen in CHOSEN.items():
            if field.name in chosen:
                shown += f"; {model}: {chosen[field.name]}"
        if field.name == "dtype":
            shown += "; on CPU: float32"
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", default=None, help=shown)
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), help=shown)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of the results")
    parser.add_argument("--compile_only", action="store_true", help="memory, nothing allocated")
    parser.add_argument("--torch", action="store_true", help="beside transformers and peft")
    parser.add_argument(
        "--torch_apart", action="store_true", help="all of torch's steps before ours, not in turn"
    )
    parser.add_argument(
        "--torch_checkpointing", action="store_true", help="layers computed again, on torch's side"
    )
    parser.add_argument("--topology", help="compile for one chip of this TPU, such as v5p:2x2x1")
    arguments = parser.parse_args(argv)
    if arguments.model and arguments.config_json:
        parser.error("expected --model or --config_json, got both")
    if arguments.topology and not arguments.compile_only:
        parser.error("--topology: expected with --compile_only: there is no such device here")
    if arguments.torch and arguments.compile_only:
        parser.error("--torch: expected without --compile_only, which takes no step")
    for name in ("torch_apart", "torch_checkpointing"):
        if getattr(arguments, name) and not arguments.torch:
            parser.error(f"--{name}: expected with --torch")
    if arguments.torch and (package := decoder_peer.missing()):
        needed = ", ".join(decoder_peer.PACKAGES)
        parser.error(f"--torch: expected the packages {needed}, found no {package}")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    if arguments.torch:  # its process needs memory of the device, too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = device_of(arguments.topology)
    name = arguments.model or ("tiny" if device.platform == "cpu" else "qwen2.5-3b")
    try:
        if arguments.config_json:
            name = arguments.config_json.stem
            sizes = backbone.from_hf(json.loads(arguments.config_json.read_text(encoding="utf-8")))
        else:
            sizes = MODELS[name]
        chosen = dict(CHOSEN.get(name, {}))
        if device.platform == "cpu":
            chosen["dtype"] = "float32"
        chosen |= {
            field.name: value
            for field in dataclasses.fields(Settings)[1:]
            if (value := getattr(arguments, field.name)) is not None
        }
        settings = Settings(name, **chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    program = Program(settings, sizes, device)
    if arguments.compile_only:
        results = plan(program, device)
    elif arguments.torch:
        results = beside_torch(
            program, device, arguments.torch_apart, arguments.torch_checkpointing
        )
    else:
        results = measure(program, device)
    content = {
        "benchmark": "decoder_step",
        "model": name,
        "settings": dataclasses.asdict(settings) | {"sizes": dataclasses.asdict(sizes)},
    }
    content |= {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": 1},
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.topology:
        content["device"]["topology"] = arguments.topology
    print(f"\n{name}, {device.device_kind}, {settings}\n")
    print("\n".join(lines(results)))
    out = arguments.out
    if out is None and not arguments.compile_only:
        kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower())
        what = f"{name}_images" if settings.images else name
        out = pathlib.Path(__file__).parent / "results" / f"decoder_step_{what}_{kind}.json"
    if out is not None:
        save(out, content)
    if failure := results.get("torch", {}).get("failure"):
        sys.exit(f"error: --torch: {failure}")
    return content


if __name__ == "__main__":
    main()
