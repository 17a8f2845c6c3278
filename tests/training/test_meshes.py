"""The train step on meshes: the same as on one device, and nothing as large as a table moves."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from xmc_jax.config import (
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PrimeConfig,
    TablesConfig,
)
from xmc_jax.data import rows
from xmc_jax.data.types import Batch, Inputs, Prompts, Rows
from xmc_jax.models import dual, layers
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import optimizer
from xmc_jax.training.state import Tables, TrainState
from xmc_jax.training.step import Step, in_chunks

STEPS = 10
B, T, K, E = 16, 6, 2, 5
# So many that not even a device's part of the smallest table is as large as anything that moves.
N, L, C = 64_000, 48_000, 32_000
ENCODER = BertConfig(
    vocab_size=50, hidden=32, layers=2, heads=8, ff=64, max_positions=12
).with_dropout(0.0)
DECODER = DecoderConfig(
    "qwen2", vocab_size=50, hidden=32, layers=2, heads=8, kv_heads=8, head_dim=4, ff=64
)
MODELS = {
    "encoder": dual.DualEncoder(ENCODER),
    "decoder": dual.DualEncoder(DECODER, remat="projections", lora=LoraConfig(rank=8, alpha=8.0)),
}
LAYOUTS = {
    "encoder": rows.layout(Prompts(), "image_text", "contiguous", T, K, 16),
    "decoder": rows.layout(
        *(Prompts(head=(1, 2), middle=(3,), tail=(4,)), "text_image", "contiguous", T, K, 16)
    ),
}
LORA_ONLY = ((".*/lora_[ab]", True), ("backbone/.*", False), (".*", True))


def mesh_of(*sizes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


class Run:
    """A step with PRIME and images, on a mesh; its arguments as shapes."""

    def __init__(
        self,
        kind: str,
        mesh: jax.sharding.Mesh,
        dtype=jnp.float32,
        labels: str = "sampled",
        block: int | None = None,
    ):
        self.mesh, self.labels, self.kind = mesh, labels, kind
        # Against all labels, the combiner of our recipe for it: one with parameters is computed for
        # every label, and its sums over `tensor` are as large as all of them.
        combiner = "transformer" if labels == "sampled" else "sum"
        self.model = MODELS[kind].clone(
            compute_dtype=jnp.dtype(dtype).name,
            image_width=E,
            prime=PrimeConfig(combiner=combiner, heads=8, ff_dim=16, dropout=0.0),
            num_free_vectors=C,
        )
        width = self.model.sizes.hidden
        lora = self.model.lora.rank > 0
        boxed = jax.eval_shape(lambda: dual.init_params(self.model, 0))
        params = jax.tree.map(
            lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=split),
            meta.unbox(boxed),
            sharding.of_params(boxed, mesh),
        )
        trainable = LORA_ONLY if lora else ((".*", True),)
        params, self.frozen = optimizer.partition(params, trainable)
        transform = optimizer.build(
            OptimizerConfig(
                lr=((".*", 1e-3),),
                weight_decay=((".*", 0.01),),
                warmup_steps=2,
                clip_norm=1.0 if lora else None,
            ),
            params,
            2 * STEPS,
        )
        step = Step(
            model=self.model,
            transform=transform,
            loss=LossConfig(num_negatives=5, prototype_to_document=0.5, block=block),
            tables=TablesConfig(),
            n_chunks=2 if lora else 1,
            seed=0,
        )
        whole = sharding.replicated(mesh)

        def place(shape, dtype=jnp.int32, split=whole):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

        def table(rows):
            shape = (rows, width)
            split = sharding.named((None, "table_width"), shape, mesh, "table")
            return place(shape, dtype, split)

        self.state = TrainState(
            step=place(()),
            boundaries=place(()),
            params=params,
            opt_state=optax.tree.map_params(
                transform,
                lambda leaf, param: place(leaf.shape, leaf.dtype, param.sharding),
                jax.eval_shape(transform.init, params),
                params,
                transform_non_params=lambda leaf: place(leaf.shape, leaf.dtype),
            ),
            tables=Tables(
                document_bank=table(N),
                centroids=table(L),
                label_bank=table(L) if labels == "all" else None,
                free_vector_of=place((L,)),
                leaf_order=place((N,)),
            ),
        )
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        train = jax.jit(
            sharding.under(mesh, step.train), donate_argnums=0, out_shardings=(places, whole)
        )
        batch = batch_of(0, labels, kind, mesh)
        batch = jax.tree.map(
            lambda x, split: place(x.shape, x.dtype, split), batch, sharding.of_batch(batch, mesh)
        )
        self.train = train.lower(self.state, self.frozen, batch).compile()

    def values(self) -> tuple[TrainState, dict]:
        """A state and frozen parameters, the same on every mesh."""

        def draw(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            rng = np.random.default_rng(list(name.encode()))
            if "opt_state" in name or not leaf.ndim:
                return np.zeros(leaf.shape, leaf.dtype)
            if name.endswith("free_vector_of"):
                return rng.integers(C, size=leaf.shape).astype(np.int32)
            if name.endswith("leaf_order"):
                return np.arange(*leaf.shape, dtype=np.int32)
            x = rng.standard_normal(leaf.shape)
            if "tables" in name:
                return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(leaf.dtype)
            return (name.endswith("scale") + 0.2 * x).astype(leaf.dtype)

        state, frozen = jax.tree_util.tree_map_with_path(draw, (self.state, self.frozen))
        return jax.device_put(
            (state, frozen), jax.tree.map(lambda leaf: leaf.sharding, (self.state, self.frozen))
        )

    def go(self, steps: int = STEPS) -> tuple[TrainState, TrainState, np.ndarray]:
        """The states before and after some steps, and the loss of each."""
        state, frozen = self.values()
        before, found = jax.device_get(state), []
        for i in range(steps):
            batch = batch_of(i, self.labels, self.kind, self.mesh)
            batch = jax.device_put(batch, sharding.of_batch(batch, self.mesh))
            state, metrics = self.train(state, frozen, batch)
            found.append(metrics["loss"])
        return before, jax.device_get(state), np.array(jax.device_get(found))


def batch_of(seed: int, labels: str, kind: str, mesh: jax.sharding.Mesh) -> Batch:
    rng = np.random.default_rng(100 + seed)

    def items() -> Inputs:
        return Inputs(
            tokens=rng.integers(5, 50, (B, T)).astype(np.int32),
            lengths=rng.integers(1, T + 1, B).astype(np.int32),
            images=rng.standard_normal((B, K, E)).astype(np.float16),
            image_count=rng.integers(0, K + 1, B).astype(np.int32),
        )

    def in_rows(*sides: Inputs) -> Rows:
        """Each document next to its label, in the chunk that it is in."""
        layout, chunks = LAYOUTS[kind], 2 if kind == "decoder" else 1
        shards = sharding.num_shards("batch", mesh)
        both = jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *sides)
        shard, within = np.divmod(np.arange(B), B // shards)
        group = np.repeat(shard * chunks + within % chunks, len(sides))
        fitted = rows.fit(layout, layout.own_tokens(both), group)
        most = layout.most_rows(len(group) // (shards * chunks))
        slots = B, len(sides)
        return rows.compose(layout, both, fitted, most, None, slots, shards * chunks, chunks)

    document_ids = rng.permutation(N)[:B].astype(np.int32)
    if labels == "all":
        positives = np.argsort(rng.random((B, L + 9)), axis=1)[:, :3].astype(np.int32).ravel()
        frequency = rng.integers(1, 4, 3 * B).astype(np.float32)
        return Batch(
            items=in_rows(items()),
            document_ids=document_ids,
            positives=np.minimum(positives, L),
            owners=np.repeat(np.arange(B, dtype=np.int32), 3),
            frequency=frequency,
        )
    label_ids = rng.integers(L, size=B).astype(np.int32)
    columns = np.arange(B, dtype=np.int32)
    columns[3] = columns[9]  # sampled twice
    drawn = label_ids[columns]
    return Batch(
        items=in_rows(items(), items()),
        document_ids=document_ids,
        label_ids=label_ids,
        columns=columns,
        relevance=(drawn[:, None] == drawn) | (rng.random((B, B)) < 0.05),
    )


@functools.cache
def on_one_device(kind: str, dtype, labels: str) -> tuple[TrainState, TrainState, np.ndarray]:
    return Run(kind, mesh_of(1, 1, 1), dtype, labels).go()


def norm(tree) -> float:
    return math.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))


def difference(ours, theirs):
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, ours, theirs)


def check(
    kind: str,
    sizes: tuple[int, int, int],
    dtype,
    labels: str = "sampled",
    block: int | None = None,
) -> None:
    """Ten steps on a mesh against ten on one device, and what moves between devices in a step."""
    with jax.enable_x64(dtype == jnp.float64):
        before, expected, losses_of_one = on_one_device(kind, dtype, labels)
        run = Run(kind, mesh_of(*sizes), dtype, labels, block)
        _, found, losses_here = run.go()
    width, devices = ENCODER.hidden, math.prod(sizes)
    largest = max(size for _, size in collectives(run.train.as_text()))
    # Documents are compared with all labels where these lie: a device's part of them changes hands.
    if labels == "sampled":
        assert largest < C * width / devices
    else:
        assert largest <= L * width / (sizes[0] * sizes[1])
    assert losses_here.dtype == dtype and len(set(losses_of_one)) == STEPS
    arrays = [(state.params, state.opt_state, state.tables) for state in (found, expected)]
    if dtype == jnp.float64:
        np.testing.assert_allclose(losses_here, losses_of_one, rtol=0, atol=1e-8)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(arrays[0]), jax.tree.leaves(arrays[1])
        ):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-8, err_msg=str(path))
    else:
        np.testing.assert_allclose(losses_here, losses_of_one, rtol=1e-5)
        update = norm(difference(expected.params, before.params))
        assert norm(difference(found.params, expected.params)) <= 1e-3 * update
        np.testing.assert_allclose(
            found.tables.document_bank, expected.tables.document_bank, rtol=0, atol=1e-5
        )
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(expected.params)):
        assert np.any(a != b)
    moved = np.any(before.tables.document_bank != expected.tables.document_bank, axis=1)
    assert np.count_nonzero(moved) > 5 * B


MESHES = [
    (2, 2, 2),
    *(pytest.param(s, marks=pytest.mark.scale) for s in ((8, 1, 1), (1, 8, 1), (1, 1, 8))),
]
SMALL = [pytest.param(s, marks=pytest.mark.scale) for s in ((2, 1, 1), (1, 2, 1), (1, 2, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES + SMALL, ids=str)
@pytest.mark.parametrize("kind", ["encoder", pytest.param("decoder", marks=pytest.mark.scale)])
def test_ten_steps_in_float64_are_those_of_one_device(kind, sizes):
    check(kind, sizes, jnp.float64)


@pytest.mark.scale
@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES + SMALL, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_ten_steps_in_float32_are_those_of_one_device(kind, sizes):
    check(kind, sizes, jnp.float32)


@pytest.mark.scale
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_ten_steps_against_all_labels_are_those_of_one_device(sizes):
    check("encoder", sizes, jnp.float32, "all")


@pytest.mark.scale
@pytest.mark.slow
@pytest.mark.parametrize("labels", ["sampled", "all"])
def test_ten_steps_in_blocks_of_the_loss_are_those_at_once(labels):
    check("encoder", (2, 2, 2), jnp.float64 if labels == "sampled" else jnp.float32, labels, 4)


COLLECTIVE = re.compile(
    r" = (?P<shapes>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and number of elements of every collective of a compiled program."""
    found = []
    for match in COLLECTIVE.finditer(program):
        sizes = [
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\w\[([\d,]*)\]", match["shapes"])
        ]
        found.append((match["kind"], sum(sizes)))
    return found


def compiled_on(mesh, function, *arguments) -> str:
    return jax.jit(sharding.under(mesh, function)).lower(*arguments).compile().as_text()


def on(mesh, *logical: str | None):
    """A function that puts an array on a mesh."""
    return lambda x: jax.device_put(x, sharding.named(logical, x.shape, mesh, "x"))


def test_gradients_are_summed_over_copies_once_a_step():
    mesh, rng = mesh_of(8, 1, 1), np.random.default_rng(0)
    w = rng.standard_normal((16, 16)).astype(np.float32)
    x = rng.standard_normal((32, 16)).astype(np.float32)

    def loss(w, x):
        y = in_chunks(lambda w, x, key: jnp.tanh(x @ w), w, x, jax.random.key(0), 4)
        return jnp.sum(y**2), y

    grad = jax.grad(loss, has_aux=True)
    expected, rows = jax.jit(grad)(w, x)
    np.testing.assert_allclose(rows, np.tanh(x @ w), rtol=0, atol=1e-5)
    arguments = on(mesh, None, None)(w), on(mesh, "batch", None)(x)
    got, rows_here = jax.jit(sharding.under(mesh, grad))(*arguments)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows_here, rows, rtol=0, atol=1e-5)
    program = compiled_on(mesh, grad, *arguments)
    over_copies = [
        line for line in program.splitlines() if "all-reduce(" in line and "psum" in line
    ]
    assert len(over_copies) == 1 and "/while/" not in over_copies[0]


def test_dropout_differs_between_copies():
    def draw(params, items, key):
        return items + jax.random.uniform(key, items.shape)

    def run(x):
        return in_chunks(draw, jnp.zeros(1), x, jax.random.key(0), 2)

    mesh, x = mesh_of(2, 1, 1), np.zeros((8, 1), np.float32)
    for drawn in (jax.jit(run)(x), jax.jit(sharding.under(mesh, run))(on(mesh, "batch", None)(x))):
        assert len(np.unique(np.round(drawn, 6))) == 8


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)], ids=str)
def test_rows_are_read_and_written_back_without_the_table(sizes):
    """Rows of a table, embeddings of tokens and their gradients: what moves is what is read."""
    mesh, rng = mesh_of(*sizes), np.random.default_rng(0)
    table = rng.standard_normal((4000, 16)).astype(np.float32)
    ids = rng.integers(4000, size=(8, 3)).astype(np.int32)
    reads = [(sharding.rows, "table_width")]
    if sizes[0] == 1:  # with copies, the gradient of an embedding table is summed over them
        reads.append((layers.lookup, "token_width"))
    for read, axis in reads:

        def loss(table, ids, read=read):
            rows = read(table, ids)
            return jnp.sum(rows**3), rows

        grad = jax.grad(loss, has_aux=True)
        arguments = on(mesh, None, axis)(table), on(mesh, "batch", None)(ids)
        got, rows = jax.jit(sharding.under(mesh, grad))(*arguments)
        expected, expected_rows = grad(table, ids)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        found = collectives(compiled_on(mesh, grad, *arguments))
        assert found and max(size for _, size in found) <= ids.size * 16


def test_rows_read_without_saying_how_move_a_part_of_the_table():
    """So that the tests of what moves can fail: XLA sums the gradient over `tensor`."""
    mesh, table = mesh_of(2, 2, 2), np.zeros((4000, 16), np.float32)
    by_width = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp")))
    ids = on(mesh, "batch")(np.arange(24, dtype=np.int32))
    grad = jax.grad(lambda table, ids: jnp.sum(table[ids] ** 3))
    program = jax.jit(grad, out_shardings=by_width).lower(jax.device_put(table, by_width), ids)
    found = collectives(program.compile().as_text())
    assert ("all-reduce", table.size // 4) in found


def test_the_largest_of_a_row_are_found_where_it_is():
    mesh = mesh_of(2, 2, 2)
    x = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)

    def largest(x):
        return sharding.by_row(lambda rows: jax.lax.top_k(rows, 3), x)

    split = on(mesh, "batch", None)(x)
    for a, b in zip(jax.jit(sharding.under(mesh, largest))(split), jax.lax.top_k(x, 3)):
        np.testing.assert_array_equal(a, b)
    assert not collectives(compiled_on(mesh, largest, split))


def test_loops_within_a_device_move_nothing():
    """What is whole is sent before, its gradient summed after, whatever axes split the rows."""
    mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(0)
    w = rng.standard_normal((16, 16)).astype(np.float32)
    x = rng.standard_normal((32, 16)).astype(np.float32)

    def loss(w, x):
        def loop(w, x):
            return jax.lax.map(lambda row: jnp.tanh(row @ w), x)

        return jnp.sum(sharding.on_shards(loop, w, x) ** 2)

    grad = jax.grad(loss, argnums=(0, 1))
    arguments = on(mesh, None, None)(w), on(mesh, "batch", None)(x)
    for got, expected in zip(jax.jit(sharding.under(mesh, grad))(*arguments), grad(w, x)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    program = compiled_on(mesh, grad, *arguments)
    moves = [line for line in program.splitlines() if COLLECTIVE.search(line)]
    assert len(moves) == 1 and "/while/" not in moves[0]
