"""Sequences without their padding: what is computed per token is computed for tokens only.

The sequences of a group, shortest first, follow each other on one axis of `Packing.tokens` places.
Attention alone sees them apart again, in classes of like length. All shapes are static; what does
not fit is never cut, but makes every embedding of its group NaN: the caller chooses a `Packing`
that fits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from xmc_jax.models import layers
from xmc_jax.types import Packing


@flax.struct.dataclass
class Packed:
    """Where everything lies, of g groups of m sequences of at most S places.

    A group is a device's part of a batch: nothing moves between them. Its tokens are `prefix`
    places that its sequences share, then `t = shape.tokens` of their own. `p` is the number of
    places of all classes, the sum of count times width.

    Attributes:
        lengths: i32[g, m], ascending; without the prefix.
        starts: i32[g, m], the first token of each.
        order: i32[g, m], which sequence of the group each of these is.
        source: i32[g, t], the place among [m * S] that a token is from; m * S past the last.
        read: i32[g, p], the token at each place of the classes; t where there is none.
        write: i32[g, t], the place in the classes of each token; p past the last.
        fits: bool[g], whether all tokens and sequences have room.
        shape: the room for them.
        width: S.
        prefix: places shared by all sequences, before their own.
    """

    lengths: jax.Array
    starts: jax.Array
    order: jax.Array
    source: jax.Array
    read: jax.Array
    write: jax.Array
    fits: jax.Array
    shape: Packing = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)
    prefix: int = flax.struct.field(pytree_node=False)

    def pack(self, x: jax.Array, fill: int = 0) -> jax.Array:
        """[g * m, S] -> [g, t] of what stands there, for integers; `fill` past the last token."""
        return _take(x.reshape(self.order.shape[0], -1), self.source, fill)

    def apart(self, x: jax.Array) -> list[jax.Array]:
        """[g, t, ...] -> [g * count, width, ...] of each class.

        Past the end of a sequence is 0; where every sequence has the room of its class, anything.
        """
        places = x if self.shape.padded else moved(x, self.read, self.write)
        groups, start, classes = len(x), 0, []
        for count, width in self.shape.classes:
            part = places[:, start : start + count * width]
            classes.append(part.reshape(groups * count, width, *x.shape[2:]))
            start += count * width
        return classes

    def together(self, classes: Sequence[jax.Array]) -> jax.Array:
        """The reverse of `apart`."""
        groups = len(self.order)
        places = [x.reshape(groups, -1, *x.shape[2:]) for x in classes]
        x = jnp.concatenate(places, axis=1)
        return x if self.shape.padded else moved(x, self.write, self.read)

    def class_lengths(self) -> list[jax.Array]:
        """i32[g * count] of each class."""
        start, classes = 0, []
        for count, _ in self.shape.classes:
            classes.append(self.lengths[:, start : start + count].reshape(-1))
            start += count
        return classes

    def with_images(self, x: jax.Array, images: jax.Array, numbers: jax.Array) -> jax.Array:
        """Token embeddings [g, prefix + t, D] with image embeddings in their places.

        Args:
            x: of tokens.
            images: [g * m, K, D], projected.
            numbers: i32[g * m, S], see `fusion.Sequence.images`.
        """
        groups, t = self.source.shape
        images = images.astype(x.dtype).reshape(groups, -1, x.shape[-1])
        number = self.pack(numbers + 1) - 1
        per_item = images.shape[1] // self.order.shape[1]
        source = self.source // self.width * per_item + number
        source = jnp.where(number >= 0, source, images.shape[1])
        target = jnp.full(images.shape[:2], t)
        target = target.at[jnp.arange(groups)[:, None], source].set(jnp.arange(t), mode="drop")
        placed = moved(images, source, target)
        own = jnp.where((number >= 0)[..., None], placed, x[:, self.prefix :])
        return jnp.concatenate([x[:, : self.prefix], own], axis=1)

    def in_order(self, x: jax.Array) -> jax.Array:
        """[g, m, D] of the sequences as they lie -> [g * m, D] in the order they came in."""
        back = jnp.argsort(self.order, axis=1)
        return moved(x, back, self.order).reshape(-1, *x.shape[2:])

    def attention(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        masks: Sequence[jax.Array],
        dropout: Callable[..., jax.Array],
        scale: float | None = None,
    ) -> jax.Array:
        """`layers.attention` within each sequence, which sees the prefix, too.

        Args:
            query: [g, prefix + t, H, W].
            key: [g, prefix + t, G, W].
            value: [g, prefix + t, G, W].
            masks: of each class, broadcastable to bool[g * count, 1, width, prefix + width]; before
                them that of the prefix, if there is one.
            dropout: see `layers.dropouts`.
            scale: see `layers.attention`.

        Returns:
            [g, prefix + t, H * W].
        """
        h, groups = self.prefix, len(query)
        own = zip(*(self.apart(x[:, h:]) for x in (query, key, value)))
        outputs, sequences = [], self._class_sequences()
        for (q, k, v), mask, number in zip(own, masks[bool(h) :], sequences):
            if h:
                k, v = (
                    jnp.concatenate([jnp.repeat(x[:, :h], len(y) // groups, axis=0), y], axis=1)
                    for x, y in ((key, k), (value, v))
                )
            drop = functools.partial(dropout, ids=self._ids(number, *q.shape[1:3], k.shape[1]))
            outputs.append(layers.attention(q, k, v, mask, drop, scale))
        y = self.together(outputs)
        if not h:
            return y
        first = layers.attention(*(x[:, :h] for x in (query, key, value)), masks[0], scale=scale)
        return jnp.concatenate([first, y], axis=1)

    def token_ids(self) -> jax.Array:
        """u32[g, prefix + t]: a number of each token that does not depend on how it is packed."""
        groups, m = self.order.shape
        own = self.source + jnp.arange(groups)[:, None] * (m * self.width)
        shared = jnp.arange(groups * self.prefix).reshape(groups, -1) + groups * m * self.width
        return jnp.concatenate([shared, own], axis=1).astype(jnp.uint32)

    def pool(self, hidden: jax.Array, pooling: str) -> jax.Array:
        """[g, prefix + t, D] -> [g * m, D], see `dual.EncoderConfig`; 0 or any number without one.

        Args:
            hidden: f32 or wider.
            pooling: "mean", "cls", "last" or "max".
        """
        h = self.prefix
        if pooling in ("mean", "max"):
            parts, groups = [], len(hidden)
            nothing = 0 if pooling == "mean" else -jnp.inf
            for x, length in zip(self.apart(hidden[:, h:]), self.class_lengths()):
                real = (jnp.arange(x.shape[1]) < length[:, None])[..., None]
                x = jnp.where(real, x, nothing)
                parts.append(x.sum(1) if pooling == "mean" else x.max(1))
            own = jnp.concatenate([x.reshape(groups, -1, x.shape[-1]) for x in parts], axis=1)
            count = (self.lengths + h)[..., None]
            if pooling == "mean":
                pooled = (own + hidden[:, :h].sum(1, keepdims=True)) / jnp.maximum(count, 1)
            else:
                shared = hidden[:, :h].max(1, keepdims=True, initial=-jnp.inf)
                pooled = jnp.where(count > 0, jnp.maximum(own, shared), 0)
        else:
            if pooling == "cls":
                place = jnp.zeros_like(self.starts) if h else self.starts
            else:
                place = h - 1 + jnp.where(self.lengths > 0, self.starts + self.lengths, 0)
            pooled = _take(hidden, jnp.clip(place, 0, hidden.shape[1] - 1))
        pooled = jnp.where(self.fits[:, None, None], pooled, jnp.nan)
        return self.in_order(pooled)

    def _class_sequences(self) -> list[jax.Array]:
        """i32[g * count] of each class, the number of its sequences among all."""
        groups, m = self.order.shape
        numbers, start, classes = self.order + m * jnp.arange(groups)[:, None], 0, []
        for count, _ in self.shape.classes:
            classes.append(numbers[:, start : start + count].reshape(-1))
            start += count
        return classes

    def _ids(self, number: jax.Array, T: int, H: int, S: int) -> Callable[[], jax.Array]:
        """Numbers of attention probabilities u32[n, H, T, S], as those of unpacked sequences."""
        whole = self.prefix + self.width

        def ids():
            head = number.astype(jnp.uint32)[:, None] * H + jnp.arange(H, dtype=jnp.uint32)
            query = head[..., None] * whole + self.prefix + jnp.arange(T, dtype=jnp.uint32)
            return query[..., None] * whole + jnp.arange(S, dtype=jnp.uint32)

        return ids


def place(lengths: jax.Array, width: int, shape: Packing, groups: int, prefix: int = 0) -> Packed:
    """Lays sequences out.

    Args:
        lengths: i32[n], without the prefix; 0 where there is none.
        width: S.
        shape: the room of a group; its classes have room for n / groups sequences.
        groups: g, parts of the n sequences in their order; divides n.
        prefix: see `Packed`.

    Raises:
        ValueError: `shape` is of another number of sequences.
    """
    n, t = len(lengths), shape.tokens
    m = n // groups
    if n % groups or sum(count for count, _ in shape.classes) != m:
        raise ValueError(
            f"packing: expected classes of {n} sequences in {groups} groups, got {shape.classes}"
        )
    lengths = lengths.reshape(groups, m)
    order = jnp.argsort(lengths, axis=1, stable=True).astype(jnp.int32)
    lengths = jnp.take_along_axis(lengths, order, axis=1)

    # Of every place of the classes, which are laid out ahead of time: its sequence, its number.
    widths = np.concatenate([np.full(count, width) for count, width in shape.classes])
    first = np.cumsum(widths) - widths
    row = np.repeat(np.arange(m), widths)
    number, p = np.arange(len(row)) - first[row], len(row)
    there = number < lengths[:, row]
    if shape.padded:
        starts, write = jnp.broadcast_to(first, lengths.shape), jnp.arange(p)[None]
        fits = True
    else:
        ends = jnp.cumsum(lengths, axis=1)
        starts, fits = ends - lengths, ends[:, -1] <= t
        read = jnp.where(there, starts[:, row] + number, t)
        # Of every token likewise: as many sequences end before it.
        ending = jnp.zeros((groups, t + 1), jnp.int32)
        ending = ending.at[jnp.arange(groups)[:, None], jnp.minimum(ends, t)].add(1)
        row = jnp.cumsum(ending, axis=1)[:, :t]
        there, row = row < m, jnp.minimum(row, m - 1)
        number = jnp.arange(t) - jnp.take_along_axis(starts, row, axis=1)
        write = jnp.where(there, jnp.asarray(first)[row] + number, p)
    source = order[:, row] if shape.padded else jnp.take_along_axis(order, row, axis=1)
    source = jnp.where(there, source * width + number, m * width)
    return Packed(
        lengths=lengths,
        starts=starts.astype(jnp.int32),
        order=order,
        source=source.astype(jnp.int32),
        read=(write if shape.padded else read).astype(jnp.int32),
        write=write.astype(jnp.int32),
        fits=(lengths <= widths).all(axis=1) & fits,
        shape=shape,
        width=width,
        prefix=prefix,
    )


@jax.custom_vjp
def moved(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """y[g, i] = x[g, source[g, i]], 0 where that is past the end; each row is read at most once.

    The gradient is read from where rows went to, instead of added to where they came from: a
    scatter is slow, and on accelerators in no defined order.

    Args:
        x: [g, a, ...].
        source: i32[g, b].
        target: i32[g, a], the reverse: where each row of x went to; b or more for nowhere.
    """
    del target
    return _take(x, source)


def _moved_forward(x, source, target):
    return _take(x, source), (source, target)


def _moved_backward(indices: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[Any, ...]:
    source, target = indices
    return moved(cotangent, target, source), None, None


moved.defvjp(_moved_forward, _moved_backward)


def _take(x: jax.Array, source: jax.Array, fill: int = 0) -> jax.Array:
    index = source.reshape(*source.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=fill)
