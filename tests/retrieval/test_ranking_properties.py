"""Evaluation, predictions and tuning of any few documents and labels, against `oracle`."""

import dataclasses
import pathlib
import types

import hypothesis
import jax
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from configs import vixml
from xmc_jax.config import AugmentedConfig, EvalConfig, MeshConfig, TuneConfig
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Split, Store
from xmc_jax.retrieval import evaluate, scann, tuning
from xmc_jax.runtime import sharding
from xmc_jax.shipping import artifact
from xmc_jax.shipping.predictor import Predictor, Query

D = 8
SMALL = st.integers(1, 20)
# What the recipes mix; and less than there is, so that labels follow and others are cut.
MIXES = {name: vixml.get_config(name).to_dict()["eval"]["augmented"] for name in ("tiny", "")}
settings = hypothesis.settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@st.composite
def mixes(draw) -> dict:
    fields = dict(draw(st.sampled_from(list(MIXES.values()))))
    if draw(st.booleans()):
        fields |= {"labels": draw(SMALL), "documents": draw(SMALL)}
        fields |= {"mode": draw(st.sampled_from(["split", "joint"]))}
        fields |= {name: draw(st.booleans()) for name in ("separate_softmax", "normalize_rows")}
        fields |= {"label_weight": draw(st.sampled_from([0.0, 0.5, 1.0])), "temperature": 0.2}
    return fields


@dataclasses.dataclass(frozen=True)
class Problem:
    """A few documents and labels.

    Attributes:
        test: f32[M, D], unit; likewise `labels` and `train`.
        positives: labels of each train document; likewise `truth` of each test document.
        excluded: labels that may not be predicted, by test document.
        prior: f64[L], or None.
    """

    test: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    positives: list[list[int]]
    truth: list[list[int]]
    excluded: list[list[int]]
    prior: np.ndarray | None

    def allowed(self, row: int) -> list[int]:
        return [i for i in range(len(self.labels)) if i not in self.excluded[row]]

    def augmented(self, row: int, allowed: list[int], mix: dict) -> dict:
        of = self.test[row].astype(np.float64), self.labels, self.train, self.positives
        return oracle.augmented(*of, allowed, mix, self.prior)


@st.composite
def problems(draw, most: int = 6) -> Problem:
    """Documents without labels, labels without documents, and documents that may have none."""
    M, N, L, P = draw(st.integers(1, most)), draw(SMALL), draw(SMALL), draw(SMALL)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))

    def unit(n: int) -> np.ndarray:
        x = generator.standard_normal((n, D)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def some(n: int, limit: int) -> list[list[int]]:
        counts = generator.integers(0, min(limit, L) + 1, n)
        return [np.sort(generator.choice(L, count, replace=False)).tolist() for count in counts]

    excluded = some(M, L) if draw(st.booleans()) else [[] for _ in range(M)]
    truth = [[i for i in row if i not in out] for row, out in zip(some(M, P), excluded)]
    if not any(truth):  # a ground truth without any is refused
        excluded[0], truth[0] = [], [0]
    prior = None
    if draw(st.booleans()):
        prior = generator.integers(0, 3, L).astype(np.float64)
    return Problem(unit(M), unit(L), unit(N), some(N, P), truth, excluded, prior)


def store_of(problem: Problem, validation: dict | None = None) -> Store:
    def split(x: np.ndarray) -> Split:
        return Split(np.zeros((len(x), 4), np.int32), np.ones(len(x), np.uint16))

    L = len(problem.labels)
    return Store(
        folder=pathlib.Path("nowhere"),
        manifest={
            "dataset": "toy",
            "propensity": [0.6, 2.6],
            "validation": validation,
            "files": {},
        },
        digest="",
        train=split(problem.train),
        test=split(problem.test),
        label=split(problem.labels),
        _positives={
            "train": Csr.of_rows(problem.positives, L),
            "test": Csr.of_rows(problem.truth, L),
        },
        _filter={"test": Csr.of_rows(problem.excluded, L).pairs().astype(np.int32)},
    )


def lists(ids: np.ndarray) -> list[list[int]]:
    """Labels of each row; none stands behind a missing one."""
    rows = [row[row >= 0].tolist() for row in ids]
    for row, found in zip(ids, rows):
        assert (row[len(found) :] == -1).all()
    return rows


def with_prior(problem: Problem, mix: dict) -> AugmentedConfig:
    prior = None if problem.prior is None else "a file"
    return AugmentedConfig(**mix | {"prior": prior})


@pytest.mark.slow
@settings
@hypothesis.given(problems(), mixes(), SMALL, st.sampled_from(["exact", "scann"]))
def test_evaluation(problem, mix, k, index):
    if index == "scann" and not scann.available():
        index = "exact"
    ks = tuple(sorted({1, min(3, k), k}))
    config = EvalConfig(ks=ks, k=k, index=index, augmented=with_prior(problem, mix))
    store = store_of(problem)
    found = evaluate.evaluate(
        problem.test, problem.labels, store, config, problem.train, prior=problem.prior
    )
    for name, ids in found.ids.items():
        ranked = lists(ids)
        for row, labels in enumerate(ranked):
            allowed = problem.allowed(row)
            if name == "plain":
                key = oracle.plain(problem.test[row].astype(np.float64), problem.labels, allowed)
            else:
                key = problem.augmented(row, allowed, mix)
            oracle.check(labels, key, k)
        expected = oracle.metrics(ranked, problem.truth, store.inverse_propensity, ks)
        assert found.metrics[name] == pytest.approx(expected, abs=1e-12)


def predictor_of(problem: Problem, mix: dict) -> Predictor:
    """A predictor of embeddings: no text is encoded."""
    names = [f"l{i}" for i in range(len(problem.labels))]
    documents = artifact.Documents(
        [], [], problem.train, Csr.of_rows(problem.positives, len(names))
    )
    opened = types.SimpleNamespace(
        folder=pathlib.Path("nowhere"),
        ranking=with_prior(problem, mix),
        labels=artifact.Labels(names, names, problem.labels, None, problem.prior),
        documents=documents,
        index=None,
    )
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return Predictor(opened, types.SimpleNamespace(mesh=mesh), "exact")


@pytest.mark.slow
@settings
@hypothesis.given(problems(), mixes(), SMALL, st.data())
def test_predictions(problem, mix, k, data):
    """With `only`, `exclude` and a predictor of some labels; alone and in company."""
    one, count = predictor_of(problem, mix), len(problem.labels)
    subsets = st.lists(st.integers(0, count - 1))  # in any order, some of them twice
    some = set(range(count))
    if data.draw(st.booleans()):
        some = set(data.draw(subsets))
        one = one.restricted(f"l{i}" for i in some)
    queries, allowed = [], []
    for row in range(len(problem.test)):
        only = data.draw(st.none() | subsets)
        queries.append(
            Query(
                "",
                only=None if only is None else [f"l{i}" for i in only],
                exclude=[f"l{i}" for i in [*problem.excluded[row], *problem.excluded[row][:2]]],
            )
        )
        may = some if only is None else some & set(only)
        allowed.append(sorted(may - set(problem.excluded[row])))
    for kind in ("plain", "augmented"):
        scores, rows = one.rank_embedded(problem.test, queries, k, kind, rows=(8,))
        assert rows.shape == (len(queries), min(k, len(some)))
        for row, labels in enumerate(lists(rows)):
            document = problem.test[row].astype(np.float64)
            if kind == "plain":
                key = oracle.plain(document, problem.labels, allowed[row])
            else:
                key = problem.augmented(row, allowed[row], mix)
            oracle.check(labels, key, k)
            assert (np.diff(scores[row, : len(labels)]) <= 0).all()
            alone = one.rank_embedded(
                problem.test[row : row + 1], queries[row : row + 1], k, kind, rows=(8,)
            )
            np.testing.assert_array_equal(alone[0][0], scores[row])
            np.testing.assert_array_equal(alone[1][0], rows[row])


@hypothesis.settings(settings, max_examples=15)
@hypothesis.given(problems(most=20), mixes(), SMALL)
def test_tuning(problem, mix, k):
    """Whatever is chosen, its metrics are those of an evaluation with it."""
    store = store_of(problem, validation={"fraction": 0.14, "seed": 0})
    config = EvalConfig(ks=(1, k), k=k, augmented=with_prior(problem, mix))
    tune = TuneConfig(metric=f"P@1+nDCG@{k}", folds=2)
    given = problem.test, problem.labels, problem.train, store, config, tune
    if len(problem.test) < 2:
        with pytest.raises(ValueError, match=r"tune\.folds: "):
            tuning.tune(*given, prior=problem.prior)
        return
    choice = tuning.tune(*given, prior=problem.prior)
    for name, mixed in (("defaults", choice.defaults), ("best", choice.best)):
        found = evaluate.evaluate(
            *given[:2],
            store,
            dataclasses.replace(config, augmented=mixed),
            problem.train,
            prior=problem.prior,
        )
        for metric, value in found.metrics["augmented"].items():
            assert choice.metrics[name][metric] == pytest.approx(value, abs=1e-12)
