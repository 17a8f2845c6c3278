"""The train step: chunks, devices, tables, and what is compared with what."""

import copy
import functools

import jax
import numpy as np
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.data import batches
from xmc_jax.runtime import sharding
from xmc_jax.training import build, loop, objective
from xmc_jax.training.run import Run
from xmc_jax.training.step import in_chunks

ALL_LABELS = {
    "train": {"labels": "all"},
    "prime": {"combiner": "sum", "free_vector_init": "zero"},
    "loss": {"kind": "decoupled_softmax", "label_to_document": 0.0},
}


def make(fields, devices=None, **sections) -> Run:
    """A program of `fields` with sections changed, on some of the devices."""
    fields = copy.deepcopy(fields)
    for name, values in sections.items():
        fields[name] |= values
    config = RunConfig.from_dict(fields)
    return Run(config, build.data(RunConfig.from_dict(fields)), devices=jax.devices()[:devices])


def run(program: Run, steps: int):
    """The state after some steps in order of the documents, and the last metrics."""
    state = program.initial_state()
    order = batches.complete(
        np.arange(program.data.num_documents, dtype=np.int32), program.config.train.batch_size
    )
    metrics = {}
    for i in range(steps):
        batch = program.put(program.sampler.build(order, i, i))
        state, metrics = program.train_step(state, program.frozen, batch)
    return jax.device_get((state, metrics))


def assert_close(ours, theirs, tolerance=1e-5, rtol=1e-4):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=rtol, err_msg=str(path))


@pytest.fixture(scope="module")
def without_dropout(fields) -> dict:
    fields = copy.deepcopy(fields)
    fields["encoder"]["dropout"] = fields["prime"]["dropout"] = 0.0
    fields["train"]["positives_per_document"] = 2
    return fields


@pytest.fixture(scope="module")
def on_one_device(without_dropout):
    """A function: two steps at once, on one device, with labels "sampled" or "all"."""
    sections = {"sampled": {}, "all": ALL_LABELS}
    return functools.cache(lambda labels: run(make(without_dropout, 1, **sections[labels]), 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "sections"),
    [pytest.param("sampled", {}, marks=pytest.mark.scale), ("all", ALL_LABELS)],
    ids=["sampled", "all"],
)
def test_chunks_and_devices_do_not_change_a_step(without_dropout, on_one_device, labels, sections):
    whole, metrics = on_one_device(labels)
    sections = copy.deepcopy(sections)
    sections.setdefault("train", {})["n_chunks"] = 4
    # Adam divides by the root of the second moment, which for a gradient near 0 is rounding: the
    # parameters are compared through the losses of the next step and through the bank.
    parts, found = run(make(without_dropout, 2, **sections), 2)
    assert_close(metrics, found)
    assert_close(whole.tables.document_bank, parts.tables.document_bank)
    assert not np.allclose(whole.tables.document_bank[:40], 0)


@pytest.mark.scale
@pytest.mark.parametrize(
    ("labels", "sections"), [("sampled", {}), ("all", ALL_LABELS)], ids=["sampled", "all"]
)
def test_blocks_of_the_loss_do_not_change_a_step(without_dropout, on_one_device, labels, sections):
    """On one device at once, on 8 devices in 5 blocks."""
    loss = sections.get("loss", {})
    whole, metrics = on_one_device(labels)
    blocks, found = run(make(without_dropout, 8, **sections | {"loss": loss | {"block": 8}}), 2)
    assert_close(metrics, found)
    assert_close(whole.tables.document_bank, blocks.tables.document_bank)


def test_blocks_of_the_loss_that_do_not_divide_are_refused(fields):
    with pytest.raises(ValueError, match=r"loss\.block: .*the 40 documents .*the 8 shards.*got 20"):
        make(fields, loss={"block": 20})


def test_chunks_refuse_a_batch_they_do_not_divide():
    with pytest.raises(ValueError, match="divisor of the 6 rows of a data shard, got 4"):
        in_chunks(lambda params, x, key: x, None, np.zeros((6, 2)), jax.random.key(0), 4)


def test_chunks_keep_the_order_of_rows():
    x = np.arange(24.0).reshape(12, 2)
    out = in_chunks(lambda params, x, key: x * params, 2, x, jax.random.key(0), 3)
    np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.slow
def test_documents_meet_all_labels_without_their_own_part_of_the_centroids(fields):
    """Similarities of the step against a loop over (document, label) pairs."""
    sections = copy.deepcopy(ALL_LABELS) | {"encoder": {"dropout": 0.0}}
    program = make(fields, **sections)
    state = program.initial_state()
    order = np.arange(program.data.num_documents, dtype=np.int32)
    batch = program.sampler.build(order, 1, 1)
    params = state.params | {
        "free_vectors": jax.random.normal(jax.random.key(1), state.params["free_vectors"].shape)
    }

    def compared(*arguments):
        pairs = program.step._with_all(*arguments)
        return pairs.document, objective.similarities(pairs)

    unit, (raw, prototype, relevance) = jax.device_get(
        jax.jit(sharding.under(program.mesh, compared))(
            params, state.tables, batch, jax.random.key(0)
        )
    )
    positives = program.data.positives("train")
    t = jax.device_get(state.tables)

    def length_one(x):
        return x / max(np.linalg.norm(x), 1e-12)

    for i, document in enumerate(batch.document_ids):
        mine = positives.indices[positives.indptr[document] : positives.indptr[document + 1]]
        np.testing.assert_array_equal(np.flatnonzero(relevance[i]), mine)
        for label in range(program.data.num_labels):
            members = [d for d in order if label in positives.take(np.array([d])).indices]
            others = [d for d in members if d != document or label not in mine]
            centroid = t.document_bank[others].mean(0) if others else np.zeros(unit.shape[1])
            text = length_one(t.label_bank[label])
            free = np.asarray(params["free_vectors"])[t.free_vector_of[label]]
            expected = unit[i] @ length_one(text + free + length_one(centroid))
            np.testing.assert_allclose(prototype[i, label], expected, atol=1e-5)
            np.testing.assert_allclose(raw[i, label], unit[i] @ text, atol=1e-5)
        if i == 5:
            break


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections", [{"train": {"positives_per_document": 2}}, ALL_LABELS], ids=["sampled", "all"]
)
def test_without_padding_a_step_is_the_same(fields, sections):
    """Also where labels are sampled for several documents, which packed are encoded once."""
    fields = copy.deepcopy(fields)
    fields["encoder"]["dropout"] = fields["prime"]["dropout"] = 0.0
    # The update is the gradient: Adam's would be rounding where that is near 0.
    fields["optimizer"] |= {"b1": 0.0, "b2": 0.0, "eps": 1e6, "warmup_steps": 0}
    fields["optimizer"]["lr"] = ((".*", 1e6),)
    fields["optimizer"]["weight_decay"] = ((".*", 0.0),)
    sections = copy.deepcopy(sections)
    program = make(fields, **sections)
    start = jax.device_get(program.initial_state())
    packed, metrics = run(program, 1)
    sections.setdefault("train", {})["packed"] = False
    padded, expected = run(make(fields, **sections), 1)
    assert 0 < metrics.pop("tokens") <= expected.pop("tokens")
    assert_close(metrics, expected)
    moves = jax.tree.map(lambda after, before: np.abs(after - before).max(), padded, start)
    largest = max(jax.tree.leaves(moves.params))
    assert largest > 0.01  # parameters are around 1, and have so many digits
    assert_close(packed.params, padded.params, 1e-5 * largest + 2e-7, rtol=0)
    assert_close(packed.tables, padded.tables)
    batch = program.sampler.build(np.arange(200, dtype=np.int32), 0, 0)
    assert (batch.items.slots % batch.items.per_row).any()  # some share a row
    if batch.columns is not None:
        assert len(np.unique(batch.columns)) < len(batch.columns)  # some were sampled twice


def test_ema_centroids_need_sampled_labels(fields):
    with pytest.raises(ValueError, match=r"tables\.centroids: expected 'stale' or 'exact'"):
        make(fields, train={"labels": "all"}, tables={"centroids": "ema"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "centroids", ["stale", pytest.param("exact", marks=pytest.mark.scale), "ema"]
)
def test_centroids_at_the_boundary(fields, centroids):
    program = make(fields, tables={"centroids": centroids})
    state = program.initial_state()
    start = jax.device_get(state.tables)
    np.testing.assert_allclose(start.document_bank, program.embed(state.params, "train"), atol=1e-6)
    order = np.arange(program.data.num_documents, dtype=np.int32)
    batch = program.sampler.build(order, 0, 0)
    if centroids == "ema":
        batch.relevance[0] = False  # as of a document without labels, for which one is drawn
    batch = program.put(batch)
    state, _ = program.train_step(state, program.frozen, batch)
    before = jax.device_get(state)
    after = jax.device_get(program.boundary(state, 0))
    assert after.boundaries == 1
    seen = np.zeros(len(order), bool)
    seen[:40] = True
    assert np.all(before.tables.document_bank[~seen] == start.document_bank[~seen])
    assert not np.any(
        np.all(before.tables.document_bank[seen] == start.document_bank[seen], axis=1)
    )
    exact = program.embed(after.params, "train")
    positives = program.data.positives("train")
    member = np.zeros((program.data.num_labels, len(order)))
    member[positives.indices, positives.row_ids()] = 1

    def means(bank):
        return member @ bank / member.sum(1, keepdims=True)

    if centroids == "stale":
        np.testing.assert_array_equal(after.tables.document_bank, before.tables.document_bank)
        np.testing.assert_allclose(
            after.tables.centroids, means(before.tables.document_bank), atol=1e-5
        )
    elif centroids == "exact":
        np.testing.assert_allclose(after.tables.document_bank, exact, atol=1e-5)
        np.testing.assert_allclose(after.tables.centroids, means(exact), atol=1e-5)
    else:
        moved = np.any(before.tables.centroids != start.centroids, axis=1)
        np.testing.assert_array_equal(
            np.flatnonzero(moved), np.unique(batch.label_ids[batch.columns][1:])
        )
        np.testing.assert_array_equal(after.tables.centroids, before.tables.centroids)
    # The last boundary is exact in every mode; its leaves come if another epoch does.
    epochs = program.config.train.epochs
    last = program.boundary(state, epochs - 1)
    np.testing.assert_allclose(last.tables.document_bank, exact, atol=1e-5)
    assert not np.array_equal(after.tables.leaf_order, before.tables.leaf_order)
    np.testing.assert_array_equal(last.tables.leaf_order, before.tables.leaf_order)
    given = jax.device_get(program.cluster(last, epochs - 1).tables.leaf_order)
    assert not np.array_equal(given, before.tables.leaf_order)
    np.testing.assert_array_equal(np.sort(given), order)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_step_of_each_phase(fields, tmp_path):
    """Random and clustered epochs, boundaries, evaluations, saves: warm after the second."""
    fields = copy.deepcopy(fields)
    fields["curriculum"] |= {"start": 0, "update_every": 1, "double_at": ()}
    program = make(fields)
    compiled = []
    epochs = []
    original = program.boundary

    def boundary(state, epoch):
        epochs.append(len(compiled))
        return original(state, epoch)

    program.boundary = boundary
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if "backend_compile" in event else None
    )
    try:
        loop.train(program, tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    assert epochs[0] > 0  # the listener hears
    # The first boundary, clustering and evaluation are between epochs[0] and epochs[1].
    assert epochs[2] == epochs[1] == len(compiled)


@pytest.mark.scale
@pytest.mark.slow
def test_parameters_may_be_split(fields):
    """A step on (2, 2, 2) devices is the step on one."""
    fields = copy.deepcopy(fields)
    fields["encoder"]["dropout"] = fields["prime"]["dropout"] = 0.0
    fields["prime"]["heads"] = 2
    split = make(fields, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    kernel = split.abstract.params["backbone"]["layers"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 32)
    bank = split.abstract.tables.document_bank
    assert bank.sharding.shard_shape(bank.shape) == (200, 4)
    state, metrics = run(split, 2)
    one, found = run(make(fields, 1), 2)
    assert_close(metrics, found)
    assert_close(state.tables.document_bank, one.tables.document_bank)


def test_meshes_that_do_not_divide_are_refused(fields):
    with pytest.raises(ValueError, match=r"train\.batch_size \(20,\): .*does not divide"):
        make(fields, train={"batch_size": 20})
