"""Embeddings -> neighbours -> filter -> metrics: one table, metrics.json and predictions.npz."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from jax.sharding import Mesh

from xmc_jax import distributed
from xmc_jax.data.store import Store
from xmc_jax.files import atomic
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.augmented import AugmentedConfig
from xmc_jax.retrieval.metrics import KS, NAMES, drop_filtered, filtered_per_document, metrics
from xmc_jax.retrieval.scann import ScannConfig

_COMPARED = 1_000  # at most this many test documents measure an index's recall and speed
_LOOKED_AT = 50_000  # test documents, see `sample`
COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@100")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How test documents are evaluated.

    Attributes:
        ks: cut-offs of the metrics, ascending. 1 is always among them, and those above `k` are left
            out.
        k: predictions kept per document.
        index: "exact" or "scann".
        augmented: retrieval-augmented inference.
        scann: of `index="scann"`.
        compare_scann: with `index="exact"`, also build a ScaNN tree of the labels and report its
            recall and both speeds, where scann is installed. Fewer labels than
            `scann.brute_force_below` need no tree, and nothing is compared.
        query_block: documents searched at a time by exact search.
        database_block: labels or documents scored at a time by exact search, per device.
        recall_target: of exact search; below 1 TPUs take a faster one, see `exact.search`.
    """

    ks: tuple[int, ...] = KS
    k: int = 100
    index: str = "exact"
    augmented: AugmentedConfig = dataclasses.field(default_factory=AugmentedConfig)
    scann: ScannConfig = dataclasses.field(default_factory=ScannConfig)
    compare_scann: bool = False
    query_block: int = exact.QUERY_BLOCK
    database_block: int = exact.BLOCK
    recall_target: float = 1.0

    def __post_init__(self):
        if self.index not in ("exact", "scann"):
            raise ValueError(f"eval.index: expected exact or scann, got {self.index!r}")
        if self.k < 1:
            raise ValueError(f"eval.k: expected at least 1 prediction, got {self.k}")
        if min(self.ks, default=1) < 1:
            raise ValueError(f"eval.ks: expected cut-offs of at least 1, got {self.ks}")
        cut_offs = {1, *(cut_off for cut_off in self.ks if cut_off <= self.k)}
        object.__setattr__(self, "ks", tuple(sorted(cut_offs)))
        if min(self.query_block, self.database_block) < 1:
            raise ValueError(
                f"eval: expected query_block and database_block of at least 1, got "
                f"{self.query_block} and {self.database_block}"
            )
        if not 0 < self.recall_target <= 1:
            raise ValueError(
                f"eval.recall_target: expected a fraction in (0, 1], got {self.recall_target}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found; rows are "plain" and, if there is one, "augmented".

    Attributes:
        metrics: row -> metric -> fraction.
        scores: row -> f32[M, k], descending, -inf where there is no prediction.
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

    Every search asks for as many labels more as the filter takes from any one document. All
    processes search; the first one makes rankings and metrics of what was found.

    Args:
        test: f32[M, D], unit embeddings of the test documents.
        labels: f32[L, D], unit embeddings or prototypes of the labels.
        store: the positives, filter and propensities.
        config: see `EvalConfig`.
        train: f32[N, D], unit embeddings of the train documents; needed if `config.augmented`.
        mesh: what exact search runs on; see `exact.search`.
        prior: of the labels; needed if `config.augmented.prior`, see `augmented.augment`.

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
    pairs = store.filter("test")
    extra = filtered_per_document(pairs)
    search = _Search(test, config, mesh)
    nearest = search("labels", labels, max(config.k, mix.labels if mix else 0) + extra)
    retrieved = None
    if mix is not None and mix.mode == "split":
        retrieved = search("documents", train, mix.documents)
    elif mix is not None:
        wanted = mix.labels + mix.documents + (extra if mix.filter_first else 0)
        retrieved = search.union("labels and documents", labels, train, wanted)

    found = {"plain": nearest}
    if distributed.is_first():
        if mix is not None:
            items = augmented.to_mix(mix, nearest, retrieved, pairs, len(labels))
            found["augmented"] = augmented.augment(
                *items, store.positives("train"), mix, config.k + extra, prior
            )
        found = {row: drop_filtered(*best, pairs, config.k) for row, best in found.items()}
    truth, measured = store.positives("test"), None
    if distributed.is_first():
        measured = {
            row: metrics(ids, truth.indptr, truth.indices, store.inverse_propensity, config.ks)
            for row, (_, ids) in found.items()
        }
    else:
        found = {}
    measured, index = distributed.broadcast("evaluation", [measured, search.index])
    return Evaluation(
        metrics=measured,
        scores={row: scores for row, (scores, _) in found.items()},
        ids={row: ids for row, (_, ids) in found.items()},
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

    def __call__(self, name: str, database, k: int) -> tuple[np.ndarray, np.ndarray]:
        config, k = self._config, min(k, len(database))
        if config.index == "scann":
            return self._approximate(name, exact.to_host(database), config.scann, k)
        compared = config.compare_scann and name == "labels" and scann.available()
        if compared and config.scann.builds_tree(len(database)):
            rows = exact.to_host(database)
            if distributed.is_first():
                k_compared = min(config.k, len(rows))
                built = scann.ScannIndex.build(rows, config.scann, self._others, k_compared)
                self.index[name] = scann.compare(built, rows, self._some, k_compared)
        blocks = config.query_block, config.database_block
        return exact.search(self._test, database, k, *blocks, self._mesh, config.recall_target)

    def union(self, name: str, labels, train, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of labels and documents together; document d has the id L + d."""
        if self._config.index == "scann":
            rows = np.concatenate([exact.to_host(labels), exact.to_host(train)])
            return self(name, rows, k)
        return augmented.merge(self(name, labels, k), self(name, train, k), len(labels), k)

    def _approximate(self, name, rows, config, k):
        if not distributed.is_first():
            return None
        built = scann.ScannIndex.build(rows, config, self._others, k)
        self.index[name] = scann.compare(built, rows, self._some, k)
        return built.search(self._test, k)


def retrieve(
    test: np.ndarray,
    labels: np.ndarray | exact.Database,
    train: np.ndarray | exact.Database,
    config: EvalConfig,
    num_labels: int,
    num_documents: int,
    mesh: Mesh | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The labels and the train documents nearest to each of some documents.

    Args:
        test: f32[M, D], unit embeddings.
        labels: see `evaluate`.
        train: likewise.
        config: of the search.
        num_labels: to find of each document, at most.
        num_documents: likewise.
        mesh: see `evaluate`.

    Returns:
        f32[M, K] scores, descending, and i32[M, K] ids of the labels, and of the documents; with
        ScaNN of the first process alone.
    """
    search = _Search(test, dataclasses.replace(config, compare_scann=False), mesh)
    return search("labels", labels, num_labels), search("documents", train, num_documents)


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
        f"ScaNN over {name}: recall {found['recall']:.4f} of exact search, "
        f"{found['queries_per_second']:,.0f} queries/s (exact: "
        f"{found['exact_queries_per_second']:,.0f})"
        for name, found in index.items()
    )


def _percent(values: Mapping[str, float], name: str) -> str:
    return f"{100 * values[name]:.2f}" if name in values else "-"
