"""The encoder of an artifact: texts and pictures to embeddings, as in training.

Few shapes are compiled. Items lie in rows, see `data.rows`, as many rows as a power of two; so a
batch of any few texts is one call. An item by itself has one short row. The last bits of an
embedding follow from the shape of its block. Where they may not depend on what else is encoded,
blocks of one size are asked for, in which each item has a row of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from xmc_jax.config import MeshConfig
from xmc_jax.data import rows as row_layout
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.types import Inputs, Rows
from xmc_jax.files import json_files
from xmc_jax.models import dual, hf, hf_weights
from xmc_jax.runtime import sharding
from xmc_jax.shipping.artifact import Artifact
from xmc_jax.shipping.picture_vectors import PictureVectors

ROWS = (1, 8, 64, 256)
"""Sizes of blocks; the last is the most items of one call."""
_HALVES = 3  # lengths of a row for one item: the longest, a half and a quarter of it
_AT_A_TIME = 4096  # items that are tokenised, with the vectors of their pictures


@dataclasses.dataclass(frozen=True)
class Item:
    """A document or a label.

    Attributes:
        text: perhaps empty.
        images: bytes of image files, or what `QueryEncoder.prepare` makes of them; those beyond
            what the model takes are left out.
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
    """Items that are encoded in one call."""

    items: np.ndarray
    layout: row_layout.Layout
    fitted: row_layout.Fit
    rows: int
    at: np.ndarray
    slots: int


class QueryEncoder:
    """The encoder, on all local devices. Not for several threads at a time: see `Predictor`.

    Args:
        mesh: what it is split over; all local devices by rows by default.

    Raises:
        ValueError: weights or tokenizer that do not fit.
    """

    def __init__(self, artifact: Artifact, mesh: MeshConfig | None = None):
        self.artifact = artifact
        self.mesh = sharding.make_mesh(mesh or MeshConfig(), jax.local_devices())
        self._input = model = artifact.model
        source = hf.resolve(str(artifact.folder))
        sizes = hf.load_config(source)
        images = model.images
        self._model = dual.DualEncoder(
            sizes=sizes,
            pooling=model.pooling,
            compute_dtype=model.compute_dtype,
            image_width=images.width if images else 0,
        )
        self._params = self._load(source, sizes)
        self._tokenizer, self._tokens = tokenizers.load(artifact.folder), sizes.vocab_size
        per_item = images.per_item if images else 0
        self._layout = row_layout.layout(
            *(model.prompts, model.order, model.positions, model.max_length, per_item),
            sharding.row_multiple(self.mesh),
        )
        widths = {-(-self._layout.longest // 2**i) for i in range(_HALVES)}
        self._single = [  # layouts of one item in a row
            dataclasses.replace(self._layout, width=self._layout.head + width, per_row=1)
            for width in sorted(widths)
        ]
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
            pooled: whether to return the embeddings before normalisation.
            rows: the last is the most items of a call. With one size, an item's embedding is the
                same to the bit whatever it is encoded with.
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
            part, failed = slice(start, start + _AT_A_TIME), {}
            vectors[part], cut[part] = self._encode(items[part], pooled, rows, failed, kind)
            if failed and problems is None:
                number = min(failed)
                raise ValueError(f"item {start + number}: {failed[number]}")
            for number, problem in failed.items():
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
        lengths = self._layout.own_tokens(inputs)
        if not self._input.prompts.head:
            for number in np.flatnonzero(lengths == 0).tolist():
                problems.setdefault(number, "expected a text or a picture, got neither")
        whole = np.setdiff1d(np.arange(len(items)), list(problems))
        pending: list[tuple[_Block, jax.Array]] = []
        for block in self._blocks(lengths, whole, rows):
            taken = jax.tree.map(lambda x, some=block.items: x[some], inputs)
            pending.append((block, self._embedded(taken, block, pooled)))
            if len(pending) > 1:  # one is fetched while the next is computed
                self._take(out, *pending.pop(0))
        for block, outputs in pending:
            self._take(out, block, outputs)
        return Encoded(out, cut)

    def programs(self, rows: tuple[int, ...] = ROWS) -> list[Callable[[], Any]]:
        """Calls that compile all that `encode` of texts may need, one program each."""
        images, none = self._input.images, np.zeros(0, np.int32)
        nothing = Inputs(np.zeros((0, self._input.max_length), np.int32), none)
        if images is not None:
            vectors = np.zeros((0, images.per_item, images.width), np.float16)
            nothing = nothing.replace(images=vectors, image_count=none)
        empty = functools.partial(_Block, none, fitted=row_layout.Fit(none, none, none, none))
        each = -(-rows[0] // self._shards) if len(rows) == 1 else 1
        blocks = [empty(layout=x, rows=each, at=none, slots=each) for x in self._single]
        if len(rows) > 1:
            most = self._row_count(self._layout.most_rows(rows[-1]))
            for count in (2**i for i in range(most.bit_length())):
                slots = self._slots(count, rows)
                blocks.append(empty(layout=self._layout, rows=count, at=none, slots=slots))

        def run(block: _Block) -> None:
            jax.block_until_ready(self._embedded(nothing, block, pooled=False))

        return [functools.partial(run, block) for block in blocks]

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """What `Item.images` may hold in place of an image file; for other threads, too.

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

    def _take(self, out: np.ndarray, block: "_Block", outputs: jax.Array) -> None:
        out[block.items] = jax.device_get(outputs)[block.at]

    def _row_count(self, rows: int) -> int:
        """Rows of a device, where all need so many: a power of two."""
        return 1 << (-(-rows // self._shards) - 1).bit_length()

    def _slots(self, count: int, rows: tuple[int, ...]) -> int:
        """Slots of a device with so many rows."""
        return min(count * self._layout.per_row, rows[-1])

    def _blocks(
        self, lengths: np.ndarray, chosen: np.ndarray, rows: tuple[int, ...]
    ) -> Iterator["_Block"]:
        """How some items, i[m], are divided into blocks, of the lengths i[n] of all."""
        size = rows[-1]
        if len(rows) == 1:
            fitting = np.searchsorted([layout.places for layout in self._single], lengths[chosen])
            for number, layout in enumerate(self._single):
                left = chosen[fitting == number]
                for start in range(0, len(left), size):
                    yield self._block_of_single(left[start : start + size], layout, size)
            return
        for start in range(0, len(chosen), size):
            items = chosen[start : start + size]
            if len(items) <= self._shards:
                most = lengths[items].max()
                layout = next(x for x in self._single if most <= x.places)
                yield self._block_of_single(items, layout, self._shards)
                continue
            fitted = row_layout.fit(self._layout, lengths[items])
            count = self._row_count(fitted.rows)
            slots, device = self._slots(count, rows), fitted.row % self._shards
            fitted = dataclasses.replace(fitted, group=device, row=fitted.row // self._shards)
            at, by_device = np.empty(len(items), np.int64), np.argsort(device, kind="stable")
            first = np.searchsorted(device[by_device], device[by_device])
            at[by_device] = device[by_device] * slots + np.arange(len(items)) - first
            yield _Block(items, self._layout, fitted, count, at, slots)

    def _block_of_single(self, items: np.ndarray, layout: row_layout.Layout, size: int) -> _Block:
        """Items in rows of their own, `size` of them over all devices."""
        each, number = -(-size // self._shards), np.arange(len(items))
        zero, group, row = 0 * number, number % self._shards, number // self._shards
        fitted = row_layout.Fit(group, row, zero, zero)
        return _Block(items, layout, fitted, each, group * each + row, each)

    def _embedded(self, items: Inputs, block: "_Block", pooled: bool) -> jax.Array:
        rows = row_layout.compose(
            *(block.layout, items, block.fitted, block.rows),
            *(block.at, (block.slots * self._shards,), self._shards),
        )
        output = self._run(self._params, sharding.put_batch(rows, self._shards, self.mesh))
        return output.pooled if pooled else output.unit

    def _apply(self, params: Any, rows: Rows) -> Any:
        return self._model.apply({"params": params}, rows, method="encode")

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
    def _pictures(self) -> PictureVectors:
        return PictureVectors(self.artifact.folder, self._input.images)

    def _load(self, source: hf.ModelSource, sizes: Any) -> Any:
        boxed = jax.eval_shape(lambda: dual.init_params(self._model, 0))
        dtype = jnp.dtype(json_files.read(source.folder / "config.json").get("dtype", "float32"))
        abstract = jax.tree.map(
            lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=split),
            meta.unbox(boxed),
            sharding.of_params(boxed, self.mesh),
        )
        params = {"backbone": hf_weights.load_params(source, sizes, abstract["backbone"])}
        if "projection" in abstract:
            stored = hf_weights.load_projection(source, self._input.images.width)
            if stored is None:
                raise ValueError(
                    f"{source.folder}: expected a {hf_weights.PROJECTION}, as a model with images "
                    "has one, found none; export it again"
                )
            params["projection"] = {
                name: sharding.put(stored[name].astype(leaf.dtype), leaf.sharding)
                for name, leaf in traverse_util.flatten_dict(
                    abstract["projection"], sep="/"
                ).items()
            }
        return params


def _problem_of(item: Item, with_images: bool) -> str | None:
    """Why an item cannot be encoded, before its pictures are decoded; None if it can be."""
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
