"""Encode a split: fixed shapes, one block in flight, optionally streamed to disk."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from xmc_jax.data.store import Split
from xmc_jax.types import Inputs


def encode_split(
    encode_fn: Callable[[Inputs, jax.Array], jax.Array],
    split: Split,
    batch_size: int,
    put: Callable[[Any], Any],
    ids: np.ndarray | None = None,
    out: epath.PathLike | None = None,
) -> np.ndarray:
    """Embeddings of a split's items, in the order of `ids`.

    Every call has `batch_size` rows: the last one is completed with the first item and cut. A
    block is fetched while the next one is computed.

    Args:
        encode_fn: jitted (inputs, ids i32[b]) -> [b, D]; ids are for what a model keeps per item.
        split: the items.
        batch_size: rows per call.
        put: (inputs, ids), numpy -> the same on the devices.
        ids: i32[n] item numbers; all of them by default.
        out: .npy file to write, local or remote. The rows then go through a file in the folder for
            temporary files, and the returned array is mapped from it instead of held in memory.

    Returns:
        f32[n, D].

    Raises:
        ValueError: there is nothing to encode.
    """
    ids = np.arange(len(split), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    if not len(ids) or batch_size < 1:
        raise ValueError(
            f"encode: expected at least one item and one row per call, got {len(ids)} items and "
            f"batch_size {batch_size}"
        )
    if out is None:
        return _fill(encode_fn, split, batch_size, put, ids, np.empty)
    # The mapping outlives its deleted file.
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "rows.npy")

        def create(shape, dtype):
            return np.lib.format.open_memmap(local, mode="w+", shape=shape, dtype=dtype)

        rows = _fill(encode_fn, split, batch_size, put, ids, create)
        rows.flush()
        epath.Path(local).copy(epath.Path(out), overwrite=True)
    return rows


def _fill(encode_fn, split, batch_size, put, ids, create) -> np.ndarray:
    rows, pending = None, None
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        full = np.concatenate([part, np.full(batch_size - len(part), ids[0], np.int32)])
        block = encode_fn(*put((split.inputs(full), full)))
        if rows is None:
            rows = create((len(ids), block.shape[1]), np.float32)
        if pending is not None:
            _write(rows, *pending)
        pending = block, start, len(part)
    _write(rows, *pending)
    return rows


def _write(rows: np.ndarray, block: jax.Array, start: int, count: int) -> None:
    rows[start : start + count] = jax.device_get(block)[:count]
