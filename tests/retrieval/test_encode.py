"""Encoding a split: order, padding, fixed shapes; to the host, a file, a table, a database."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax import report, sharding
from xmc_jax.retrieval import encode, exact
from xmc_jax.types import Inputs, Prompts

ONE = sharding.make_mesh(sharding.MeshConfig(1), jax.devices()[:1])
EIGHT = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))


class Texts:
    """Item i has tokens (i, 2i, 0) and length 2."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def own_tokens(self, ids, prompts):
        return 2 + ids % 7 + len(prompts.tail)

    def inputs(self, ids):
        tokens = np.stack([ids, 2 * ids, 0 * ids], axis=1).astype(np.int32)
        return Inputs(tokens=tokens, lengths=np.full(len(ids), 2, np.int32))


def encoder():
    """An encoder whose rows tell which item they came from, and the shapes it was traced with."""
    shapes = []

    @jax.jit
    def encode(inputs, ids):
        shapes.append(inputs.tokens.shape)
        columns = [inputs.tokens.sum(1), inputs.lengths, ids, 0 * ids]
        return jnp.stack(columns, 1).astype(jnp.bfloat16)

    return encode, shapes


def expected(ids):
    ids = np.asarray(ids)
    return np.stack([3 * ids, np.full(len(ids), 2), ids, 0 * ids], axis=1).astype(np.float32)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_all_items_in_order_with_one_shape(count, batch_size):
    one, shapes = encoder()
    with jax.transfer_guard("disallow"):
        rows = encode.to_host(one, encode.Items(Texts(count), batch_size, ONE))
    np.testing.assert_array_equal(rows, expected(range(count)))
    assert rows.dtype == np.float32
    assert shapes == [(batch_size, 3)]


def test_chosen_items():
    ids = [5, 0, 7, 7, 2]
    rows = encode.to_host(encoder()[0], encode.Items(Texts(9), 2, ONE), ids)
    np.testing.assert_array_equal(rows, expected(ids))


def test_streamed_to_a_file(tmp_path):
    out = tmp_path / "rows.npy"
    out.write_bytes(b"older")
    encode.to_file(encoder()[0], encode.Items(Texts(9), 4, EIGHT), out)
    np.testing.assert_array_equal(np.load(out, allow_pickle=False), expected(range(9)))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


@pytest.mark.parametrize("count", [3, 8, 21, 40])
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_tables_and_databases_hold_every_item_once(count, mesh):
    one, shapes = encoder()
    split = sharding.named((None, "table_width"), (count, 4), mesh, "table")
    abstract = jax.ShapeDtypeStruct((count, 4), jnp.float32, sharding=split)
    table = encode.to_table(one, encode.Items(Texts(count), 8, mesh), abstract)
    database = encode.to_database(one, encode.Items(Texts(count), 8, mesh), limit=3)
    assert table.sharding == split and table.dtype == np.float32
    np.testing.assert_array_equal(table, expected(range(count)))
    np.testing.assert_array_equal(exact.to_host(database), expected(range(count)))
    again = exact.from_table(table, mesh, 3)
    assert again.rows.sharding.is_equivalent_to(database.rows.sharding, 2)
    np.testing.assert_array_equal(exact.to_host(again), expected(range(count)))
    assert set(shapes) == {(8, 3)}


@pytest.mark.parametrize("count", [5, 21])
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_items_are_encoded_by_length(count, mesh, tmp_path):
    prompts, rooms = Prompts(head=(1, 2), tail=(3,)), []
    plain, _ = encoder()

    def one(inputs, ids):
        lengths = Texts.own_tokens(None, np.asarray(ids), prompts)
        (room,) = inputs.packing.classes
        rows = 8 // sharding.num_shards("batch", mesh)
        assert inputs.packing.padded and room[0] == rows and lengths.max() <= room[1]
        rooms.append(room[1])
        return plain(inputs.replace(packing=None), ids)

    items = encode.Items(Texts(count), 8, mesh, prompts, (5, 9))
    np.testing.assert_array_equal(encode.to_host(one, items), expected(range(count)))
    assert rooms == [5, 9, 9][-len(rooms) :]  # short ones first; of five items, in the last block
    chosen = [4, 2, 2, 0]
    np.testing.assert_array_equal(encode.to_host(one, items, chosen), expected(chosen))
    encode.to_file(one, items, tmp_path / "rows.npy")
    written = np.load(tmp_path / "rows.npy", allow_pickle=False)
    np.testing.assert_array_equal(written, expected(range(count)))
    split = sharding.named((None, "table_width"), (count, 4), mesh, "table")
    abstract = jax.ShapeDtypeStruct((count, 4), jnp.float32, sharding=split)
    np.testing.assert_array_equal(encode.to_table(one, items, abstract), expected(range(count)))
    database = encode.to_database(one, items, limit=3)
    np.testing.assert_array_equal(exact.to_host(database), expected(range(count)))


def test_nothing_to_encode_is_an_error():
    with pytest.raises(ValueError, match="got 0 items"):
        encode.to_host(encoder()[0], encode.Items(Texts(0), 4, ONE))


def test_progress_is_logged_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(report, "_PROGRESS_SECONDS", 0)
    with caplog.at_level("INFO"):
        encode.to_host(encoder()[0], encode.Items(Texts(9), 4, ONE, name="labels"))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"encoding labels: {count} of 3 blocks" for count in (1, 2)]
