"""The encoder of an artifact: texts and pictures to embeddings, as in training.

Few shapes are compiled. Items are sorted by length and go in blocks of a few sizes, without their
padding, in the smallest room of a few that holds their tokens; so a batch of any few texts is one
call. The last bits of an embedding follow from the shape of its block. Where they may not depend on
what else is encoded, blocks of one size are asked for, of items of about the same length.
"""

import dataclasses
import functools
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from xmc_jax.types import Inputs, Packing, own_tokens

ROWS = (1, 8, 64, 256)
"""Sizes of blocks: the smallest that holds what is left, the largest while there is more."""
_WIDTHS = 4  # at most so many lengths of sequences
_STEPS = (1, 1.5)  # rooms are these times a power of two of the longest sequence
_IMAGES = 8  # encoded at a time


@dataclasses.dataclass(frozen=True)
class Item:
    """A document or a label.

    Attributes:
        text: perhaps empty.
        images: its pictures, as bytes of image files, or as `Tower.prepare` makes them of these;
            more than the model takes are left out.
    """

    text: str
    images: Sequence[bytes | np.ndarray] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Block:
    """Items that are encoded in one call.

    Attributes:
        items: i[m], which.
        places: i[m], of the rows of the call, theirs.
        size: rows of the call.
        room: of a device's part of them.
    """

    items: np.ndarray
    places: np.ndarray
    size: int
    room: Packing


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
        self, items: Sequence[Item], pooled: bool = False, rows: tuple[int, ...] = ROWS
    ) -> np.ndarray:
        """f32[n, D], unit embeddings, or before normalisation.

        Args:
            items: n of them.
            pooled: see above.
            rows: sizes of blocks, ascending. With one, an item's embedding is the same to the bit
                whatever it is encoded with.

        Raises:
            ValueError: a picture that cannot be read, or pictures where the model takes none or
                their encoder is not there; an item without anything to encode.
        """
        out = np.empty((len(items), self._input.width), np.float32)
        inputs = self._inputs(items)
        lengths = own_tokens(inputs.lengths, inputs.image_count, self._rest)
        if not self._input.prompts.head and (empty := np.flatnonzero(lengths == 0)).size:
            raise ValueError(f"item {empty[0]}: expected a text or a picture, got neither")
        pending: list[tuple[_Block, jax.Array]] = []
        for block in self._blocks(lengths, rows):
            pending.append((block, self._embedded(inputs, block, pooled)))
            if len(pending) > 1:  # one is fetched while the next is computed
                self._take(out, *pending.pop(0))
        for block, found in pending:
            self._take(out, block, found)
        return out

    def warm_up(self, rows: tuple[int, ...] = ROWS) -> None:
        """Compiles all that `encode` of texts may need, and of pictures if their encoder is there.

        Args:
            rows: see `encode`.
        """
        T, images = self._input.max_length, self._input.images
        for size, rooms in self._rooms(rows).items():
            inputs = Inputs(np.zeros((size, T), np.int32), np.full(size, -1, np.int32))
            if images is not None:
                inputs = inputs.replace(
                    images=np.zeros((size, images.per_item, images.width), np.float16),
                    image_count=np.zeros(size, np.int32),
                )
            for room in rooms:
                everything = _Block(np.arange(size), np.arange(size), size, room)
                jax.block_until_ready(self._embedded(inputs, everything, pooled=False))

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """What `Item.images` may hold in place of an image file; for other threads, too.

        Args:
            image: an image file.
            limits: see `vision.images.Limits`.

        Raises:
            ValueError: see `encode`.
        """
        self._check_takes_pictures()
        return self._pictures.prepare(image, limits)

    def warm_up_pictures(self) -> None:
        """Loads the image encoder and compiles it.

        Raises:
            ValueError: the model takes no pictures, or their encoder is not there.
        """
        self._check_takes_pictures()
        self._pictures.warm_up()

    def _check_takes_pictures(self) -> None:
        if self._input.images is None:
            raise ValueError(
                f"{self.artifact.folder}: expected items without pictures, which this model was "
                "not trained with, got some"
            )

    def _take(self, out: np.ndarray, block: "_Block", found: jax.Array) -> None:
        out[block.items] = jax.device_get(found)[block.places]

    def _rooms(self, rows: tuple[int, ...]) -> dict[int, list[Packing]]:
        """The rooms of a device for each size of a block, ascending."""
        longest, rooms = int(self._widths[-1]), {}
        for size, before in zip(rows, (0, *rows)):
            each = -(-size // self._shards)
            if each == 1 or len(rows) == 1:
                of_size = [packing.whole(each, int(width)) for width in self._widths]
            else:
                powers = (step * 2**i for i in range(each.bit_length()) for step in _STEPS)
                steps = {int(x) for x in powers if x == int(x) and before / 2 / self._shards <= x}
                # Sequences without padding lie in it, and each may be as long as any.
                of_size = [
                    Packing(longest * step, ((each, longest),))
                    for step in sorted({x for x in steps if x < each} | {each})
                ]
            rooms[each * self._shards] = of_size
        return rooms

    def _blocks(self, lengths: np.ndarray, rows: tuple[int, ...]) -> Iterator["_Block"]:
        """How items of these lengths are dealt to blocks; i[n]."""
        rooms = self._rooms(rows)
        order = np.argsort(-lengths, kind="stable")
        if len(rows) == 1:
            fitting = np.searchsorted(self._widths, lengths)
            groups = [order[fitting[order] == number] for number in range(len(self._widths))]
        else:
            groups = [order]
        for left in groups:
            while len(left):
                size = next((r for r in rooms if r >= len(left)), max(rooms))
                items, left = left[:size], left[size:]
                # Dealt to the devices in turn, so that these have about as many tokens each.
                number = np.arange(len(items))
                places = number % self._shards * (size // self._shards) + number // self._shards
                tokens = int(lengths[items][:: self._shards].sum())
                most = int(lengths[items[0]])
                room = next(
                    room
                    for room in rooms[size]
                    if most <= room.classes[-1][1] and (room.padded or tokens <= room.tokens)
                )
                yield _Block(items, places, size, room)

    def _embedded(self, inputs: Inputs, block: "_Block", pooled: bool) -> jax.Array:
        rows = np.full(block.size, block.items[0])
        rows[block.places] = block.items
        taken = jax.tree.map(lambda x: x[rows], inputs)
        if not block.room.padded:  # else the rows that are left repeat what is there
            nobody = np.ones(block.size, bool)
            nobody[block.places] = False
            taken.lengths[nobody] = -1
        taken = sharding.put_batch(taken, block.size, self.mesh)
        output = self._run(self._params, taken.replace(packing=block.room))
        return output.pooled if pooled else output.unit

    def _apply(self, params: Any, inputs: Inputs) -> Any:
        return self._model.apply({"params": params}, inputs, method="encode")

    def _inputs(self, items: Sequence[Item]) -> Inputs:
        tokens, lengths, _ = tokenizers.encode_measured(
            self._tokenizer,
            [item.text for item in items],
            self._input.max_length,
            self._input.special_tokens,
        )
        inputs = Inputs(tokens=tokens, lengths=lengths)
        asked = self._input.images
        if any(len(item.images) for item in items):
            self._check_takes_pictures()
        if asked is None:
            return inputs
        vectors, counts = self._pictures.encode([item.images for item in items])
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
        self._lock = threading.Lock()

    def encode(
        self, images: Sequence[Sequence[bytes | np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """f16[n, K, E] and i32[n]; needs the encoder only where there are pictures."""
        limit = self._asked.per_item
        taken = [list(of_item[:limit]) for of_item in images]
        counts = np.array([len(of_item) for of_item in taken], np.int32)
        vectors = np.zeros((len(images), limit, self._asked.width), np.float16)
        flat = [image for of_item in taken for image in of_item]
        if flat:
            there = np.arange(limit) < counts[:, None]
            vectors[there] = self._vectors(flat).astype(np.float16)  # as image folders hold them
        return vectors, counts

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `Tower.prepare`."""
        from xmc_jax.vision import images  # an extra

        decoded = images.decode(image, limits or images.Limits(), self._asked.alpha)
        return self._loaded().prepare(decoded)

    def warm_up(self) -> None:
        """See `Tower.warm_up_pictures`."""
        encoder = self._loaded()
        from xmc_jax.vision import images

        jax.block_until_ready(encoder.embed([encoder.prepare(images.white(8))]))

    def _vectors(self, files: list[bytes | np.ndarray]) -> np.ndarray:
        def prepare(image: bytes | np.ndarray) -> np.ndarray:
            return self.prepare(image) if isinstance(image, bytes) else image

        encoder = self._loaded()
        if all(isinstance(image, np.ndarray) for image in files):
            prepared = files
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                prepared = list(pool.map(prepare, files))
        rows = []
        for start in range(0, len(prepared), self._size):
            part = prepared[start : start + self._size]
            rows.append(np.asarray(jax.device_get(encoder.embed(part)))[: len(part)])
        return np.concatenate(rows)

    def _loaded(self) -> Any:
        with self._lock:  # several threads may prepare
            return self._encoder

    @property
    def _size(self) -> int:
        return _IMAGES * jax.local_device_count()

    @functools.cached_property
    def _encoder(self) -> Any:
        asked = self._asked
        name = asked.encoder if asked.folder is None else str(self._folder / asked.folder)
        try:
            from xmc_jax.vision import encoders

            found = encoders.build(
                name,
                self._size,
                None if asked.folder else asked.revision,
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
