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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from xmc_jax import sharding
from xmc_jax.data import packing
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.files import json_files
from xmc_jax.inference.artifact import Artifact, ImageInput
from xmc_jax.models import dual, hf
from xmc_jax.types import Inputs, Packing, own_tokens

ROWS = (1, 8, 64, 256)
"""Sizes of blocks: the smallest that holds what is left, the largest while there is more."""
_WIDTHS = 4  # at most so many lengths of sequences
_SMALL = 8  # rows of a block, up to which rooms are powers of two alone: fewer programs
_HALVES = 3  # lengths of a sequence by itself: the longest, a half and a quarter of it
_STEPS = (1, 1.5)  # rooms are these times a power of two of the longest sequence
_IMAGES = 8  # encoded at a time
_AT_A_TIME = 4096  # items that are tokenised, and whose pictures' vectors are held


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


class Encoded(NamedTuple):
    """Embeddings of n items.

    Attributes:
        vectors: f32[n, D].
        cut: bool[n], whether a text has more tokens than the model takes. The tokens past the limit
            have no effect on the embedding.
    """

    vectors: np.ndarray
    cut: np.ndarray


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
        self._tokenizer, self._tokens = tokenizers.load(artifact.folder), sizes.vocab_size
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
        kind: str = "document",
    ) -> np.ndarray:
        """f32[n, D], the vectors of `encode_measured`."""
        return self.encode_measured(items, pooled, rows, problems, kind).vectors

    def encode_measured(
        self,
        items: Sequence[Item],
        pooled: bool = False,
        rows: tuple[int, ...] = ROWS,
        problems: dict[int, str] | None = None,
        kind: str = "document",
    ) -> Encoded:
        """Unit embeddings of items, or their embeddings before normalisation.

        Args:
            items: n of them.
            pooled: whether to return the embeddings before normalisation.
            rows: sizes of blocks, ascending. With one size, an item's embedding is the same to the
                bit whatever it is encoded with.
            problems: gets the number of each item that cannot be encoded, and the reason. The
                embedding of such an item is zeros. Without `problems`, the first such item is an
                error.
            kind: "document" or "label", which may have prompts of their own.

        Raises:
            ValueError: an item without anything to encode, a text that is not Unicode, a picture
                that cannot be read or that the model does not take, or a missing image encoder.
        """
        vectors = np.zeros((len(items), self._input.width), np.float32)
        cut = np.zeros(len(items), bool)
        for start in range(0, len(items), _AT_A_TIME):
            part, found = slice(start, start + _AT_A_TIME), {}
            vectors[part], cut[part] = self._encode(items[part], pooled, rows, found, kind)
            if found and problems is None:
                number = min(found)
                raise ValueError(f"item {start + number}: {found[number]}")
            for number, problem in found.items():
                problems[start + number] = problem
        return Encoded(vectors, cut)

    def _encode(
        self,
        items: Sequence[Item],
        pooled: bool,
        rows: tuple[int, ...],
        problems: dict[int, str],
        kind: str,
    ) -> Encoded:
        out = np.zeros((len(items), self._input.width), np.float32)
        inputs, cut = self._inputs(items, problems, kind)
        lengths = own_tokens(inputs.lengths, inputs.image_count, self._rest)
        if not self._input.prompts.head:
            for number in np.flatnonzero(lengths == 0).tolist():
                problems.setdefault(number, "expected a text or a picture, got neither")
        whole = np.setdiff1d(np.arange(len(items)), list(problems))
        pending: list[tuple[_Block, jax.Array]] = []
        for block in self._blocks(lengths, whole, rows):
            pending.append((block, self._embedded(inputs, block, pooled)))
            if len(pending) > 1:  # one is fetched while the next is computed
                self._take(out, *pending.pop(0))
        for block, found in pending:
            self._take(out, block, found)
        return Encoded(out, cut)

    def programs(self, rows: tuple[int, ...] = ROWS) -> list[Callable[[], Any]]:
        """Calls that compile all that `encode` of texts may need, one program each.

        Args:
            rows: see `encode`.
        """
        T, images = self._input.max_length, self._input.images

        def run(size: int, room: Packing) -> None:
            inputs = Inputs(np.zeros((size, T), np.int32), np.full(size, -1, np.int32))
            if images is not None:
                inputs = inputs.replace(
                    images=np.zeros((size, images.per_item, images.width), np.float16),
                    image_count=np.zeros(size, np.int32),
                )
            everything = _Block(np.arange(size), np.arange(size), size, room)
            jax.block_until_ready(self._embedded(inputs, everything, pooled=False))

        return [
            functools.partial(run, size, room)
            for size, rooms in self._rooms(rows).items()
            for room in rooms
        ]

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
                f"{self.artifact.folder}: expected no pictures, since the model was trained "
                "without, got some"
            )

    def _take(self, out: np.ndarray, block: "_Block", found: jax.Array) -> None:
        out[block.items] = jax.device_get(found)[block.places]

    def _rooms(self, rows: tuple[int, ...]) -> dict[int, list[Packing]]:
        """The rooms of a device for each size of a block, ascending."""
        longest, rooms = int(self._widths[-1]), {}
        for size, before in zip(rows, (0, *rows)):
            each = -(-size // self._shards)
            if len(rows) == 1:
                of_size = [packing.whole(each, int(width)) for width in self._widths]
            elif each == 1:
                widths = {-(-longest // 2**i) for i in range(_HALVES)}
                of_size = [packing.whole(each, width) for width in sorted(widths)]
            else:
                between = _STEPS if size > _SMALL else (1,)
                powers = (step * 2**i for i in range(each.bit_length()) for step in between)
                steps = {int(x) for x in powers if x == int(x) and before / 2 / self._shards <= x}
                # Sequences without padding lie in it, and each may be as long as any.
                of_size = [
                    Packing(longest * step, ((each, longest),))
                    for step in sorted({x for x in steps if x < each} | {each})
                ]
            rooms[each * self._shards] = of_size
        return rooms

    def _blocks(
        self, lengths: np.ndarray, chosen: np.ndarray, rows: tuple[int, ...]
    ) -> Iterator["_Block"]:
        """How some items, i[m], are dealt to blocks, of the lengths i[n] of all."""
        rooms = self._rooms(rows)
        order = chosen[np.argsort(-lengths[chosen], kind="stable")]
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

    def _inputs(
        self, items: Sequence[Item], problems: dict[int, str], kind: str
    ) -> tuple[Inputs, np.ndarray]:
        """What the model takes of n items, and bool[n], whether their texts were cut."""
        prompt = getattr(self._input, f"{kind}_prompt")
        for number, item in enumerate(items):
            if problem := _problem_of(item, self._input.images is not None):
                problems[number] = problem
        sound = [Item("") if i in problems else item for i, item in enumerate(items)]
        tokens, lengths, whole = tokenizers.encode_measured(
            self._tokenizer,
            [prompt + item.text for item in sound],
            self._input.max_length,
            self._input.special_tokens,
        )
        for number in np.flatnonzero((tokens >= self._tokens).any(1)).tolist():
            problems[number] = (
                f"expected token ids below {self._tokens}, the rows of the model's table, got "
                f"{tokens[number].max()}; take the token out of the text"
            )
            tokens[number] = 0
        inputs, cut = Inputs(tokens=tokens, lengths=lengths), whole > lengths
        if self._input.images is None:
            return inputs, cut
        vectors, counts = self._pictures.encode([item.images for item in sound], problems)
        return inputs.replace(images=vectors, image_count=counts), cut

    @functools.cached_property
    def _pictures(self) -> "_Pictures":
        return _Pictures(self.artifact.folder, self._input.images)

    def _load(self, source: hf.Source, sizes: Any) -> Any:
        boxed = jax.eval_shape(lambda: dual.init_params(self._model, 0))
        dtype = jnp.dtype(json_files.read(source.folder / "config.json").get("dtype", "float32"))
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


def _problem_of(item: Item, with_images: bool) -> str | None:
    """Why an item cannot be encoded, before its pictures are decoded; None if it can be.

    Args:
        item: of any content: its fields may come from outside.
        with_images: whether the model takes pictures.
    """
    text, images = item.text, item.images
    if not isinstance(text, str):
        return f"expected a text, got {text!r:.60}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "expected a text in Unicode, got half of a surrogate pair"
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        return f"images: expected a list of image files as bytes, got {type(images).__name__}"
    if images and not with_images:
        return f"expected no pictures, since the model was trained without, got {len(images)}"
    for number, image in enumerate(images):
        if not isinstance(image, (bytes, np.ndarray)):
            return f"picture {number}: expected the bytes of an image file, got {image!r:.60}"
    return None


class _Pictures:
    """Bytes of image files to frozen vectors, by the encoder that training had."""

    def __init__(self, folder: pathlib.Path, asked: ImageInput):
        self._folder, self._asked = folder, asked
        self._lock = threading.Lock()

    def encode(
        self, images: Sequence[Sequence[bytes | np.ndarray]], problems: dict[int, str]
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
        encoder = self._loaded()
        parts = [places[i : i + self._size] for i in range(0, len(places), self._size)]
        for part, prepared in zip(parts, self._prepared(images, parts)):
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
        images: Sequence[Sequence[bytes | np.ndarray]],
        parts: list[list[tuple[int, int]]],
    ) -> Iterator[list[np.ndarray | str]]:
        """What the encoder takes of each part, or what is wrong; the next part is under way."""
        under_way: list[list[Future]] = []
        for part in parts:
            files = [images[i][k] for i, k in part]
            under_way.append([self._threads.submit(self._prepare, x) for x in files])
            if len(under_way) > 1:
                yield [future.result() for future in under_way.pop(0)]
        for futures in under_way:
            yield [future.result() for future in futures]

    def _prepare(self, image: bytes | np.ndarray) -> np.ndarray | str:
        if isinstance(image, np.ndarray):
            return image
        try:
            return self.prepare(image)
        except ValueError as error:
            return str(error)

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `Tower.prepare`."""
        encoder = self._loaded()
        from xmc_jax.vision import images  # an extra, which the encoder has asked for

        return encoder.prepare(images.decode(image, limits or images.Limits(), self._asked.alpha))

    def warm_up(self) -> None:
        """See `Tower.warm_up_pictures`."""
        encoder = self._loaded()
        from xmc_jax.vision import images

        jax.block_until_ready(encoder.embed([encoder.prepare(images.white(8))]))

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

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
