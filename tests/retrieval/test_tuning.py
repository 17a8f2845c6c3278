"""Choosing weights: every setting ranks as evaluation would, planted gains are found, noise not."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from xmc_jax.config import AugmentedConfig, EvalConfig, RunConfig, TuneConfig
from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import augmented, tuned, tuning
from xmc_jax.retrieval.metrics import NAMES, Truth

L, N = 60, 80
EVAL = EvalConfig(ks=(1, 3, 5, 10), k=20, augmented=AugmentedConfig(labels=10, documents=8))
TUNE = TuneConfig(labels=(5, 10), documents=(4, 8), temperature=(0.05, 0.2))


def sparse(dense: np.ndarray) -> Csr:
    indptr = np.concatenate([[0], np.cumsum(dense.sum(axis=1))]).astype(np.int64)
    return Csr(indptr, np.nonzero(dense)[1].astype(np.int32), None, dense.shape[1])


def retrieved(generator, M: int, count: int, K: int, excluded=None):
    """Random items with scores of few values; some rows have fewer, some none."""
    excluded = [()] * M if excluded is None else excluded
    orders = [generator.permutation(np.setdiff1d(np.arange(count), some)) for some in excluded]
    ids = np.stack([order[:K] for order in orders]).astype(np.int32)
    scores = -np.sort(-np.round(generator.uniform(-1, 1, (M, K)), 1), axis=1).astype(np.float32)
    for row, lacking in enumerate(generator.integers(0, K // 2, M)):
        if lacking:
            scores[row, -lacking:], ids[row, -lacking:] = -np.inf, -1
    return scores, ids


def problem(seed: int, M: int = 200):
    """What `choose` takes, with a truth that has nothing to do with what was retrieved."""
    generator = np.random.default_rng(seed)
    positives = generator.random((N, L)) < 0.08
    positives[3] = False
    truth = generator.random((M, L)) < 0.06
    filtered = [generator.permutation(L)[: 3 * (row % 2)] for row in range(M)]
    excluded = Csr.of_rows(filtered, L)
    truth[tuple(excluded.pairs().T)] = False
    labels, documents = retrieved(generator, M, L, 20, filtered), retrieved(generator, M, N, 14)
    for row, sides in ((0, (labels,)), (1, (documents,)), (2, (labels, documents))):
        for scores, ids in sides:
            scores[row], ids[row] = -np.inf, -1
    return labels, documents, sparse(positives), sparse(truth), excluded


def choose(problem, sources=None, prior=None, config=EVAL, tune=TUNE) -> tuning.Choice:
    count = problem[3].rows
    sources = np.arange(count) if sources is None else sources
    return tuning.choose(*problem, config, tune, np.ones(L), sources, prior)


@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_every_setting_ranks_as_evaluation_does(mode, k):
    """Settings that share work rank as each does alone, ties and excluded labels too."""
    labels, documents, positives, _, excluded = problem(k, M=150)
    prior = np.random.default_rng(7).integers(1, 4, L).astype(np.float64)
    settings = [
        AugmentedConfig(
            mode=mode,
            labels=numbers[0],
            documents=numbers[1],
            temperature=weights[0],
            label_weight=weights[1],
            separate_softmax=switches[0],
            normalize_rows=switches[1],
            prior_weight=prior_weight,
        )
        for numbers in (((4, 6), (11, 14)) if mode == "split" else ((4, 7),))
        for weights in ((0.05, 0.0), (0.05, 0.6), (0.3, 1.0))
        for switches in itertools.product((False, True), repeat=2)
        for prior_weight in (0.0, 0.7)
    ]
    found = (labels, documents, positives)
    mixture = augmented.Mixture(*found, mode, excluded, prior, reuse=True)
    for one, (scores, ids) in zip(settings, mixture.rank(settings, k)):
        want = augmented.rank(*found, one, k, excluded, prior)
        np.testing.assert_array_equal(ids, want[1], err_msg=str(one))
        np.testing.assert_array_equal(scores, want[0], err_msg=str(one))


def test_a_planted_optimum_is_found():
    """Labels say nothing, neighbours' labels nearly all, those of the nearest most of all."""
    labels, documents, positives, _, excluded = problem(0, M=300)
    generator = np.random.default_rng(1)
    truth = np.zeros((300, L), bool)
    for row, ids in enumerate(documents[1]):
        for document in ids[:2][ids[:2] >= 0]:
            truth[row, positives.take(np.array([document])).indices] = True
    truth &= generator.random(truth.shape) < 0.7
    truth[tuple(excluded.pairs().T)] = False
    given = labels, documents, positives, sparse(truth), excluded
    choice = choose(given)
    assert choice.accepted and choice.chosen == choice.best != choice.defaults
    assert choice.defaults == EVAL.augmented
    assert choice.best.label_weight == 0.2
    assert choice.gain > 4 * choice.standard_error > 0
    before, after = (choice.metrics[row][TUNE.metric] for row in ("defaults", "best"))
    assert after > before + 0.2
    # It is the mean that it is called, and no other value of one field is better.
    row = choice.metrics["best"]
    assert row[TUNE.metric] == pytest.approx((row["P@1"] + row["P@5"] + row["nDCG@5"]) / 3)
    assert {"P@1", TUNE.metric} <= set(choice.standard_errors["difference"])
    measured = Truth(*(given[3].indptr, given[3].indices, np.ones(L)))
    for field, values in tuning._space(EVAL.augmented, TUNE, None).items():
        for value in values:
            one = dataclasses.replace(choice.best, **{field: value})
            ranks = measured.ranks(augmented.rank(*given[:3], one, 20, excluded)[1], (5,))
            parts = [measured.mean(*part, ranks) for part in (("P", 1), ("P", 5), ("nDCG", 5))]
            assert np.mean(parts) <= after + 1e-12


def test_a_planted_prior_is_found():
    labels, documents, positives, _, excluded = problem(2, M=300)
    popular = np.arange(L) < 12
    generator = np.random.default_rng(3)
    truth = (generator.random((300, L)) < 0.5) & popular
    truth[tuple(excluded.pairs().T)] = False
    given = labels, documents, positives, sparse(truth), excluded
    config = dataclasses.replace(
        EVAL, augmented=dataclasses.replace(EVAL.augmented, prior="a file", prior_weight=0.0)
    )
    prior = np.where(popular, 50.0, 1.0)
    choice = choose(given, prior=prior, config=config)
    assert choice.accepted and choice.chosen.prior_weight >= 0.5
    # Without a prior, its weight is not tried.
    assert tuning._space(EVAL.augmented, TUNE, None)["prior_weight"] == (1.0,)


def test_noise_is_not_followed():
    """Truths that nothing retrieved knows of: the best of many settings looks better, by chance."""
    accepted, gains = [], []
    for seed in range(8):
        choice = choose(problem(seed, M=120))
        before, after = (choice.metrics[row][TUNE.metric] for row in ("defaults", "best"))
        gains.append(after - before)
        accepted.append(choice.accepted)
        assert choice.accepted == (choice.gain > 2 * choice.standard_error)
        assert choice.chosen == (choice.best if choice.accepted else choice.defaults)
        if not choice.accepted:
            assert "the settings of the config stay" in tuning.report(choice, TUNE)
    assert min(gains) > 0 and np.mean(gains) > 0.01
    assert sum(accepted) <= 1  # 1 in 44 of a normal variable is beyond two standard errors


def test_documents_of_a_source_are_one_draw():
    values, sources = np.random.default_rng(0).normal(size=50), np.arange(50)
    alone = tuning.standard_error(values, sources)
    assert alone == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    # Repeating each document in its source tells nothing new.
    repeated = tuning.standard_error(np.repeat(values, 3), np.repeat(sources, 3))
    assert repeated == pytest.approx(alone)
    for held in tuning._folds(np.repeat(sources, 3), 5, 0):
        assert held.sum() == 30 and (held.reshape(50, 3).all(1) == held.reshape(50, 3).any(1)).all()


def test_a_sample_is_of_whole_sources():
    sources = np.repeat(np.arange(30), np.random.default_rng(0).integers(1, 9, 30))
    rows = tuning.sample(sources, 40, 0)
    assert 30 < len(rows) <= 40 and (np.diff(rows) > 0).all()
    assert not np.isin(sources[rows], np.delete(sources, rows)).any()
    np.testing.assert_array_equal(tuning.sample(sources, 1000, 0), np.arange(len(sources)))
    assert len(tuning.sample(np.zeros(9, int), 2, 0)) == 9


def test_report_and_flags():
    choice = choose(problem(5), sources=np.arange(200) // 2)
    text = tuning.report(choice, TUNE)
    assert "200 validation documents of 100 sources" in text
    assert f"{choice.settings:,} settings" in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line][1:5] == ["P@1", "defaults", "best", "difference"]
    for flag in tuning.flags(choice):
        name, _, value = flag.removeprefix("--config.eval.augmented.").partition("=")
        assert value == str(getattr(choice.best, name)) != str(getattr(choice.defaults, name))
        assert flag in text


@pytest.mark.parametrize("name", NAMES)
def test_any_metric_is_a_mean_over_documents(name):
    labels, documents, positives, truth, excluded = problem(6)
    weights = np.random.default_rng(0).uniform(1, 9, L)
    tune = dataclasses.replace(TUNE, metric=f"{name}@3", temperature=(), label_weight=())
    choice = tuning.choose(
        *(labels, documents, positives, truth, excluded, EVAL, tune, weights, np.arange(200))
    )
    assert choice.metrics["best"][f"{name}@3"] >= choice.metrics["defaults"][f"{name}@3"]
    assert choice.settings >= 6


def test_what_cannot_be_tuned_is_named():
    with pytest.raises(ValueError, match=r"tune\.folds: .*got 3 for 5 folds"):
        choose(problem(0), sources=np.arange(200) % 3)
    with pytest.raises(ValueError, match=r"cut-offs within eval\.k = 20, got P@50"):
        choose(problem(0), tune=dataclasses.replace(TUNE, metric="P@50"))


class FakeStore:
    """As much of a store as a choice belongs to."""

    digest = "data"

    def __init__(self, **files):
        self.manifest = {
            "raw": {role: {"name": role, "sha256": digest} for role, digest in files.items()},
            "validation": {"fraction": 0.14, "seed": 0},
        }


def test_read_gives_what_was_written_and_refuses_what_is_not_its_own(tmp_path):
    own = AugmentedConfig(temperature=0.9, prior="p.tsv", weights="tuned")
    run = RunConfig(name="x", tune=TUNE).replace(train={"epochs": 3}, eval={"augmented": own})
    store = FakeStore(train="1", label="2", test="3")
    assert tuned.read(tmp_path, run, store) is None
    config = dataclasses.replace(
        EVAL, augmented=dataclasses.replace(EVAL.augmented, prior="other.tsv")
    )
    choice = choose(problem(0), prior=np.ones(L), config=config)
    choice = dataclasses.replace(choice, accepted=True)
    path = tuned.write(tmp_path, choice, run, FakeStore(train="1", label="2"))
    assert path == tmp_path / "tuned.json"
    content = json.loads(path.read_text())
    assert content["rows"]["defaults"]["metrics"] == choice.metrics["defaults"]
    assert content["gain"] == choice.gain and content["accepted"]
    # The prior may be newer, the split another, where things lie and what is evaluated, too.
    same = dataclasses.replace(run, name="y", tune=TuneConfig()).replace(
        eval={"k": 5}, data={"data_dir": "there", "validation_fraction": 0.2}
    )
    read = tuned.read(tmp_path, same, store)
    assert read == dataclasses.replace(choice.best, prior="p.tsv")
    # A file of an earlier version has a field that has no effect any more.
    path.write_text(
        path.read_text().replace('"mode": "split"', '"mode": "split", "filter_first": true')
    )
    assert tuned.read(tmp_path, same, store) == read

    def refused(said, config=run, store=store):
        with pytest.raises(ValueError, match=said) as error:
            tuned.read(tmp_path, config, store)
        assert "\n" not in str(error.value) and "tuned.json" in str(error.value)

    refused(r"train.epochs: 3 there, 4 here", run.replace(train={"epochs": 4}))
    refused("data: label file: '2' there, '5' here", store=FakeStore(train="1", label="5"))
    refused(
        "prior as it was tuned with, 'other.tsv', got None",
        run.replace(eval={"augmented": AugmentedConfig()}),
    )
    text = path.read_text()
    wrong = text.replace(f'"temperature": {choice.best.temperature}', '"temperature": "x"')
    assert wrong != text
    for damaged in ("", "{}", "[]", wrong, text.replace('"format": 1', '"format": 2')):
        path.write_text(damaged)
        refused("expected what --mode=tune writes")
