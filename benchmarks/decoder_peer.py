"""The step of `benchmarks.decoder_torch` beside ours: in a process of its own, a step at a time.

So neither library takes the other's threads, each has its own memory on the device, and if one of
them fails, what was measured of the other is still there. While one computes the other waits.
"""

import importlib.util
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.decoder_workload import Settings, batch_of
from xmc_jax.models.decoder_config import DecoderConfig

PACKAGES = ("torch", "transformers", "peft")
PADDINGS = ("static", "longest")
_WORTH = 0.01  # of the positions: less than that need not be timed by itself


def positions(settings: Settings, sizes: DecoderConfig, step: int, padding: str) -> int:
    """Places that a step of torch computes, padding included, once forward.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        step: which.
        padding: to all places an item may take, "static", or the "longest" of its chunk.
    """
    s = settings
    if padding == "static":
        return 2 * s.batch * s.width
    batch, beside = batch_of(s, sizes, step), s.width - s.length
    lengths = np.stack([batch.document.lengths, batch.label.lengths], axis=1)
    longest = lengths.reshape(-1, s.chunks, 2).max(axis=(0, 2))  # chunks take every n-th row
    return 2 * s.batch // s.chunks * int((longest + beside).sum())


def worth_timing(settings: Settings, sizes: DecoderConfig, steps: int) -> tuple[str, ...]:
    """Those of PADDINGS that are not the same work.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        steps: whose batches are looked at.
    """
    static, longest = (
        sum(positions(settings, sizes, step, padding) for step in range(steps))
        for padding in PADDINGS
    )
    return PADDINGS if longest < (1 - _WORTH) * static else PADDINGS[:1]


def missing() -> str | None:
    """The first package that the step needs and that is not there."""
    absent = (name for name in PACKAGES if importlib.util.find_spec(name) is None)
    return next(absent, None)


class Peer:
    """The process; a context, at whose end it is over.

    Args:
        settings: what is measured.
        sizes: of the decoder.
        platform: "cpu" or "gpu".
        warm_up: steps that do not count.
        checkpointing: whether torch computes a layer's activations again in the backward pass.

    Attributes:
        failure: what went wrong, one line; None as long as nothing did. Then no step is taken.
    """

    def __init__(
        self,
        settings: Settings,
        sizes: DecoderConfig,
        platform: str,
        warm_up: int,
        checkpointing: bool = False,
    ):
        self.failure: str | None = None
        self._settings, self._sizes = settings, sizes
        self._warm_up, self._checkpointing = warm_up, checkpointing
        steps = warm_up + settings.steps
        self._taken: dict[str, list[tuple[float, float]]] = {
            padding: [] for padding in worth_timing(settings, sizes, steps)
        }
        self._peak: int | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, settings, sizes, platform, checkpointing), daemon=True
        )
        self._process.start()
        other.close()
        self._receive()  # it is ready, and takes no processor from what is timed

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error) -> None:
        if self.failure is None:
            self._connection.send(None)
            self._peak = self._receive()
        self._connection.close()
        self._process.join(timeout=60)
        self._process.kill()

    def take(self, step: int) -> None:
        """Takes a step with each padding, and waits for it.

        Args:
            step: whose batch.
        """
        for padding, taken in self._taken.items():
            if self.failure is None:
                self._connection.send((step, padding))
                found = self._receive()
                if found is not None:
                    taken.append(found)

    def results(self, ours: Sequence[float], flops: float, tflops: float) -> dict[str, Any]:
        """What was measured, and how much faster ours is: by the medians of neighbours' ratios.

        Args:
            ours: seconds of our step, for each that counts.
            flops: that a step needs, as MFU counts them.
            tflops: rate that MFU is relative to.
        """
        found: dict[str, Any] = {
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "checkpointing": self._checkpointing,
            "peak_bytes": self._peak,
            "failure": self.failure,
            "paddings": {},
        }
        for padding, taken in self._taken.items():
            seconds = [each for each, _ in taken[self._warm_up :]]
            if len(seconds) < len(ours):
                continue
            median = statistics.median(seconds)
            found["paddings"][padding] = {
                "step_seconds": median,
                "step_seconds_each": seconds,
                "pairs_per_second": self._settings.batch / median,
                "positions_per_step": statistics.mean(
                    positions(self._settings, self._sizes, self._warm_up + i, padding)
                    for i in range(len(seconds))
                ),
                "mfu": flops / median / (tflops * 1e12),
                "loss_each": [loss for _, loss in taken],
                "times_torch": statistics.median(a / b for a, b in zip(seconds, ours)),
            }
        if found["paddings"]:
            fastest = min(found["paddings"].items(), key=lambda item: item[1]["step_seconds"])
            found["fastest"], found["times_torch"] = fastest[0], fastest[1]["times_torch"]
        return found

    def _receive(self) -> Any:
        try:
            kind, content = self._connection.recv()
        except EOFError:
            self._process.join()
            kind, content = "failure", f"its process ended with {self._process.exitcode}"
        if kind == "failure":
            self.failure = content
            return None
        return content


def lines(results: dict[str, Any]) -> dict[str, str]:
    """The results as they are printed.

    Args:
        results: of `Peer.results`.
    """
    found = {}
    for padding, one in results["paddings"].items():
        each = " ".join(f"{seconds:.4f}" for seconds in one["step_seconds_each"])
        found |= {
            f"torch, {padding}, step": f"{one['step_seconds']:.4f} s, median of {each}",
            f"torch, {padding}, pairs": f"{one['pairs_per_second']:,.1f} /s",
            f"torch, {padding}, positions": f"{one['positions_per_step']:,.0f} a step",
            f"torch, {padding}, MFU": f"{100 * one['mfu']:.1f} %",
            f"torch, {padding}, loss": " ".join(f"{loss:.4f}" for loss in one["loss_each"]),
        }
    if results["peak_bytes"] is not None:
        found["torch, peak in use"] = f"{results['peak_bytes'] / 1e9:.3f} GB"
    if "times_torch" in results:
        found["times torch"] = f"{results['times_torch']:.2f}, padding {results['fastest']}"
    if results["failure"]:
        found["torch"] = results["failure"]
    return found


def _serve(
    connection: Connection,
    settings: Settings,
    sizes: DecoderConfig,
    platform: str,
    checkpointing: bool,
) -> None:
    """Answers each (step, padding) with (seconds, loss), None with the most bytes in use."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else its threads take ours' processors
    import torch

    from benchmarks import decoder_torch

    cuda = platform != "cpu"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    try:
        step = decoder_torch.TorchStep(settings, sizes, platform, checkpointing)
        connection.send(("ready", None))
        while (asked := connection.recv()) is not None:
            batch = step.batch(*asked)
            wait()
            start = time.perf_counter()
            loss, _ = step.update(batch)
            wait()
            seconds = time.perf_counter() - start
            connection.send(("taken", (seconds, loss.item())))
        connection.send(("peak", torch.cuda.max_memory_allocated() if cuda else None))
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        remedy = "add --torch_apart, --torch_checkpointing or more --chunks"
        connection.send(("failure", f"out of memory; {remedy} ({reason})"))
    except Exception as error:
        traceback.print_exc()
        connection.send(("failure", " ".join(f"{type(error).__name__}: {error}".split())))
