"""Losses against short numpy versions written from the definitions."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import LossConfig, MeshConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import losses, objective
from xmc_jax.training.state import Pairs

# (rows, columns, negatives): fewer than there are, all there are, more than there are.
SHAPES = [(6, 9, 3), (7, 5, 5), (4, 12, 20), (9, 8, 7), (3, 16, 1)]
PROBLEMS = 200  # per shape


def problems(shape, dtype, seed=0):
    """Similarities, half of them with ties, relevance with odd rows, and the positives drawn."""
    rows, columns, _ = shape
    rng = np.random.default_rng([seed, rows, columns])
    s = rng.uniform(-1, 1, (2, PROBLEMS, rows, columns))
    s[:, ::2] = np.round(s[:, ::2] * 8) / 8
    relevance = rng.random((PROBLEMS, rows, columns)) < 0.3
    relevance[np.arange(PROBLEMS), :, rng.integers(columns, size=PROBLEMS)] = True
    relevance[::5, 0] = True  # no negatives
    relevance[::7, 1] = False  # no positives
    noise = rng.random(relevance.shape)
    positive = np.argmax(np.where(relevance, noise, -1), axis=2).astype(np.int32)
    s = s.astype(dtype)
    return s[0], s[1], relevance, positive


def hardest(s, y, k):
    negatives = np.flatnonzero(~y)
    return negatives[np.argsort(-s[negatives], kind="stable")][:k]


def numpy_margin(s, y, p, cfg):
    total, chosen, violating = 0.0, 0, 0
    for i in range(len(s)):
        n = hardest(s[i], y[i], cfg.num_negatives) if y[i].any() else np.array([], int)
        if len(n) == 0:
            continue
        gap = s[i, p[i]] - s[i, n]
        hinge = np.maximum(0, np.clip(np.abs(gap), cfg.margin_min, cfg.margin_max) - gap)
        chosen, violating = chosen + len(n), violating + np.sum(hinge > 0)
        if not cfg.weighted:
            total += hinge.mean()
        elif (hinge > 0).any():
            w = np.where(hinge > 0, np.exp(s[i, n] / cfg.weight_temperature), 0)
            total += np.sum(w * hinge) / w.sum()
    return total / len(s), violating / max(chosen, 1)


def numpy_softmax(s, y, t):
    total = 0.0
    for i in range(len(s)):
        negatives = np.exp(s[i, ~y[i]] / t).sum()
        terms = [-np.log(np.exp(x / t) / (np.exp(x / t) + negatives)) for x in s[i, y[i]]]
        total += np.mean(terms) if terms else 0.0
    return total / len(s)


def numpy_regularizer(raw, proto, y, p, cfg):
    a, b = [], []
    for i in range(len(raw)):
        if y[i].any():
            a.append(max(0, raw[i, p[i]] - proto[i, p[i]] + cfg.regularizer_margin))
            for n in hardest(proto[i], y[i], cfg.num_negatives):
                b.append(max(0, proto[i, n] - raw[i, n] + cfg.regularizer_margin))
    means = [np.mean([x for x in xs if x > 0] or [0.0]) for xs in (a, b)]
    return sum(means) / 2


@functools.partial(jax.jit, static_argnames="cfg")
def of_units(document, label, prototype, y, key, cfg):
    """The objective of unit embeddings."""
    return objective.objective(Pairs(document, label, prototype, relevance=y), key, cfg)


def margin_loss(similarity, relevance, positive, cfg):
    """The mean over rows, and the share of violators."""
    rows = losses.margin(similarity, relevance, positive, cfg)
    return rows.loss.mean(), rows.violators.sum() / jnp.maximum(rows.negatives.sum(), 1)


def check(ours, theirs, dtype):
    if dtype == np.float64:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [True, False])
def test_margin_loss_is_the_definition(weighted, dtype):
    with jax.enable_x64(dtype == np.float64):
        for shape in SHAPES:
            cfg = LossConfig(num_negatives=shape[2], weighted=weighted)
            s, _, y, p = problems(shape, dtype)
            ours = jax.jit(jax.vmap(lambda *a, cfg=cfg: margin_loss(*a, cfg)))(s, y, p)
            assert ours[0].dtype == dtype
            theirs = np.array(
                [numpy_margin(*problem, cfg) for problem in zip(s.astype(float), y, p)]
            )
            check(ours[0], theirs[:, 0], dtype)
            check(ours[1], theirs[:, 1], dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regularizer_is_the_definition(dtype):
    with jax.enable_x64(dtype == np.float64):
        for shape in SHAPES:
            cfg = LossConfig(num_negatives=shape[2])
            raw, proto, y, p = problems(shape, dtype)
            proto = (raw + 0.3 * proto).astype(dtype)  # so that some entries are zero
            ours = jax.jit(jax.vmap(lambda *a, cfg=cfg: objective.regularizer(*a, cfg)))(
                raw, proto, y, p
            )
            theirs = [
                numpy_regularizer(*problem, cfg)
                for problem in zip(raw.astype(float), proto.astype(float), y, p)
            ]
            check(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decoupled_softmax_is_the_definition(dtype):
    cfg = LossConfig(kind="decoupled_softmax", softmax_temperature=0.05)
    with jax.enable_x64(dtype == np.float64):
        for shape in SHAPES:
            s, _, y, p = problems(shape, dtype)
            ours = jax.jit(jax.vmap(lambda *a: losses.decoupled_softmax(*a, cfg).loss.mean()))(
                s, y, p
            )
            check(
                ours, [numpy_softmax(*problem, 0.05) for problem in zip(s.astype(float), y)], dtype
            )


def units(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["margin", "decoupled_softmax"])
def test_objective_is_the_weighted_sum_of_its_terms(kind):
    rng = np.random.default_rng(0)
    x, u, z = units(rng, 3, 8, 5)
    y = np.eye(8, dtype=bool)  # one positive each: nothing to draw
    p = np.arange(8)
    cfg = LossConfig(
        kind=kind,
        num_negatives=3,
        document_to_label=0.5,
        document_to_prototype=2.0,
        label_to_document=3.0,
        prototype_to_document=0.25,
        regularizer=0.7,
    )
    loss, metrics = of_units(x, u, z, y, jax.random.key(0), cfg)

    def term(s):
        if kind == "margin":
            return numpy_margin(s, y, p, cfg)[0]
        return numpy_softmax(s, y, cfg.softmax_temperature)

    raw, proto = x @ u.T, x @ z.T
    expected = {
        "document_to_label": term(raw),
        "document_to_prototype": term(proto),
        "label_to_document": term(raw.T),
        "prototype_to_document": term(proto.T),
        "regularizer": numpy_regularizer(raw, proto, y, p, cfg),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    total = sum(getattr(cfg, name) * value for name, value in expected.items())
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["similarity_positive"], proto[y].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["similarity_negative"], proto[~y].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["similarity_spread"], proto.std(), rtol=1e-5)
    violators = (
        numpy_margin(proto, y, p, cfg)[1]
        if kind == "margin"
        else (proto > np.diagonal(proto)[:, None])[~y].mean()
    )
    np.testing.assert_allclose(metrics["violators"], violators, rtol=1e-6)


def test_without_prototypes_only_the_first_term_remains():
    x, u = units(np.random.default_rng(1), 2, 6, 4)
    y = np.eye(6, dtype=bool)
    loss, metrics = of_units(x, u, None, y, jax.random.key(0), LossConfig())
    expected, violators = numpy_margin(x @ u.T, y, np.arange(6), LossConfig())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["violators"], violators, rtol=1e-6)
    assert set(metrics) == {
        *("loss", "document_to_label", "violators"),
        *("similarity_positive", "similarity_negative", "similarity_spread"),
    }


def test_objective_takes_several_positives_per_document_and_half_precision():
    rng = np.random.default_rng(2)
    x, u = units(rng, 4, 8), units(rng, 12, 8)
    y = np.repeat(np.eye(4, dtype=bool), 3, axis=1)
    loss, metrics = of_units(
        jnp.asarray(x, jnp.bfloat16), jnp.asarray(u, jnp.bfloat16), None, y, jax.random.key(0),
        LossConfig(),
    )  # fmt: skip
    assert loss.dtype == jnp.float32 and np.isfinite(loss)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_each_term_draws_its_own_positive():
    rng = np.random.default_rng(3)
    x, u = units(rng, 40, 8), units(rng, 40, 8)
    y = rng.random((40, 40)) < 0.5
    cfg = LossConfig(regularizer=0.0)

    def draw(key):
        return of_units(x, u, u, y, key, cfg)[1]

    one = draw(jax.random.key(0))
    # Prototypes equal label texts, so that only the drawn positives can tell the two terms apart.
    assert one["document_to_label"] != one["document_to_prototype"]
    assert one["document_to_label"] != draw(jax.random.key(1))["document_to_label"]
    assert one["document_to_label"] == draw(jax.random.key(0))["document_to_label"]


def test_draw_positive_is_uniform_among_the_positives():
    y = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    keys = jax.random.split(jax.random.key(0), 6000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: losses.draw_positive(y, key)))(keys))
    assert drawn.dtype == np.int32
    for row, positives in enumerate(y):
        share = np.bincount(drawn[:, row], minlength=5) / len(keys)
        assert np.all(share[~positives] == 0)
        np.testing.assert_allclose(share[positives], 1 / positives.sum(), atol=0.025)


def test_rows_of_a_matrix_draw_what_they_draw_with_all_of_it():
    y, key = np.random.default_rng(10).random((40, 30)) < 0.3, jax.random.key(1)
    whole = losses.draw_positive(y, key)
    drawn = jnp.where(y, jax.random.uniform(key, y.shape), -1)
    np.testing.assert_array_equal(whole, np.argmax(drawn, axis=1))
    rows = np.array([7, 3, 39])
    np.testing.assert_array_equal(losses.draw_positive(y[rows], key, rows), whole[rows])


def test_pairs_between_the_margins_have_half_a_gradient():
    # Gaps of 0.05, 0.2 and 0.5: hinge in force, margin equal to the gap, past the largest margin.
    s = jnp.array([[0.5, 0.45, 0.3, 0.0]], jnp.float32)
    y = np.array([[True, False, False, False]])
    p = np.array([0])
    cfg = LossConfig(num_negatives=3, weighted=False)
    value, grad = jax.value_and_grad(lambda s: margin_loss(s, y, p, cfg)[0])(s)
    np.testing.assert_allclose(value, 0.05 / 3, rtol=1e-5)
    np.testing.assert_allclose(grad[0], np.array([-1.5, 1.0, 0.5, 0.0]) / 3, rtol=1e-6)


def torch_terms(torch, raw, proto, y, p, cfg):
    """The reference's formulas in torch, for rows that have negatives enough."""
    rows = torch.arange(len(raw))

    def hinge(s):
        s_n, _ = torch.where(y, -50.0, s).topk(cfg.num_negatives, dim=1)
        gap = s[rows, p][:, None] - s_n
        margin = gap.abs().clamp(cfg.margin_min, cfg.margin_max).detach()
        return torch.maximum(torch.zeros_like(s_n), margin - gap), s_n

    t, s_n = hinge(raw)
    if cfg.weighted:
        w = torch.softmax(torch.where(t == 0, -50.0, s_n) / cfg.weight_temperature, dim=1)
        margin = (w * t).sum(1).mean()
    else:
        margin = t.mean()
    columns = torch.where(y, -50.0, proto).topk(cfg.num_negatives, dim=1).indices
    gain = proto - raw
    a = torch.relu(cfg.regularizer_margin - gain[rows, p])
    b = torch.relu(cfg.regularizer_margin + gain.gather(1, columns))
    return margin, (a.sum() / (a > 0).sum() + b.sum() / (b > 0).sum()) / 2


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_those_of_torch(weighted):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    raw, proto = rng.uniform(-0.5, 0.5, (2, 12, 20))
    raw[:3] -= 0.4 * (rng.random((3, 20)) < 0.9)  # rows without violators
    y = rng.random((12, 20)) < 0.2
    y[:, 0] = True
    raw[:3, 0] = 0.4
    p = np.zeros(12, np.int32)
    cfg = LossConfig(num_negatives=8, weighted=weighted)
    tensors = [torch.tensor(m, requires_grad=True) for m in (raw, proto)]
    theirs = sum(torch_terms(torch, *tensors, torch.tensor(y), torch.tensor(p).long(), cfg))
    theirs.backward()
    with jax.enable_x64(True):
        ours, grads = jax.value_and_grad(
            lambda raw, proto: (
                margin_loss(raw, y, p, cfg)[0] + objective.regularizer(raw, proto, y, p, cfg)
            ),
            argnums=(0, 1),
        )(jnp.asarray(raw), jnp.asarray(proto))
        np.testing.assert_allclose(ours, theirs.item(), rtol=1e-12)
        for ours, tensor in zip(grads, tensors):
            np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["margin", "decoupled_softmax"])
def test_gradients_stay_finite_without_negatives_or_positives(kind):
    x, u = units(np.random.default_rng(5), 2, 4, 3)
    y = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], bool)
    cfg = LossConfig(kind=kind)
    grad = jax.grad(lambda x: of_units(x, u, u, y, jax.random.key(0), cfg)[0])(x)
    assert np.all(np.isfinite(grad))


@pytest.mark.slow
@pytest.mark.parametrize("num_negatives", [2, 10])
def test_a_similarity_that_is_not_finite_shows_in_the_loss(num_negatives):
    x, u = units(np.random.default_rng(6), 2, 5, 3)
    x[2] = np.nan
    cfg = LossConfig(num_negatives=num_negatives)
    loss, _ = of_units(x, u, u, np.eye(5, dtype=bool), jax.random.key(0), cfg)
    assert np.isnan(loss)
    s = np.array([[0.9, 0.1, np.nan, 0.2]], np.float32)  # a negative alone
    loss, _ = margin_loss(s, s > 0.5, np.array([0]), cfg)
    assert np.isnan(loss)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_collapsed_run_is_seen_and_a_sound_one_is_not(weighted):
    rng = np.random.default_rng(7)
    cfg = LossConfig(weighted=weighted)
    y = np.eye(32, dtype=bool)
    x, u = units(rng, 2, 32, 16)
    same = units(rng, 1, 16) + 1e-3 * x
    same /= np.linalg.norm(same, axis=1, keepdims=True)

    def seen(document, label, cfg):
        _, metrics = of_units(document, label, label, y, jax.random.key(0), cfg)
        return losses.collapse({name: float(value) for name, value in metrics.items()}, cfg)

    message = seen(same, same[::-1], cfg)
    assert "--config.loss.num_negatives=200 --config.loss.weighted=False" in message
    assert "100 % of the negatives" in message
    assert seen(x, u, cfg) is None  # untrained: every negative violates, similarities differ
    assert seen(x, x, cfg) is None  # trained
    softmax = LossConfig(kind="decoupled_softmax")
    assert "smaller learning rate" in seen(same, same[::-1], softmax)
    assert seen(x, u, softmax) is None
    sound = {"similarity_spread": 5e-3, "similarity_negative": 0.95, "violators": 0.5}
    apart = 4e-3
    assert losses.collapse(sound, softmax, apart) is None  # training moves embeddings apart
    assert "training has collapsed" in losses.collapse(
        sound, softmax, 2 * sound["similarity_spread"]
    )


def test_a_loss_that_is_not_known_is_refused():
    x, u = units(np.random.default_rng(8), 2, 4, 3)
    with pytest.raises(ValueError, match=r"^loss.kind: expected one of margin, .*'triplet'"):
        of_units(x, u, u, np.eye(4, dtype=bool), jax.random.key(0), LossConfig(kind="triplet"))


def test_objective_refuses_what_does_not_fit():
    x, u = units(np.random.default_rng(8), 2, 4, 3)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"one shape .*got \(4, 4\), \(4, 4\) and \(5, 5\)"):
        of_units(x, u, None, np.eye(5, dtype=bool), key, LossConfig())
    with pytest.raises(ValueError, match=r"one shape .*got \(4, 4\), \(4, 3\) and \(4, 4\)"):
        of_units(x, u, u[:3], np.eye(4, dtype=bool), key, LossConfig())
    off = dataclasses.replace(LossConfig(), document_to_label=0.0)
    with pytest.raises(ValueError, match="every loss weight in use is 0"):
        of_units(x, u, None, np.eye(4, dtype=bool), key, off)


def pairs_of(labels: str, dtype=np.float64) -> Pairs:
    """Of 32 documents: labels sampled for them, with or without prototypes, or all labels."""
    rng = np.random.default_rng(9)
    count = 83 if labels == "all" else 64  # which no number of blocks divides
    x, u, z = (units(rng, n, 5).astype(dtype) for n in (32, count, count))
    if labels == "all":
        positives = np.argsort(rng.random((32, count)), axis=1)[:, :3].astype(np.int32)
        positives[::3, 1:] = count
        own = rng.uniform(-1, 1, positives.size).astype(dtype)
        owners = np.repeat(np.arange(32, dtype=np.int32), 3)
        return Pairs(x, u, z, positives=positives.ravel(), owners=owners, positive_cosines=own)
    y = (np.arange(32)[:, None] == np.arange(count) // 2) | (rng.random((32, count)) < 0.1)
    y[3] = False  # without positives
    y[4] = True  # without negatives
    return Pairs(x, u, z if labels == "sampled" else None, relevance=y)


@functools.cache
def at_once(labels: str, cfg: LossConfig):
    """`with_gradients` in float64, without blocks."""
    return with_gradients(pairs_of(labels), jax.random.key(3), cfg)


@functools.cache
def in_blocks(labels: str, cfg: LossConfig):
    """`with_gradients` in float64, of 8 documents at a time."""
    return with_gradients(pairs_of(labels), jax.random.key(3), dataclasses.replace(cfg, block=8))


def with_gradients(pairs: Pairs, key: jax.Array, cfg: LossConfig, mesh=None):
    """Loss, metrics and gradients; and the text of the program."""
    floats = {
        name: value
        for name, value in vars(pairs).items()
        if value is not None and np.issubdtype(value.dtype, np.floating)
    }

    def loss_of(floats, pairs, key):
        return objective.objective(pairs.replace(**floats), key, cfg)

    function = jax.value_and_grad(loss_of, has_aux=True)
    arguments = floats, pairs, key
    if mesh is not None:
        function = sharding.under(mesh, function)

        def put(x):
            divides = len(x) % sharding.num_shards("batch", mesh) == 0
            split = sharding.of_batch(x, mesh) if divides else sharding.replicated(mesh)
            return jax.device_put(x, split)

        placed = {name: put(x) for name, x in vars(pairs).items() if x is not None}
        arguments = {name: placed[name] for name in floats}, pairs.replace(**placed), key
    compiled = jax.jit(function).lower(*arguments).compile()
    return jax.device_get(compiled(*arguments)), compiled.as_text()


def assert_same(ours, theirs, rtol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        assert np.any(b)
        largest = max(np.abs(b).max(), 1e-3)  # cosines cancel in a mean
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest, err_msg=str(path))


VARIANTS = [
    {},
    {"kind": "decoupled_softmax"},
    pytest.param({"weighted": False}, marks=pytest.mark.slow),
    pytest.param({"num_negatives": 100}, marks=pytest.mark.slow),  # all there are
    {"document_to_prototype": 0.0, "document_to_label": 0.0, "regularizer": 0.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("labels", ["sampled", "all"])
def test_blocks_do_not_change_the_objective(labels, fields):
    cfg = LossConfig(**{"num_negatives": 4, "prototype_to_document": 0.5} | fields)
    with jax.enable_x64(True):
        assert_same(in_blocks(labels, cfg)[0], at_once(labels, cfg)[0], 1e-12)


@pytest.mark.parametrize("kind", ["margin", "decoupled_softmax"])
def test_blocks_do_not_change_the_objective_without_prototypes_and_in_float32(kind):
    cfg, key = LossConfig(kind=kind, num_negatives=4), jax.random.key(3)
    whole, _ = with_gradients(pairs_of("ngame", np.float32), key, cfg)
    blocks = dataclasses.replace(cfg, block=8)
    assert_same(with_gradients(pairs_of("ngame", np.float32), key, blocks)[0], whole, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("kind", ["margin", "decoupled_softmax"])
@pytest.mark.parametrize("labels", ["sampled", "all"])
def test_blocks_on_a_mesh_do_not_change_the_objective(labels, kind, sizes):
    cfg = LossConfig(kind=kind, num_negatives=4, prototype_to_document=0.5)
    mesh, key = sharding.make_mesh(MeshConfig(*sizes)), jax.random.key(3)
    with jax.enable_x64(True):
        whole, _ = at_once(labels, cfg)
        blocks = dataclasses.replace(cfg, block=8)
        found, program = with_gradients(pairs_of(labels), key, blocks, mesh)
    assert_same(found, whole, 1e-12)
    if labels == "sampled":  # everything is there before the blocks, and gradients are summed after
        moves = re.findall(r"^.* (?:all-|collective-|reduce-scatter).*$", program, re.MULTILINE)
        assert moves and not any("/while/" in line for line in moves)


@pytest.mark.parametrize("kind", ["margin", "decoupled_softmax"])
@pytest.mark.parametrize("labels", ["sampled", "all"])
def test_blocks_hold_no_number_of_every_pair(labels, kind):
    def largest(made):
        with jax.enable_x64(True):
            _, program = made(labels, cfg)
        shapes = re.findall(r"\b(?:f|s|u)(?:32|64)\[([\d,]+)\]", program)
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    cfg = LossConfig(kind=kind, num_negatives=4, prototype_to_document=0.5)
    count = 83 if labels == "all" else 64
    assert largest(at_once) >= 32 * count
    assert largest(in_blocks) <= 8 * (count + 1)  # one more, to which absent positives point


def test_blocks_are_chosen_from_the_number_of_similarities():
    cfg = LossConfig()
    for documents, labels, shards, expected in (
        (20, 30, 1, 1),
        (8192, 8192, 1, 1),  # 2^26 are not yet too many
        (16384, 16384, 1, 16),
        (16384, 16384, 4, 1),
        (32768, 32768, 8, 8),
        (2048, 1_300_000, 1, 32),  # 64 documents, whatever the labels
        (10_007, 10_007, 1, 10_007),  # a prime
    ):
        assert objective.num_blocks(documents, labels, cfg, shards) == expected
    assert objective.num_blocks(48, 10, LossConfig(block=16), 8) == 3
    for block, shards in ((32, 1), (96, 1), (4, 8)):
        with pytest.raises(
            ValueError, match=rf"loss\.block: .*48 documents.* {shards} sh.*{block}$"
        ):
            objective.num_blocks(48, 10, LossConfig(block=block), shards)
