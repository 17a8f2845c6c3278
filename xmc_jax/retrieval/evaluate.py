"""Embeddings -> neighbours -> filter -> metrics: one table, metrics.json and predictions.npz."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from jax.sharding import Mesh

from xmc_jax.config import EvalConfig
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.files import atomic
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.metrics import KS, NAMES, first, metrics
from xmc_jax.runtime import distributed

_COMPARED = 1_000  # at most this many test documents measure an index's recall and speed
_LOOKED_AT = 50_000  # test documents, see `sample`
COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found; rows are "plain" and, if there is one, "augmented".

    Attributes:
        metrics: row -> metric -> fraction.
        scores: row -> f32[M, k], descending, -inf where there is no prediction; no more columns
            than labels, unless a cut-off of the metrics is larger.
        ids: row -> i32[M, k], label ids, -1 where there is no prediction.
        index: recall and speeds of each ScaNN index used, on at most 1,000 test documents spread
            over the split; see `scann.compare`. Empty with exact search.
    """

    metrics: dict[str, dict[str, float]]
    scores: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    index: dict[str, dict[str, float]]


def evaluate(
    test: np.ndarray,
    labels: np.ndarray | exact.Database,
    store: Store,
    config: EvalConfig,
    train: np.ndarray | exact.Database | None = None,
    mesh: Mesh | None = None,
    prior: np.ndarray | None = None,
) -> Evaluation:
    """Ranks the labels for every test document and measures the ranking.

    Labels that the filter takes from a document are not searched for it. All processes search; the
    first one makes rankings and metrics of what was found.

    Args:
        test: f32[M, D], unit embeddings of the test documents.
        labels: f32[L, D], unit embeddings or prototypes of the labels.
        store: the positives, filter and propensities.
        config: see `EvalConfig`.
        train: f32[N, D], unit embeddings of the train documents; needed if `config.augmented`.
        mesh: what exact search runs on; see `exact.search`.
        prior: of the labels; needed if `config.augmented.prior`, see `augmented.rank`.

    Raises:
        ValueError: embeddings do not fit the store, or `train` is missing.
    """
    _check_counts(store, test=test, labels=labels, train=train)
    mix = config.augmented if config.augmented.enabled else None
    if mix is not None and train is None:
        raise ValueError(
            "evaluate: expected train embeddings for retrieval-augmented inference, got none; pass "
            "them, or set --config.eval.augmented.enabled=False"
        )
    excluded = Csr.of_pairs(store.filter("test"), store.num_test, store.num_labels)
    search = _Search(test, config, mesh)
    k = max(min(config.k, store.num_labels), *config.cut_offs)
    depth, of_documents = augmented.depths(mix, k) if mix else (k, 0)
    nearest = search.labels(labels, depth, excluded)
    if mix is not None:
        to_mix = nearest
        if prior is not None and not prior.all():
            to_mix = search.labels(labels, depth, excluded, prior)
        documents = search("documents", train, of_documents)
    rankings, measured = {}, None
    if distributed.is_first():
        rankings["plain"] = first(*nearest, k)
        if mix is not None:
            rankings["augmented"] = augmented.rank(
                to_mix, documents, store.positives("train"), mix, k, excluded, prior
            )
        truth = store.positives("test")
        measured = {
            row: metrics(
                ids, truth.indptr, truth.indices, store.inverse_propensity, config.cut_offs
            )
            for row, (_, ids) in rankings.items()
        }
    measured, index = distributed.broadcast("evaluation", [measured, search.index])
    return Evaluation(
        metrics=measured,
        scores={row: scores for row, (scores, _) in rankings.items()},
        ids={row: ids for row, (_, ids) in rankings.items()},
        index=index,
    )


class _Search:
    """Searches databases for the test documents; notes what ScaNN's indexes are worth in `index`.

    With ScaNN, only the first process finds anything.
    """

    def __init__(self, test: np.ndarray, config: EvalConfig, mesh: Mesh | None):
        self.index: dict[str, dict[str, float]] = {}
        self._test, self._config, self._mesh = test, config, mesh
        step = -(-len(test) // _COMPARED)
        # An index is measured on some and tuned on others, unless there are too few.
        self._some, self._others = test[::step], test[step // 2 :: step]

    def __call__(
        self, name: str, database, k: int, excluded: Csr | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        config, k = self._config, min(k, len(database))
        if config.index == "scann":
            return self._approximate(name, exact.to_host(database), config.scann, k, excluded)
        compared = config.compare_scann and name == "labels" and scann.available()
        if compared and config.scann.builds_tree(len(database)):
            rows = exact.to_host(database)
            if distributed.is_first():
                k_compared = min(config.k, len(rows))
                built = scann.ScannIndex.build(rows, config.scann, self._others, k_compared)
                self.index[name] = scann.compare(built, rows, self._some, k_compared)
        return exact.search(
            self._test,
            database,
            k,
            config.query_block,
            config.database_block,
            self._mesh,
            config.recall_target,
            excluded,
        )

    def labels(
        self, labels, k: int, excluded: Csr, prior: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest labels that may be predicted; with a prior, of those whose prior is not 0."""
        if prior is None or prior.all():
            return self("labels", labels, k, excluded)
        rows = np.flatnonzero(prior)
        if not len(rows):
            nothing = np.zeros((len(self._test), 0), np.float32)
            return nothing, nothing.astype(np.int32)
        name = "labels whose prior is not 0"
        nearest = self(name, exact.take(labels, rows), k, excluded.select(rows))
        if nearest is None:
            return None
        scores, ids = nearest
        return scores, np.where(ids < 0, -1, rows[ids]).astype(np.int32)

    def _approximate(self, name, rows, config, k, excluded):
        if not distributed.is_first():
            return None
        built = scann.ScannIndex.build(rows, config, self._others, k)
        self.index[name] = scann.compare(built, rows, self._some, k)
        return built.search(self._test, k, excluded)


def retrieve(
    test: np.ndarray,
    labels: np.ndarray | exact.Database,
    train: np.ndarray | exact.Database,
    config: EvalConfig,
    depths: tuple[int, int],
    excluded: Csr,
    mesh: Mesh | None = None,
    prior: np.ndarray | None = None,
) -> tuple[augmented.Nearest, augmented.Nearest]:
    """The labels and the train documents nearest to each of some documents, to be mixed.

    Args:
        test: f32[M, D], unit embeddings.
        labels: see `evaluate`.
        train: likewise.
        config: of the search.
        depths: labels and documents to find of each document, at most.
        excluded: [M, L], labels that may not be predicted.
        mesh: see `evaluate`.
        prior: likewise.

    Returns:
        Labels and documents as `augmented.rank` takes them; with ScaNN of the first process alone.
    """
    search = _Search(test, dataclasses.replace(config, compare_scann=False), mesh)
    num_labels, num_documents = depths
    return (
        search.labels(labels, num_labels, excluded, prior),
        search("documents", train, num_documents),
    )


def _check_counts(store: Store, **embeddings: np.ndarray | exact.Database | None) -> None:
    expected = {"test": store.num_test, "labels": store.num_labels, "train": store.num_documents}
    for name, x in embeddings.items():
        if x is not None and len(x) != expected[name]:
            raise ValueError(
                f"evaluate: expected {expected[name]} {name} embeddings for {store.name}, got "
                f"{len(x)}"
            )


def write(
    evaluation: Evaluation,
    metrics_path: epath.PathLike,
    predictions_path: epath.PathLike,
    rows: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Writes the metrics as JSON, then the predictions, see `write_predictions`.

    So predictions are never beside the metrics of an earlier evaluation.

    Args:
        evaluation: what to write.
        metrics_path: metrics.json, local or remote.
        predictions_path: predictions.npz, local or remote.
        rows: more rows of metrics, of other models, to go before these.
    """
    content = dict(rows or {}) | evaluation.metrics
    if evaluation.index:
        content["index"] = evaluation.index
    atomic.write(metrics_path, json.dumps(content, indent=2, allow_nan=False))
    write_predictions(evaluation, predictions_path)


def write_predictions(
    evaluation: Evaluation, path: epath.PathLike, documents: np.ndarray | None = None
) -> None:
    """Writes the predictions as a compressed .npz without pickles.

    It holds `<row>_ids` i32[M, k] and `<row>_scores` f32[M, k] of each row.

    Args:
        evaluation: what to write.
        path: predictions.npz, local or remote.
        documents: i64[m], ascending, to write those of some test documents alone; the .npz then
            holds `documents`, too. None for all.
    """
    which = slice(None) if documents is None else documents
    arrays = {f"{row}_ids": ids[which] for row, ids in evaluation.ids.items()}
    arrays |= {f"{row}_scores": scores[which] for row, scores in evaluation.scores.items()}
    if documents is not None:
        arrays["documents"] = documents
    with atomic.replaced(path) as file:
        np.savez_compressed(file, **arrays)


def sample(count: int) -> np.ndarray:
    """i64[m], test documents that are looked at one by one: all up to 50,000, of more so many.

    Evenly spread, so that they are the same whatever is looked at. Of 50,000 a share is known to
    0.2 points.

    Args:
        count: M.
    """
    taken = min(count, _LOOKED_AT)
    return np.arange(taken) * count // max(taken, 1)


def format_table(
    rows: Mapping[str, Mapping[str, float]], columns: tuple[str, ...] = COLUMNS
) -> str:
    """Named rows by metrics, in percent; what a row lacks is a dash.

    Args:
        rows: name -> metric -> fraction.
        columns: names of metrics.
    """
    cells = [["", *columns]]
    cells += [[name, *(_percent(values, x) for x in columns)] for name, values in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
        for row in cells
    )


def format_full_table(rows: Mapping[str, Mapping[str, float]], ks: tuple[int, ...] = KS) -> str:
    """Every metric at every cut-off, in percent: metrics by cut-offs, the rows side by side.

    Args:
        rows: name -> metric -> fraction.
        ks: cut-offs.
    """
    blocks = [["", "", *NAMES]]
    for name, values in rows.items():
        cells = [[f"@{k}" for k in ks]]
        cells += [[_percent(values, f"{metric}@{k}") for k in ks] for metric in NAMES]
        blocks.append([name, *("  ".join(f"{cell:>6}" for cell in line) for line in cells)])
    widths = [max(map(len, block)) for block in blocks]
    lines = ("   ".join(x.ljust(w) for x, w in zip(line, widths)) for line in zip(*blocks))
    return "\n".join(line.rstrip() for line in lines)


def format_index(index: Mapping[str, Mapping[str, float]]) -> str:
    """A line on each ScaNN index, from `Evaluation.index`."""
    return "\n".join(
        f"ScaNN over {name}: recall {measured['recall']:.4f} of exact search, "
        f"{measured['queries_per_second']:,.0f} queries/s (exact: "
        f"{measured['exact_queries_per_second']:,.0f})"
        for name, measured in index.items()
    )


def _percent(values: Mapping[str, float], name: str) -> str:
    return f"{100 * values[name]:.2f}" if name in values else "-"
