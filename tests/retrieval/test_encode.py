"""Encoding a split: order, padding, fixed shapes, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.retrieval.encode import encode_split
from xmc_jax.types import Inputs


class Texts:
    """Item i has tokens (i, 2i, 0) and length 2."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def inputs(self, ids):
        tokens = np.stack([ids, 2 * ids, 0 * ids], axis=1).astype(np.int32)
        return Inputs(tokens=tokens, lengths=np.full(len(ids), 2, np.int32))


def encoder():
    """An encoder whose rows tell which item they came from, and the shapes it was traced with."""
    shapes = []

    @jax.jit
    def encode(inputs, ids):
        shapes.append(inputs.tokens.shape)
        return jnp.stack([inputs.tokens.sum(1), inputs.lengths, ids], 1).astype(jnp.bfloat16)

    return encode, shapes


def expected(ids):
    ids = np.asarray(ids)
    return np.stack([3 * ids, np.full(len(ids), 2), ids], axis=1).astype(np.float32)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_all_items_in_order_with_one_shape(count, batch_size):
    encode, shapes = encoder()
    with jax.transfer_guard("disallow"):
        rows = encode_split(encode, Texts(count), batch_size, jax.device_put)
    np.testing.assert_array_equal(rows, expected(range(count)))
    assert rows.dtype == np.float32
    assert shapes == [(batch_size, 3)]


def test_chosen_items_streamed_to_a_file(tmp_path):
    encode, _ = encoder()
    out = tmp_path / "rows.npy"
    out.write_bytes(b"older")
    ids = [5, 0, 7, 7, 2]
    rows = encode_split(encode, Texts(9), 2, jax.device_put, ids=ids, out=out)
    np.testing.assert_array_equal(rows, expected(ids))
    np.testing.assert_array_equal(np.load(out, allow_pickle=False), expected(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_nothing_to_encode_is_an_error():
    with pytest.raises(ValueError, match="got 0 items"):
        encode_split(encoder()[0], Texts(0), 4, jax.device_put)
