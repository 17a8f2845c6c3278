"""The encoder of an artifact: texts and pictures to embeddings, as in training.

Few shapes are compiled: an item goes with those of about its length, in blocks of a few sizes. A
row's embedding is a function of the item and the shape of its block, not of what else is there.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from xmc_jax import sharding
from xmc_jax.data import packing
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.inference.artifact import Artifact, ImageInput
from xmc_jax.models import dual, hf
from xmc_jax.types import Inputs, own_tokens

ROWS = (1, 8, 64, 256)
"""Sizes of blocks: the smallest that holds what is left, the largest while there is more."""
_WIDTHS = 4  # at most so many lengths of sequences
_IMAGES = 8  # encoded at a time
_AT_A_TIME = 4096  # items that are tokenised, and whose pictures' vectors are held


@dataclasses.dataclass(frozen=True)
class Item:
    """A document or a label.

    Attributes:
        text: perhaps empty.
        images: its pictures, as bytes of image files; more than the model takes are left out.
    """

    text: str
    images: Sequence[bytes] = ()


class Tower:
    """The encoder, on all local devices. Not for several threads at a time: see `Predictor`.

    Args:
        artifact: see `Artifact`.
        mesh: what it is split over; all local devices by rows by default.

    Raises:
        ValueError: weights or tokenizer that do not fit.
    """

    def __init__(self, artifact: Artifact, mesh: sharding.MeshConfig | None = None):
        self.artifact = artifact
        self.mesh = sharding.make_mesh(mesh or sharding.MeshConfig(), jax.local_devices())
        self._input = model = artifact.model
        source = hf.resolve(str(artifact.folder))
        sizes = hf.load_config(source)
        images = model.images
        self._rest = dataclasses.replace(model.prompts, head=())
        self._model = dual.DualEncoder(
            sizes=sizes,
            pooling=model.pooling,
            compute_dtype=model.compute_dtype,
            prompts=model.prompts,
            order=model.order,
            positions=model.positions,
            image_width=images.width if images else 0,
        )
        self._params = self._load(source, sizes)
        self._tokenizer = tokenizers.load(artifact.folder)
        per_item = images.per_item if images else 0
        around = len(self._rest.middle) + len(self._rest.tail) + per_item
        longest = model.max_length + around
        self._widths = np.unique([-(-longest * (i + 1) // _WIDTHS) for i in range(_WIDTHS)])
        self._run = jax.jit(sharding.under(self.mesh, self._apply))
        self._shards = sharding.num_shards("batch", self.mesh)

    def encode(
        self,
        items: Sequence[Item],
        pooled: bool = False,
        rows: tuple[int, ...] = ROWS,
        problems: dict[int, str] | None = None,
    ) -> np.ndarray:
        """f32[n, D], unit embeddings, or before normalisation.

        Args:
            items: n of them.
            pooled: see above.
            rows: sizes of blocks, ascending. With one, an item's embedding is the same to the bit
                whatever it is encoded with.
            problems: gets the number of each item that cannot be encoded, and why; its embedding is
                zeros. Without, the first such item is an error.

        Raises:
            ValueError: an item without anything to encode, or with a picture that cannot be read or
                that the model does not take; or the encoder of pictures is not there.
        """
        out = np.zeros((len(items), self._input.width), np.float32)
        for start in range(0, len(items), _AT_A_TIME):
            part, found = slice(start, start + _AT_A_TIME), {}
            out[part] = self._encode(items[part], pooled, rows, found)
            if found and problems is None:
                number = min(found)
                raise ValueError(f"item {start + number}: {found[number]}")
            for number, problem in found.items():
                problems[start + number] = problem
        return out

    def _encode(
        self,
        items: Sequence[Item],
        pooled: bool,
        rows: tuple[int, ...],
        problems: dict[int, str],
    ) -> np.ndarray:
        out = np.zeros((len(items), self._input.width), np.float32)
        inputs = self._inputs(items, problems)
        lengths = own_tokens(inputs.lengths, inputs.image_count, self._rest)
        if not self._input.prompts.head:
            for number in np.flatnonzero(lengths == 0).tolist():
                problems.setdefault(number, "expected a text or a picture, got neither")
        fitting = np.searchsorted(self._widths, lengths)
        fitting[list(problems)] = -1
        blocks = []
        for number, width in enumerate(self._widths):
            of_width = np.flatnonzero(fitting == number)
            while len(of_width):
                size = next((r for r in rows if r >= len(of_width)), rows[-1])
                size = -(-size // self._shards) * self._shards
                blocks.append((of_width[:size], size, int(width)))
                of_width = of_width[size:]
        pending: list[tuple[np.ndarray, jax.Array]] = []
        for chosen, size, width in blocks:
            pending.append((chosen, self._block(inputs, chosen, size, width, pooled)))
            if len(pending) > 1:  # one is fetched while the next is computed
                self._take(out, *pending.pop(0))
        for chosen, found in pending:
            self._take(out, chosen, found)
        return out

    def _take(self, out: np.ndarray, chosen: np.ndarray, found: jax.Array) -> None:
        out[chosen] = jax.device_get(found)[: len(chosen)]

    def _block(
        self, inputs: Inputs, chosen: np.ndarray, size: int, width: int, pooled: bool
    ) -> jax.Array:
        rows = np.resize(chosen, size)  # what is missing repeats what is there
        block = jax.tree.map(lambda x: x[rows], inputs)
        block = sharding.put_batch(block, size, self.mesh)
        room = packing.whole(size // self._shards, width)
        output = self._run(self._params, block.replace(packing=room))
        return output.pooled if pooled else output.unit

    def _apply(self, params: Any, inputs: Inputs) -> Any:
        return self._model.apply({"params": params}, inputs, method="encode")

    def _inputs(self, items: Sequence[Item], problems: dict[int, str]) -> Inputs:
        tokens, lengths, _ = tokenizers.encode_measured(
            self._tokenizer,
            [item.text for item in items],
            self._input.max_length,
            self._input.special_tokens,
        )
        inputs = Inputs(tokens=tokens, lengths=lengths)
        if self._input.images is None:
            for number, item in enumerate(items):
                if item.images:
                    problems[number] = (
                        "expected no pictures, since the model was trained without, got "
                        f"{len(item.images)}"
                    )
            return inputs
        vectors, counts = self._pictures.encode([item.images for item in items], problems)
        return inputs.replace(images=vectors, image_count=counts)

    @functools.cached_property
    def _pictures(self) -> "_Pictures":
        return _Pictures(self.artifact.folder, self._input.images)

    def _load(self, source: hf.Source, sizes: Any) -> Any:
        boxed = jax.eval_shape(lambda: dual.init_params(self._model, 0))
        dtype = jnp.dtype(hf.read_json(source.folder / "config.json").get("dtype", "float32"))
        abstract = jax.tree.map(
            lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=split),
            meta.unbox(boxed),
            sharding.of_params(boxed, self.mesh),
        )
        params = {"backbone": hf.load_params(source, sizes, abstract["backbone"])}
        if "projection" in abstract:
            stored = hf.load_projection(source, self._input.images.width)
            if stored is None:
                raise ValueError(
                    f"{source.folder}: expected a {hf.PROJECTION}, as a model with images has one, "
                    "found none; export it again"
                )
            params["projection"] = {
                name: sharding.put(stored[name].astype(leaf.dtype), leaf.sharding)
                for name, leaf in traverse_util.flatten_dict(
                    abstract["projection"], sep="/"
                ).items()
            }
        return params


class _Pictures:
    """Bytes of image files to frozen vectors, by the encoder that training had."""

    def __init__(self, folder: pathlib.Path, asked: ImageInput):
        self._folder, self._asked = folder, asked

    def encode(
        self, images: Sequence[Sequence[bytes]], problems: dict[int, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """f16[n, K, E] and i32[n]; needs the encoder only where there are pictures.

        Args:
            images: of each of n items.
            problems: gets the number of each item with one that cannot be read, and why.
        """
        limit = self._asked.per_item
        counts = np.array([min(len(of_item), limit) for of_item in images], np.int32)
        vectors = np.zeros((len(images), limit, self._asked.width), np.float16)
        places = [(i, k) for i, count in enumerate(counts.tolist()) for k in range(count)]
        if not places:
            return vectors, counts
        encoder = self._encoder
        parts = [places[i : i + self._size] for i in range(0, len(places), self._size)]
        for part, prepared in zip(parts, self._prepared(encoder, images, parts)):
            whole = []
            for (i, k), found in zip(part, prepared):
                if isinstance(found, str):
                    problems.setdefault(i, f"picture {k}: {found}")
                else:
                    whole.append((i, k, found))
            if whole:
                rows = jax.device_get(encoder.embed([found for *_, found in whole]))
                for (i, k, _), row in zip(whole, np.asarray(rows)):
                    vectors[i, k] = row.astype(np.float16)  # as image folders hold them
        return vectors, counts

    def _prepared(
        self,
        encoder: Any,
        images: Sequence[Sequence[bytes]],
        parts: list[list[tuple[int, int]]],
    ) -> Iterator[list[np.ndarray | str]]:
        """What the encoder takes of each part, or what is wrong; the next part is under way."""
        under_way: list[list[Future]] = []
        for part in parts:
            files = [images[i][k] for i, k in part]
            under_way.append([self._threads.submit(self._prepare, encoder, x) for x in files])
            if len(under_way) > 1:
                yield [future.result() for future in under_way.pop(0)]
        for futures in under_way:
            yield [future.result() for future in futures]

    def _prepare(self, encoder: Any, data: bytes) -> np.ndarray | str:
        from xmc_jax.vision import images  # an extra, which the encoder has asked for

        try:
            return encoder.prepare(images.decode(data, alpha=self._asked.alpha))
        except ValueError as error:
            return str(error)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    @property
    def _size(self) -> int:
        return _IMAGES * jax.local_device_count()

    @functools.cached_property
    def _encoder(self) -> Any:
        asked = self._asked
        name = asked.encoder if asked.folder is None else str(self._folder / asked.folder)
        try:
            from xmc_jax.vision import descriptor, encoders

            bare = asked.folder is not None or name == descriptor.NAME  # without revisions
            found = encoders.build(
                name,
                self._size,
                None if bare else asked.revision,
                layout=asked.layout,
                dtype=asked.dtype,
            )
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{self._folder}: pictures need the image encoder {asked.encoder}"
                f"{f' at {asked.revision}' if asked.revision else ''}, which cannot be had here "
                f"({str(error).splitlines()[0]}); export with --config.export.vision=carried, "
                'install ".[vision]", or leave the pictures out'
            ) from error
        if found.identity["digest"] != asked.digest:
            raise ValueError(
                f"{name}: expected the image encoder of training (sha256 {asked.digest[:12]}), "
                f"found another (sha256 {found.identity['digest'][:12]}); set its revision"
            )
        return found
