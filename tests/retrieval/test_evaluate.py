"""Evaluation from embeddings to files, against dense scores written out."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from xmc_jax.config import AugmentedConfig, ScannConfig
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Split, Store
from xmc_jax.retrieval import evaluate as ev
from xmc_jax.retrieval.metrics import NAMES, metrics

N, M, L, D = 40, 17, 30, 8


def unit(seed, n):
    x = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


TEST, LABELS, TRAIN = unit(1, M), unit(2, L), unit(3, N)
# Every other document: its nearest label and its fifth, so that the filter bites.
NEAREST = np.argsort(-(TEST @ LABELS.T), axis=1)
FILTER = np.array([(i, NEAREST[i, r]) for i in range(0, M, 2) for r in (0, 4)], np.int32)


def csr(seed, n):
    """About three positives per row, the last row without any."""
    dense = np.random.default_rng(seed).random((n, L)) < 0.1
    dense[-1] = False
    indptr = np.concatenate([[0], np.cumsum(dense.sum(1))]).astype(np.int64)
    return Csr(indptr, np.nonzero(dense)[1].astype(np.int32), None, L), dense


@pytest.fixture
def store():
    def split(n):
        return Split(np.zeros((n, 4), np.int32), np.ones(n, np.uint16))

    return Store(
        folder=pathlib.Path("nowhere"),
        manifest={"dataset": "toy", "propensity": [0.6, 2.6]},
        digest="",
        train=split(N),
        test=split(M),
        label=split(L),
        _positives={"train": csr(4, N)[0], "test": csr(5, M)[0]},
        _filter={"test": FILTER},
    )


def allowed(pairs=FILTER):
    mask = np.ones((M, L), bool)
    mask[pairs[:, 0], pairs[:, 1]] = False
    return mask


def ranked(scores, k):
    """The k best labels with a score, -1 where there are fewer."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(scores, order, axis=1) > -np.inf, order, -1)


def dense_augmented(config, k, may, prior=None):
    """The formula with dense matrices: which items are mixed, one softmax, two sides, the rest."""
    may = may if prior is None else may & (prior > 0)
    a, b = np.where(may, TEST @ LABELS.T, -np.inf), TEST @ TRAIN.T
    both = np.concatenate([a, b], axis=1).astype(np.float64)
    if config.mode == "joint":
        cut = np.sort(both, axis=1)[:, -(config.labels + config.documents), None]
        kept = both >= cut
    else:
        kept = np.concatenate(
            [
                a >= np.sort(a, axis=1)[:, -config.labels, None],
                b >= np.sort(b, axis=1)[:, -config.documents, None],
            ],
            axis=1,
        )
    p = np.where(kept, np.exp(both / config.temperature), 0)
    p /= p.sum(1, keepdims=True)
    y = config.label_weight * p[:, :L] + (1 - config.label_weight) * p[:, L:] @ csr(4, N)[1]
    if prior is not None:
        y = y * prior**config.prior_weight
    return ranked(np.where(may, np.where(y > 0, y, a - 2), -np.inf), k)  # the rest by cosine


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("labels", [4, 12])  # below and above k
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("prior", [None, np.random.default_rng(6).integers(0, 5, L) / 2])
def test_equals_dense_evaluation(store, mode, labels, long, prior):
    pairs = FILTER
    if long:  # the filter takes nearly all labels from some documents, and all from one
        rows = np.repeat(np.arange(M), np.arange(M) * 5 % L)
        place = np.concatenate([np.arange(n * 5 % L) for n in range(M)])
        pairs = np.stack([rows, NEAREST[rows, place]], axis=1)
        pairs = np.concatenate([pairs, [(5, label) for label in range(L)]]).astype(np.int32)
    store, may = dataclasses.replace(store, _filter={"test": pairs}), allowed(pairs)
    mix = AugmentedConfig(
        mode=mode,
        labels=labels,
        documents=6,
        label_weight=0.6,
        prior=None if prior is None else "a file",
        prior_weight=0.7,
    )
    config = ev.EvalConfig(ks=(1, 3, 10), k=10, augmented=mix, query_block=4)
    result = ev.evaluate(TEST, LABELS, store, config, train=TRAIN, prior=prior)
    want = {
        "plain": ranked(np.where(may, TEST @ LABELS.T, -np.inf), 10),
        "augmented": dense_augmented(mix, 10, may, prior),
    }
    truth = store.positives("test")
    assert list(result.metrics) == ["plain", "augmented"]
    for row, ids in want.items():
        np.testing.assert_array_equal(result.ids[row], ids)
        assert result.metrics[row] == metrics(
            ids, truth.indptr, truth.indices, store.inverse_propensity, config.ks
        )
        scores = np.where(ids < 0, -2, result.scores[row])
        assert (np.diff(scores) <= 0).all()
    assert result.metrics["plain"] != result.metrics["augmented"]
    assert result.index == {}


def test_fewer_labels_than_predictions_are_padded(store):
    result = ev.evaluate(
        TEST, LABELS, store, ev.EvalConfig(augmented=AugmentedConfig(enabled=False))
    )
    assert list(result.metrics) == ["plain"]
    assert result.ids["plain"].shape == (M, 100)
    np.testing.assert_array_equal((result.ids["plain"] >= 0).sum(1), allowed().sum(1))
    assert result.metrics["plain"]["R@100"] == pytest.approx((M - 1) / M, abs=0.1)


def test_scann_gives_the_same_predictions_and_reports_its_recall(store):
    pytest.importorskip("scann")
    config = ev.EvalConfig(augmented=AugmentedConfig(labels=10, documents=5), scann=ScannConfig())
    want = ev.evaluate(TEST, LABELS, store, config, train=TRAIN)
    got = ev.evaluate(TEST, LABELS, store, dataclasses.replace(config, index="scann"), train=TRAIN)
    assert got.index.keys() == {"labels", "documents"}
    assert got.index["labels"]["recall"] == 1
    for row in want.ids:
        np.testing.assert_array_equal(got.ids[row], want.ids[row])


def test_files_hold_what_was_found(store, tmp_path):
    config = ev.EvalConfig(ks=(1, 5), k=5, augmented=AugmentedConfig(labels=10, documents=5))
    result = ev.evaluate(TEST, LABELS, store, config, train=TRAIN)
    ev.write(result, tmp_path / "metrics.json", tmp_path / "predictions" / "12.npz")
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    with np.load(tmp_path / "predictions" / "12.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {
            f"{r}_{x}" for r in ("plain", "augmented") for x in ("ids", "scores")
        }
        for row in result.ids:
            np.testing.assert_array_equal(arrays[f"{row}_ids"], result.ids[row])
            np.testing.assert_array_equal(arrays[f"{row}_scores"], result.scores[row])
            assert arrays[f"{row}_ids"].dtype == np.int32
            assert arrays[f"{row}_scores"].dtype == np.float32


def test_tables():
    rows = {"zero-shot": {"P@1": 0.1152, "P@5": 0.05}, "trained": {"P@1": 1.0, "R@100": 0.71239}}
    assert ev.format_table(rows, ("P@1", "P@5", "R@100")) == "\n".join(
        [
            "              P@1   P@5  R@100",
            "zero-shot   11.52  5.00      -",
            "trained    100.00     -  71.24",
        ]
    )
    lines = ev.format_full_table(rows, (1, 5)).split("\n")
    assert lines[0].split() == ["zero-shot", "trained"]
    assert lines[1].split() == ["@1", "@5", "@1", "@5"]
    assert lines[2].split() == ["P", "11.52", "5.00", "100.00", "-"]
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)
    assert lines[0].index("trained") == lines[1].index("@1", 20) - 4


def test_bad_input_is_named(store):
    with pytest.raises(ValueError, match="expected 30 labels embeddings for toy, got 29"):
        ev.evaluate(TEST, LABELS[1:], store, ev.EvalConfig(), train=TRAIN)
    with pytest.raises(ValueError, match="expected train embeddings"):
        ev.evaluate(TEST, LABELS, store, ev.EvalConfig())


def test_documents_to_look_at_are_spread_evenly(monkeypatch):
    assert ev.sample(0).tolist() == [] and ev.sample(3).tolist() == [0, 1, 2]
    assert np.unique(np.diff(ev.sample(970_237))).tolist() == [19, 20]
    assert len(ev.sample(970_237)) == 50_000
    monkeypatch.setattr(ev, "_LOOKED_AT", 4)
    assert ev.sample(10).tolist() == [0, 2, 5, 7]


def test_predictions_of_some_documents(store, tmp_path):
    found = ev.evaluate(TEST, LABELS, store, ev.EvalConfig(), train=TRAIN)
    some = np.array([2, 3, 11])
    ev.write_predictions(found, tmp_path / "0.npz", some)
    with np.load(tmp_path / "0.npz", allow_pickle=False) as kept:
        np.testing.assert_array_equal(kept["documents"], some)
        for row, ids in found.ids.items():
            np.testing.assert_array_equal(kept[f"{row}_ids"], ids[some])
            np.testing.assert_array_equal(kept[f"{row}_scores"], found.scores[row][some])
