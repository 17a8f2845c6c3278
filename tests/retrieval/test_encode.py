"""Encoding a split: every item once, in one shape; to the host, a file, a table, a database."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import MeshConfig
from xmc_jax.data import rows as row_layout
from xmc_jax.data.types import NO_PROMPTS, Inputs
from xmc_jax.models import segments
from xmc_jax.retrieval import encode, exact
from xmc_jax.runtime import metrics_log, sharding

ONE = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
EIGHT = sharding.make_mesh(MeshConfig(2, 2, 2))
MESHES = pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
T = 7


class Texts:
    """Item i has 1 + i % 7 tokens, all of them i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def own_tokens(self, ids, prompts):
        return 1 + np.asarray(ids) % T

    def inputs(self, ids):
        lengths = self.own_tokens(ids, None).astype(np.int32)
        return Inputs(np.tile(np.asarray(ids, np.int32)[:, None], T), lengths)


def items(count, size, mesh=ONE, multiple=16, **fields):
    layout = row_layout.layout(NO_PROMPTS, "image_text", "contiguous", T, 0, multiple)
    return encode.Items(Texts(count), size, mesh, layout, **fields)


def encoder(mesh=ONE):
    """An encoder whose vectors tell which item they are of, and the shapes it was traced with."""
    shapes = []

    def one(rows, ids):
        shapes.append((rows.tokens.shape, rows.slots.shape))
        hidden = rows.tokens[..., None].astype(jnp.float32)
        mean = segments.pool(hidden, rows.segments, rows.per_row, rows.head, "mean")
        mean = segments.take(mean, rows.slots)
        return jnp.concatenate([mean, ids[:, None], 0 * mean, 0 * mean], axis=1)

    return jax.jit(sharding.under(mesh, one)), shapes


def expected(ids):
    ids = np.asarray(ids)
    return np.stack([ids, ids, 0 * ids, 0 * ids], axis=1).astype(np.float32)


def assert_of(rows, ids):
    np.testing.assert_allclose(rows, expected(ids), rtol=0, atol=1e-4)


@MESHES
@pytest.mark.parametrize(("count", "size"), [(100, 16), (10, 8), (3, 8), (1, 8)])
def test_all_items_in_order_with_one_shape(count, size, mesh):
    one, shapes = encoder(mesh)
    with jax.transfer_guard("disallow"):
        rows = encode.to_host(one, items(count, size, mesh))
    assert_of(rows, range(count))
    assert rows.dtype == np.float32
    ((tokens, slots),) = shapes
    if count == 100:
        assert tokens[1] == 16 and tokens[0] * 16 < 6 * slots[0] and slots[0] < 2 * size
    else:
        assert slots[0] <= 4 * count  # no more than there is


def test_with_a_row_for_each_item():
    one, shapes = encoder()
    assert_of(encode.to_host(one, items(10, 4, multiple=None)), range(10))
    assert shapes == [((4, T), (4,))]


def test_chosen_items():
    ids = [5, 0, 7, 7, 2]
    assert_of(encode.to_host(encoder()[0], items(9, 2), ids), ids)


def test_streamed_to_a_file(tmp_path):
    out = tmp_path / "rows.npy"
    out.write_bytes(b"older")
    encode.to_file(encoder(EIGHT)[0], items(9, 4, EIGHT), out)
    assert_of(np.load(out, allow_pickle=False), range(9))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


@MESHES
@pytest.mark.parametrize("count", [3, 8, 21, 40])
def test_tables_and_databases_hold_every_item_once(count, mesh):
    one, shapes = encoder(mesh)
    split = sharding.named((None, "table_width"), (count, 4), mesh, "table")
    abstract = jax.ShapeDtypeStruct((count, 4), jnp.float32, sharding=split)
    table = encode.to_table(one, items(count, 8, mesh), abstract)
    database = encode.to_database(one, items(count, 8, mesh), limit=3)
    assert table.sharding == split and table.dtype == np.float32
    assert_of(table, range(count))
    assert_of(exact.to_host(database), range(count))
    again = exact.from_table(table, mesh, 3)
    assert again.rows.sharding.is_equivalent_to(database.rows.sharding, 2)
    assert_of(exact.to_host(again), range(count))
    assert len(set(shapes)) <= 2


def test_nothing_to_encode_is_an_error():
    with pytest.raises(ValueError, match="got 0 items"):
        encode.to_host(encoder()[0], items(0, 4))


def test_progress_is_logged_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(metrics_log, "_PROGRESS_SECONDS", 0)
    with caplog.at_level("INFO"):
        encode.to_host(encoder()[0], items(9, 4, multiple=None, name="labels"))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"encoding labels: {count} of 3 blocks" for count in (1, 2)]
