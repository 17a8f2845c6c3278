"""A training step and encoding beside sentence-transformers, on one machine, in one run.

python -m benchmarks.peers --raw=.../LF-DebianTitles-26K --layers=3

The same model (the first --layers layers of the packaged MiniLM, mean pooling, float32, dropout
0.1), the same batches of --batch (document, label) pairs, the same family of loss (softmax over the
labels of the batch, no prototypes), AdamW, nothing recomputed on either side, texts of at most
--length tokens, tokenised before the clock starts:

    packed    ours
    padded    ours with `train.packed=False`: a row of --length places for every text of the pairs
    torch     sentence-transformers, MultipleNegativesRankingLoss, max_seq_length = --length: what
              it pads to is the longest text of the batch
    torch, default length    the same with the model's own max_seq_length, once; not with
                             --no_default_length, which six layers of 512 pairs need in 24 GB

Steps are taken in turn, one of each, so that all see the same machine; the figures are medians, and
ratios are medians of the ratios of neighbours. "allowed" is the gain that removing all padding and
all repeated labels allows over "padded", if time were proportional to tokens.

Encoding is of all training titles: ours from the dataset folder, in blocks by length;
`SentenceTransformer.encode` from tokens, too, and with its tokenizer, sorted by length as it does,
at the best of --encode_batches. Extra `parity` for sentence-transformers; without it, or with
--no_torch, ours alone.

The results go to --output: "benchmark", "settings", environment and "results".
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Threads of one library that wait for work take it from the other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import jax
import numpy as np

from benchmarks import raw_data
from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import packaged, rows
from xmc_jax.runtime import command
from xmc_jax.training import build
from xmc_jax.training.run import Run

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_DEFAULT = "torch, default length"
TORCH_PACKAGES = ("torch", "transformers", "sentence-transformers")


def make_run(arguments: argparse.Namespace, folder: pathlib.Path, packed: bool) -> Run:
    """Ours: NGAME's mode, decoupled softmax, on the raw folder's dataset."""
    fields = vixml.get_config("minilm_l6/debian_26k").to_dict()
    fields["data"] |= raw_data.of(arguments).fields()
    fields["data"] |= {"data_dir": str(folder), "max_length": arguments.length}
    fields["encoder"] |= {"layers": arguments.layers, "dropout": 0.1}
    fields["prime"]["enabled"] = False
    fields["loss"] |= {"kind": "decoupled_softmax", "document_to_label": 1.0}
    fields["optimizer"] |= {"lr": ((".*", 2e-4),), "weight_decay": ((".*", 0.01),)}
    fields["train"] |= {
        "batch_size": arguments.batch,
        "labels": "sampled",
        "packed": packed,
        "n_chunks": 1,
    }
    return build.run(RunConfig.from_dict(fields))


class Ours:
    """Steps of a run, one at a time."""

    def __init__(self, run: Run):
        self.run = run
        order = np.random.default_rng(0).permutation(run.data.num_documents)
        self._order = order.astype(np.int32)
        self._state = run.initial_state()
        self.tokens = self.real = self.different = 0

    def batch(self, step: int) -> Any:
        """The batch of a step, on the devices."""
        local = self.run.sampler.build(self._order, step, step)
        return jax.block_until_ready(self.run.put(local))

    def step(self, batch: Any) -> None:
        """One optimizer step, and waits for it."""
        self._state, metrics = self.run.train_step(self._state, self.run.frozen, batch)
        jax.block_until_ready((self._state, metrics))

    def encode(self) -> None:
        """All training titles."""
        self.run.embed(self._state.params, "train")


class Torch:
    """The same steps by sentence-transformers."""

    def __init__(self, run: Run, arguments: argparse.Namespace, length: int | None):
        import sentence_transformers
        import torch
        from sentence_transformers import losses, models

        torch.manual_seed(0)
        word = models.Transformer(str(packaged.minilm()))
        word.auto_model.encoder.layer = word.auto_model.encoder.layer[: arguments.layers]
        pooling = models.Pooling(word.get_word_embedding_dimension(), "mean")
        self._model = sentence_transformers.SentenceTransformer(
            modules=[word, pooling, models.Normalize()], device="cpu"
        )
        if length is not None:
            self._model.max_seq_length = length
        self._model.train()
        self._loss = losses.MultipleNegativesRankingLoss(self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=2e-4)
        data = raw_data.of(arguments)
        splits = data.read().splits
        self._documents, self._labels = (splits[s].texts(data.text) for s in ("train", "label"))

    def batch(self, document_ids: np.ndarray, label_ids: np.ndarray) -> list[dict[str, Any]]:
        """Tokens of the pairs."""
        sides = ((self._documents, document_ids), (self._labels, label_ids))
        return [self._model.tokenize([texts[i] for i in ids.tolist()]) for texts, ids in sides]

    def step(self, batch: list[dict[str, Any]]) -> None:
        """One optimizer step."""
        import torch

        loss = self._loss(batch, torch.arange(len(batch[0]["input_ids"])))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def encode(self, batch_size: int) -> None:
        """All training texts, tokenizer and all."""
        self._model.eval()
        self._model.encode(self._documents, batch_size=batch_size, show_progress_bar=False)


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def allowed(run: Run, order: np.ndarray, steps: int) -> tuple[float, float, float]:
    """Mean places with padding, real tokens, and those of different texts, of a batch."""
    counts = []
    for step in range(steps):
        batch = run.sampler.build(order, step, step)
        label_ids = batch.label_ids[batch.columns]
        lengths = run.data.label.lengths[label_ids].astype(int)
        documents = int(run.data.train.lengths[batch.document_ids].astype(int).sum())
        different = run.data.label.lengths[np.unique(label_ids)].astype(int)
        places = batch.items.tokens.size
        counts.append((places, documents + lengths.sum(), documents + different.sum()))
    places, real, unique = np.mean(counts, axis=0)
    return float(places), float(real), float(unique)


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios of neighbours."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def main() -> dict[str, Any]:
    """The command; returns what it writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    raw_data.add_flags(parser)
    parser.add_argument("--layers", type=int, default=3, help="default 3")
    parser.add_argument("--batch", type=int, default=512, help="default 512")
    parser.add_argument("--length", type=int, default=32, help="default 32")
    parser.add_argument("--steps", type=int, default=7, help="that count; default 7")
    parser.add_argument("--encodings", type=int, default=3, help="default 3; 0: none")
    parser.add_argument("--encode_batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--no_torch", action="store_true")
    parser.add_argument("--no_default_length", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.raw = arguments.raw.absolute()
    command.keep_freed_memory()  # as the command does; PyTorch gains by it, too
    torch = not arguments.no_torch and importlib.util.find_spec("sentence_transformers") is not None
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: make_run(arguments, pathlib.Path(folder), name == "packed")
            for name in ("padded", "packed")
        }
        results = measure(arguments, runs, torch)
    content = {
        "benchmark": "peers",
        "settings": {name: getattr(arguments, name) for name in ("layers", "batch", "length")},
        **environment(PACKAGES + (TORCH_PACKAGES if torch else ())),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)
    return content


def measure(arguments: argparse.Namespace, runs: dict[str, Run], torch: bool) -> dict[str, Any]:
    """Steps in turn, then encodings in turn."""
    ours = {name: Ours(run) for name, run in runs.items()}
    peers = {}
    if torch:
        peers["torch"] = Torch(runs["padded"], arguments, arguments.length)
        if not arguments.no_default_length:
            peers[_DEFAULT] = Torch(runs["padded"], arguments, None)
    seconds: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    plain = runs["padded"]
    order = np.random.default_rng(0).permutation(plain.data.num_documents).astype(np.int32)
    for step in range(-2, arguments.steps):  # the first two compile and warm up
        local = plain.sampler.build(order, step + 2, step + 2)
        for name in seconds:
            if name == _DEFAULT and step != 0:  # it is there for one figure, and slow
                continue
            if name in ours:
                batch = ours[name].batch(step + 2)
                taken = timed(lambda name=name, batch=batch: ours[name].step(batch))
            else:
                drawn = local.label_ids[local.columns]
                batch = peers[name].batch(local.document_ids, drawn)
                taken = timed(lambda name=name, batch=batch: peers[name].step(batch))
            print(f"{name:22} {taken:.2f} s" + ", not counted" * (step < 0), flush=True)
            if step >= 0:
                seconds[name].append(taken)
    places, real, different = allowed(plain, order, arguments.steps)
    results: dict[str, Any] = {
        "steps": {
            name: {
                "seconds": taken,
                "documents_per_second": arguments.batch / statistics.median(taken),
                "packed_is_faster": ratio(taken, seconds["packed"]),
            }
            for name, taken in seconds.items()
        },
        "tokens": {"padded": places, "real": real, "different": different},
        "allowed": places / different,
    }
    for name, found in results["steps"].items():
        print(
            f"{name:22} {found['documents_per_second']:7.1f} documents/s; packed is "
            f"{found['packed_is_faster']:.2f} times as fast"
        )
    print(f"removing padding and repeated labels allows {results['allowed']:.2f}")
    if arguments.encodings:
        results |= encodings(arguments, ours["packed"], peers.get("torch"))
    return results


def encodings(arguments: argparse.Namespace, ours: Ours, torch: Torch | None) -> dict[str, Any]:
    """All training titles encoded, in turn."""
    calls: dict[str, Callable[[], Any]] = {"packed": ours.encode}
    if torch is not None:
        for size in arguments.encode_batches:
            calls[f"torch, {size}"] = functools.partial(torch.encode, size)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, arguments.encodings):
        for name, call in calls.items():
            taken = timed(call)
            if turn >= 0:
                seconds[name].append(taken)
    count = ours.run.data.num_documents
    results: dict[str, Any] = {
        "encoding": {
            name: {"seconds": taken, "items_per_second": count / statistics.median(taken)}
            for name, taken in seconds.items()
        }
    }
    lengths = ours.run.data.train.lengths.astype(int)
    layout = ours.run.layout
    fitted = rows.fit(layout, lengths)
    results["row_fill"] = float(lengths.sum() / (fitted.rows * layout.width))
    print(f"rows of {layout.width} places are {100 * results['row_fill']:.1f} % full")
    for name, found in results["encoding"].items():
        print(f"encode, {name:14} {found['items_per_second']:7.0f} titles/s")
    if torch is not None:
        best = min([*calls][1:], key=lambda name: statistics.median(seconds[name]))
        results["encoding_is_faster"] = ratio(seconds[best], seconds["packed"])
        print(f"encoding is {results['encoding_is_faster']:.2f} times as fast as {best}")
    return results


if __name__ == "__main__":
    main()
