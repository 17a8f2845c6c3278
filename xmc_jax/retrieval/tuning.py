"""Weights of retrieval-augmented inference, chosen on validation documents.

`choose` is the pure part: what was retrieved, once and deep enough, to a choice. Many settings of
`AugmentedConfig` are scored on it, none with a search of its own, and the best one counts only if
it beats the settings that the config has by more than chance. `write` and `read` keep a choice in
a workdir.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from xmc_jax import checkpoint, distributed
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.retrieval import augmented, evaluate, exact
from xmc_jax.retrieval.augmented import AugmentedConfig
from xmc_jax.retrieval.evaluate import EvalConfig
from xmc_jax.retrieval.metrics import NAMES, Truth, drop_filtered, filtered_per_document

FILE = "tuned.json"
"""Name of the file in a workdir."""
FORMAT = 1
FIELDS = (
    *("mode", "labels", "documents", "temperature", "label_weight", "separate_softmax"),
    *("normalize_rows", "filter_first", "prior_weight"),
)
"""Fields of `AugmentedConfig` that a choice is about; the mode stays as it is."""

Found = tuple[np.ndarray, np.ndarray]  # f32[M, K] scores, descending, and i32[M, K] ids

# What is searched together, in this order, the rest held; over again until nothing changes.
_TOGETHER = (
    ("temperature", "label_weight", "separate_softmax"),
    ("documents", "normalize_rows"),
    ("labels", "filter_first"),
    ("prior_weight",),
)
_SWEEPS = 4  # at most
_BLOCK = 128  # documents whose labels' scores are a matrix at a time
_FAR = np.iinfo(np.int32).max  # the rank of what was not found, or is filtered
# Fields of a config, beside `checkpoint.RESUMABLE`, that weights do not depend on: names, and what
# differs between a validation run and the run on all training documents.
_APART = (
    *("name", "baseline", "provenance", "data.validation_fraction", "data.validation_seed"),
    *("train.log_every", "train.zero_shot"),
)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What is tried, and when it counts.

    Attributes:
        metric: to maximise: names of metrics joined by "+", whose mean it is. The default is of the
            first place (P@1), of the first five (P@5), and of their order (nDCG@5): what tables
            show first. P@1 alone changes with few documents and would choose by chance.
        validation_fraction: share of the training documents that are held out, where the config of
            the run holds none out.
        max_documents: held-out documents that are used, in whole sources.
        folds: parts for the estimate of the gain: settings are chosen on all parts but one and
            measured on that one, in turn.
        standard_errors: the gain must exceed so many of its standard errors, or the settings stay.
        seed: of parts, and of the documents used.
        labels: values tried, as all below, beside the config's own; of `mode="split"` only.
        documents: likewise.
        temperature: likewise, in any mode.
        label_weight: likewise.
        separate_softmax: likewise.
        normalize_rows: likewise.
        filter_first: likewise.
        prior_weight: likewise, where there is a prior.
    """

    metric: str = "P@1+P@5+nDCG@5"
    validation_fraction: float = 0.14
    max_documents: int = 5_000
    folds: int = 5
    standard_errors: float = 2.0
    seed: int = 0
    labels: tuple[int, ...] = (50, 100, 200, 400)
    documents: tuple[int, ...] = (25, 50, 100, 200)
    temperature: tuple[float, ...] = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1)
    label_weight: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    separate_softmax: tuple[bool, ...] = (False, True)
    normalize_rows: tuple[bool, ...] = (False, True)
    filter_first: tuple[bool, ...] = (False, True)
    prior_weight: tuple[float, ...] = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0)

    def __post_init__(self):
        parse_metric(self.metric)
        for field, fits, expected in (
            ("validation_fraction", 0 < self.validation_fraction < 1, "a fraction in (0, 1)"),
            ("max_documents", self.max_documents >= 2, "at least 2"),
            ("folds", self.folds >= 2, "at least 2"),
            ("standard_errors", self.standard_errors >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"tune.{field}: expected {expected}, got {getattr(self, field)}")
        for field in FIELDS[1:]:
            for value in getattr(self, field):
                try:
                    AugmentedConfig(**{field: value})
                except ValueError as error:
                    raise ValueError(f"tune.{field}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` found. All rows of metrics are of the validation documents.

    Attributes:
        defaults: the settings of the config.
        best: the best of those tried on all validation documents.
        accepted: whether the best ones are to be used.
        gain: of choosing like this over the defaults, in the metric tuned for; each document is
            measured with settings that were chosen without it.
        standard_error: of the gain; documents of one source count as one draw.
        metrics: "defaults" and "best" -> metric -> fraction.
        standard_errors: "defaults", "best" and "difference" -> metric -> fraction, those of
            `evaluate.COLUMNS` and of the metric tuned for.
        settings: different ones that were tried.
        documents: validation documents used.
        sources: that they come from.
    """

    defaults: AugmentedConfig
    best: AugmentedConfig
    accepted: bool
    gain: float
    standard_error: float
    metrics: dict[str, dict[str, float]]
    standard_errors: dict[str, dict[str, float]]
    settings: int
    documents: int
    sources: int

    @property
    def chosen(self) -> AugmentedConfig:
        """The settings to use."""
        return self.best if self.accepted else self.defaults


def parse_metric(metric: str) -> tuple[tuple[str, int], ...]:
    """(name, k) of each part of e.g. "P@1+nDCG@5".

    Raises:
        ValueError: it is not one.
    """
    parts = [part.strip().partition("@") for part in metric.split("+")]
    if not all(name in NAMES and k.isdecimal() and int(k) >= 1 for name, _, k in parts):
        raise ValueError(
            f"tune.metric: expected metrics joined by +, each one of {', '.join(NAMES)} and a "
            f"cut-off, as P@1+nDCG@5, got {metric!r}"
        )
    return tuple((name, int(k)) for name, _, k in parts)


def tune(
    test: np.ndarray,
    labels: np.ndarray | exact.Database,
    train: np.ndarray | exact.Database,
    store: Store,
    config: EvalConfig,
    tune: TuneConfig,
    mesh: Mesh | None = None,
    prior: np.ndarray | None = None,
) -> Choice | None:
    """Searches once, for all settings, and chooses; see `choose`.

    All processes search; the first one chooses, and alone gets what it chose.

    Args:
        test: f32[M, D], unit embeddings of the validation documents.
        labels: f32[L, D], unit embeddings or prototypes of the labels.
        train: f32[N, D], unit embeddings of the train documents.
        store: a validation split.
        config: of the search, and the settings to start from.
        tune: see `TuneConfig`.
        mesh: see `exact.search`.
        prior: f[L], see `augmented.augment`.

    Raises:
        ValueError: the store's test documents are no held-out training documents, mixing is off,
            or there are too few sources.
    """
    if store.manifest["validation"] is None:
        raise ValueError(
            f"tune: expected held-out training documents in {store.folder}, found the test split"
        )
    if not config.augmented.enabled:
        raise ValueError("tune: expected --config.eval.augmented.enabled=True, got False")
    sources = store.groups("test")
    sources = np.arange(store.num_test) if sources is None else np.asarray(sources)
    rows = sample(sources, tune.max_documents, tune.seed)
    pairs = store.filter("test")
    pairs = pairs[np.isin(pairs[:, 0], rows)]
    pairs = np.stack([np.searchsorted(rows, pairs[:, 0]), pairs[:, 1]], axis=1)
    space, extra = _space(config.augmented, tune, prior), filtered_per_document(pairs)
    depths = _depths(space, config.augmented.mode, extra)
    found = evaluate.retrieve(test[rows], labels, train, config, *depths, mesh)
    if not distributed.is_first():
        return None
    started = time.perf_counter()
    choice = choose(
        *found,
        store.positives("train"),
        store.positives("test").take(rows),
        pairs,
        config,
        tune,
        store.inverse_propensity,
        sources[rows],
        prior,
    )
    logging.info(
        "%d settings on %d documents in %.1f s",
        *(choice.settings, choice.documents, time.perf_counter() - started),
    )
    return choice


def choose(
    labels: Found,
    documents: Found,
    positives: Csr,
    truth: Csr,
    pairs: np.ndarray,
    config: EvalConfig,
    tune: TuneConfig,
    inverse_propensity: np.ndarray,
    sources: np.ndarray,
    prior: np.ndarray | None = None,
) -> Choice:
    """Chooses the settings with the highest metric, or leaves them as they are.

    From the config's settings on, groups of fields are tried in all combinations, one group after
    the other, until none helps. The same is done without the documents of one fold, for each fold,
    and what it chose is measured on that fold: such a gain is not that of the luckiest of many
    settings. Only if it exceeds `tune.standard_errors` of its standard errors, the best settings on
    all documents are accepted.

    Args:
        labels: scores and ids of the labels nearest to M documents; as many as any setting needs,
            and where filtered labels may be dropped first, as many more as the filter takes from
            any one document.
        documents: of the train documents nearest to them, likewise.
        positives: [N, L], of the train documents.
        truth: [M, L], the positives of the M documents.
        pairs: i32[p, 2], (document, label) that must not be predicted.
        config: of the ranking; `config.augmented` are the defaults.
        tune: see `TuneConfig`.
        inverse_propensity: f64[L].
        sources: i[M], where each document comes from.
        prior: f[L], see `augmented.augment`.

    Raises:
        ValueError: there are fewer sources than folds, or the metric goes beyond `config.k`.
    """
    asked = parse_metric(tune.metric)
    if max(k for _, k in asked) > config.k:
        raise ValueError(
            f"tune.metric: expected cut-offs within eval.k = {config.k}, got {tune.metric}"
        )
    defaults = dataclasses.replace(config.augmented, weights="config")
    space = _space(defaults, tune, prior)
    measured = Truth(truth.indptr, truth.indices, inverse_propensity)
    depth = max(k for _, k in asked)
    pool = _Pool(labels, documents, positives, truth, pairs, defaults.mode, prior, depth)
    seen: dict[AugmentedConfig, np.ndarray] = {}

    def values(settings: Sequence[AugmentedConfig]) -> np.ndarray:
        """f64[S, M], what each document adds to the metric."""
        new = [one for one in dict.fromkeys(settings) if one not in seen]
        for one, ranks in zip(new, pool.ranks(new)):
            parts = [measured.per_document(name, k, ranks) for name, k in asked]
            seen[one] = np.mean(parts, axis=0)
        return np.stack([seen[one] for one in settings])

    best = _search(defaults, space, lambda settings: values(settings).mean(axis=1))
    gains = np.zeros(truth.rows)
    for held in _folds(sources, tune.folds, tune.seed):
        # Without its weight, a document has no say.
        kept = ~held
        one = _search(defaults, space, lambda s, kept=kept: values(s)[:, kept].mean(axis=1))
        gains[held] = np.subtract(*values([one, defaults])[:, held])
    gain, error = float(gains.mean()), standard_error(gains, sources)

    metrics: dict[str, dict[str, float]] = {}
    added: dict[str, dict[str, np.ndarray]] = {}  # what each document adds, by row and metric
    for row, one in (("defaults", defaults), ("best", best)):
        # By the functions that evaluation uses: the figures that it would print.
        ids = _ranked(one, labels, documents, positives, pairs, config.k, prior)
        ranks = measured.ranks(ids, config.ks)
        metrics[row] = {f"{n}@{k}": measured.mean(n, k, ranks) for n in NAMES for k in config.ks}
        metrics[row][tune.metric] = float(seen[one].mean())
        columns = [column for column in evaluate.COLUMNS if column in metrics[row]]
        added[row] = {c: measured.per_document(*parse_metric(c)[0], ranks) for c in columns}
        added[row][tune.metric] = seen[one]
    added["difference"] = {c: x - added["defaults"][c] for c, x in added["best"].items()}
    return Choice(
        defaults=defaults,
        best=best,
        accepted=best != defaults and gain > tune.standard_errors * error,
        gain=gain,
        standard_error=error,
        metrics=metrics,
        standard_errors={
            row: {column: standard_error(x, sources) for column, x in by_column.items()}
            for row, by_column in added.items()
        },
        settings=len(seen),
        documents=truth.rows,
        sources=len(np.unique(sources)),
    )


def sample(sources: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """i64[m], ascending: at most `limit` documents, of whole sources in a random order.

    Args:
        sources: i[M].
        limit: documents; a first source that has more is taken all the same.
        seed: of the order.
    """
    if len(sources) <= limit:
        return np.arange(len(sources))
    _, number = np.unique(sources, return_inverse=True)
    sizes = np.bincount(number)
    order = np.random.default_rng(seed).permutation(len(sizes))
    taken = order[: max(np.searchsorted(np.cumsum(sizes[order]), limit, side="right"), 1)]
    return np.flatnonzero(np.isin(number, taken))


def standard_error(values: np.ndarray, sources: np.ndarray) -> float:
    """Of the mean of the values, f[M], whose sources, i[M], are independent of each other."""
    _, number = np.unique(sources, return_inverse=True)
    totals = np.bincount(number, values - values.mean())
    groups = len(totals)
    return float(np.sqrt(groups / max(groups - 1, 1) * (totals**2).sum()) / len(values))


def belongs(fields: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """What a choice depends on: the recipe and the training data; not which documents are held out.

    Args:
        fields: a config as nested mappings.
        store: its data, whole or a validation split.
    """
    apart = (*checkpoint.RESUMABLE, *_APART)
    recipe = {
        name: value
        for name, value in checkpoint.flat(fields).items()
        if not any(name == one or name.startswith(f"{one}.") for one in apart)
    }
    raw = store.manifest["raw"]
    files = {
        f"data: {role} file": raw[role]["sha256"]
        for role in ("train", "train labels", "label")
        if role in raw
    }
    return json.loads(json.dumps(recipe | files))  # tuples are lists there


def write(
    workdir: epath.PathLike,
    choice: Choice,
    fields: Mapping[str, Any],
    store: Store,
    tune: TuneConfig,
) -> epath.Path:
    """Writes a choice to `tuned.json` in a workdir, and returns its path.

    Args:
        workdir: local or remote.
        choice: see `choose`.
        fields: the config, see `belongs`.
        store: the validation split.
        tune: what was asked for.
    """
    path = epath.Path(workdir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "augmented": _values(choice.chosen),
        "prior": choice.chosen.prior,
        "accepted": choice.accepted,
        "metric": tune.metric,
        "gain": choice.gain,
        "standard_error": choice.standard_error,
        "rows": {
            name: {
                "augmented": _values(one),
                "metrics": choice.metrics[name],
                "standard_errors": choice.standard_errors[name],
            }
            for name, one in (("defaults", choice.defaults), ("best", choice.best))
        },
        "standard_errors_of_differences": choice.standard_errors["difference"],
        "validation": {
            **store.manifest["validation"],
            "data": store.digest,
            "documents": choice.documents,
            "sources": choice.sources,
        },
        "settings": choice.settings,
        "tune": dataclasses.asdict(tune),
        "belongs_to": belongs(fields, store),
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read(
    workdir: epath.PathLike, fields: Mapping[str, Any], store: Store, config: AugmentedConfig
) -> AugmentedConfig | None:
    """The settings of a config with those in place that were chosen for it; None without a file.

    Args:
        workdir: where `write` wrote.
        fields: the config of the run, see `belongs`.
        store: its data.
        config: its settings; those that are not tuned, as the prior, stay.

    Raises:
        ValueError: the file cannot be read, is of another config or dataset, or was made with a
            prior and there is none, or the other way round.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    again = "tune again with --mode=tune"
    try:
        content = json.loads(path.read_text())
        prior, then = content["prior"], dict(content["belongs_to"])
        if content["format"] != FORMAT or set(content["augmented"]) != set(FIELDS):
            raise ValueError("other fields")
        chosen = dataclasses.replace(config, weights="config", **content["augmented"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected what --mode=tune writes, got {error!r}; {again}"
        ) from None
    now = belongs(fields, store)
    differ = [
        f"{name}: {then.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(f"{path}: made for another config ({'; '.join(differ)}); {again}")
    if (prior is None) != (config.prior is None):
        raise ValueError(
            f"{path}: expected --config.eval.augmented.prior as it was tuned with, {prior!r}, got "
            f"{config.prior!r}; set it, or {again}"
        )
    return chosen


def report(choice: Choice, tune: TuneConfig) -> str:
    """What was found, as a table; what to use, as flags."""
    columns = tuple(dict.fromkeys((*evaluate.COLUMNS, tune.metric)))
    rows = {name: choice.metrics[name] for name in ("defaults", "best")}
    rows["difference"] = {
        name: value - rows["defaults"][name] for name, value in rows["best"].items()
    }
    rows["its standard error"] = choice.standard_errors["difference"]
    lines = [
        f"{choice.documents:,} held-out training documents of {choice.sources:,} sources, "
        f"{choice.settings:,} settings",
        "",
        evaluate.format_table(rows, columns),
        "",
        f"gain in {tune.metric}, each document by settings chosen without it: "
        f"{100 * choice.gain:+.2f}, standard error {100 * choice.standard_error:.2f}",
    ]
    if choice.accepted:
        lines += [
            f"more than {tune.standard_errors:g} standard errors: the best settings are chosen",
            "they are used with --config.eval.augmented.weights=tuned, or with",
            *(f"  {flag}" for flag in flags(choice)),
        ]
    elif choice.best == choice.defaults:
        lines += ["the settings of the config are the best of those tried, and stay"]
    else:
        lines += [
            f"not more than {tune.standard_errors:g} standard errors: the settings of the config "
            "stay; the best ones would have been",
            *(f"  {flag}" for flag in flags(choice)),
        ]
    return "\n".join(lines)


def flags(choice: Choice) -> list[str]:
    """The flags that turn the defaults into the best settings."""
    return [
        f"--config.eval.augmented.{name}={value}"
        for name, value in _values(choice.best).items()
        if value != getattr(choice.defaults, name)
    ]


class _Pool:
    """What was retrieved for some documents, laid out so that a setting costs few operations.

    The labels that can be predicted for a document, by any setting, are its row of a matrix, by
    ascending number; a setting mixes two such matrices, of labels' mass and of documents' mass.
    Documents go in blocks of about as many labels, so that there is little padding.
    """

    def __init__(self, labels, documents, positives, truth, pairs, mode, prior, k):
        counts = np.where(documents[1] >= 0, positives.counts()[documents[1]], 0).sum(axis=1)
        order = np.argsort(counts, kind="stable")
        self._positives = len(truth.indices)
        self._blocks = [
            _Block(
                *(order[start : start + _BLOCK], labels, documents, positives, truth, pairs, mode),
                *(prior, k),
            )
            for start in range(0, len(order), _BLOCK)
        ]

    def ranks(self, settings: Sequence[AugmentedConfig]) -> np.ndarray:
        """i32[S, nnz], the rank of each positive in each setting, `_FAR` if k or more."""
        out = np.full((len(settings), self._positives), _FAR, np.int32)
        order = sorted(range(len(settings)), key=lambda i: _by_cost(settings[i]))

        def fill(block: "_Block") -> None:
            found = block.ranks([settings[i] for i in order])
            for i, (positive, rank) in zip(order, found):
                out[i, positive] = rank  # no other block has these positives

        with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(fill, self._blocks))
        return out


def _by_cost(one: AugmentedConfig) -> tuple:
    """Neighbours in this order share what takes longest."""
    return (
        *(one.temperature, one.documents, one.normalize_rows, one.filter_first, one.labels),
        *(one.separate_softmax, one.label_weight, one.prior_weight),
    )


class _Last:
    """A value that is made anew only when what it depends on is another than last time."""

    def __init__(self):
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key != self._key:
            self._key, self._value = key, make()
        return self._value


class _Block:
    """Some documents (rows) and the labels that can be predicted for them (columns)."""

    def __init__(self, rows, labels, documents, positives, truth, pairs, mode, prior, k):
        num_labels = positives.columns
        (self._label_scores, label_ids), (self._document_scores, document_ids) = (
            (scores[rows].astype(np.float64), ids[rows]) for scores, ids in (labels, documents)
        )
        place = np.full(truth.rows, -1)
        place[rows] = np.arange(len(rows))
        mine = place[pairs[:, 0]] >= 0
        filtered = place[pairs[mine, 0]] * num_labels + pairs[mine, 1]

        def is_filtered(row, label):
            return np.isin(row * num_labels + label, filtered)

        found = label_ids >= 0
        row, item = np.nonzero(found)
        dropped = np.zeros(found.shape, bool)
        dropped[row, item] = is_filtered(row, label_ids[row, item])
        # Ranks of items by whether filtered labels are dropped first.
        self._ranks = {
            first: _item_ranks(
                np.where(found & ~(dropped & first), self._label_scores, -np.inf),
                np.where(document_ids >= 0, self._document_scores, -np.inf),
                mode,
            )
            for first in (False, True)
        }
        # (row, label) of what labels and documents add, except to filtered labels.
        kept = ~dropped[row, item]
        label_row, self._label_item = row[kept], item[kept]
        row, item = np.nonzero(document_ids >= 0)
        passed = positives.take(document_ids[row, item])
        self._passed_to = np.zeros(document_ids.shape)
        self._passed_to[row, item] = passed.counts()
        row, item = (np.repeat(x, passed.counts()) for x in (row, item))
        kept = ~is_filtered(row, passed.indices)
        row, item, label = row[kept], item[kept], passed.indices[kept]
        keys = np.concatenate(
            [
                label_row * num_labels + label_ids[label_row, self._label_item],
                row * num_labels + label,
            ]
        )
        cells, cell_of = np.unique(keys, return_inverse=True)
        cell_row, label_of = np.divmod(cells, num_labels)
        column = np.arange(len(cells)) - np.searchsorted(cell_row, cell_row)
        self.shape = len(rows), int(column.max(initial=0)) + 1
        self._cells = cell_row * self.shape[1] + column  # in the flat matrix
        of_label, of_document = np.split(cell_of, [len(label_row)])
        self._label_row, self._label_cell = label_row, self._cells[of_label]
        # By cell; within one by rank, the order in which `augment` adds.
        order = np.argsort(of_document, kind="stable")
        of_document = of_document[order]
        self._first = np.flatnonzero(np.diff(of_document, prepend=-1))
        self._document_cell = self._cells[of_document[self._first]]
        self._entries = (row * document_ids.shape[1] + item)[order]  # in the flat matrix of items
        self._cell_ranks = {first: self._best_ranks(*self._ranks[first]) for first in self._ranks}
        self._prior = None
        if prior is not None:
            self._prior = np.ones(self.shape)
            self._prior.flat[self._cells] = prior[label_of]
        # Which positive a cell is, -1 if none.
        wanted = truth.take(rows)
        keys = wanted.row_ids() * num_labels + wanted.indices
        number = np.repeat(truth.indptr[rows] - wanted.indptr[:-1], wanted.counts())
        hit = np.isin(keys, cells)
        self._positive = np.full(self.shape, -1)
        self._positive.flat[self._cells[np.searchsorted(cells, keys[hit])]] = (
            number + np.arange(len(keys))
        )[hit]
        self._k = min(k, self.shape[1])

    def ranks(self, settings: Sequence[AugmentedConfig]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each setting, numbers of positives among the first k, and their ranks."""
        label_side, document_side, power, absent = _Last(), _Last(), _Last(), _Last()
        room = np.empty((2, *self.shape))  # as new arrays of this size would cost as much as sums
        for one in settings:
            limits, joint = _limits(one), one.mode == "joint"
            score = self._mix(
                one,
                label_side.get(
                    (one.temperature, limits[0], one.filter_first),
                    lambda one=one: self._label_side(one),
                ),
                document_side.get(
                    (one.temperature, limits[1], one.normalize_rows, joint and one.filter_first),
                    lambda one=one: self._document_side(one),
                ),
                room,
            )
            weight = 0 if self._prior is None else one.prior_weight
            if weight:
                score *= power.get(weight, lambda w=weight: augmented.powers(self._prior, w))
            score += absent.get(
                (*limits, one.filter_first, weight != 0),
                lambda one=one, weight=weight: self._absent(one, weight),
            )
            yield self._first_positives(score)

    def _label_side(self, one: AugmentedConfig):
        """Mass of each cell before it is divided by the sum, the sum, and the best score."""
        mass, total, top = self._mass(one, self._label_scores, side=0)
        cells = np.zeros(self.shape)
        cells.flat[self._label_cell] = mass[self._label_row, self._label_item]
        return cells, total, top

    def _document_side(self, one: AugmentedConfig):
        mass, total, top = self._mass(one, self._document_scores, side=1)
        if one.normalize_rows:
            mass = mass / np.maximum(self._passed_to, 1)
        cells = np.zeros(self.shape)
        if len(self._first):
            cells.flat[self._document_cell] = np.add.reduceat(
                mass.ravel()[self._entries], self._first
            )
        return cells, total, top

    def _mass(self, one: AugmentedConfig, scores: np.ndarray, side: int):
        kept = self._ranks[one.filter_first][side] < _limits(one)[side]
        logits = np.where(kept, scores / one.temperature, -np.inf)
        top = logits.max(axis=1, initial=-np.inf)
        mass = np.exp(logits - np.where(np.isfinite(top), top, 0)[:, None])
        return mass, mass.sum(axis=1), top

    def _mix(self, one: AugmentedConfig, label_side, document_side, room) -> np.ndarray:
        sides, weights = (label_side, document_side), (one.label_weight, 1 - one.label_weight)
        totals, tops = (np.stack([side[i] for side in sides]) for i in (1, 2))
        scale = np.ones(totals.shape)
        if not one.separate_softmax:  # one softmax over both
            top = tops.max(axis=0)
            scale = np.exp(tops - np.where(np.isfinite(top), top, 0))
            totals = (totals * scale).sum(axis=0)
        scale = scale * np.array(weights)[:, None] / np.where(totals > 0, totals, 1)
        for side, factor, out in zip(sides, scale, room):
            np.multiply(side[0], factor[:, None], out=out)
        return np.add(*room, out=room[0])

    def _absent(self, one: AugmentedConfig, weight: float) -> np.ndarray:
        """-inf for cells that this setting does not retrieve, or its prior removes; else 0."""
        ranks, limits = self._cell_ranks[one.filter_first], _limits(one)
        absent = (ranks[0] >= limits[0]) & (ranks[1] >= limits[1])
        if weight:
            absent |= self._prior == 0
        return np.where(absent, -np.inf, 0.0)

    def _first_positives(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # More than k where scores are equal; columns, as labels, then say which comes first.
        least = np.partition(score, -self._k, axis=1)[:, -self._k, None]
        cell = np.flatnonzero(score >= np.maximum(least, np.finfo(np.float64).min))
        row = cell // self.shape[1]
        order = np.lexsort((cell, -score.ravel()[cell], row))
        cell, row = cell[order], row[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        positive = self._positive.ravel()[cell]
        first = (positive >= 0) & (rank < self._k)
        return positive[first], rank[first]

    def _best_ranks(self, label_ranks: np.ndarray, document_ranks: np.ndarray):
        """Of each cell, the rank of its label, and of the first document that has it."""
        of_label, of_document = np.full((2, *self.shape), _FAR)
        of_label.flat[self._label_cell] = label_ranks[self._label_row, self._label_item]
        if len(self._first):
            of_document.flat[self._document_cell] = np.minimum.reduceat(
                document_ranks.ravel()[self._entries], self._first
            )
        return of_label, of_document


def _item_ranks(labels: np.ndarray, documents: np.ndarray, mode: str):
    """Ranks of labels and of documents, apart or together, by score; -inf has none."""
    both = np.concatenate([labels, documents], axis=1)
    sides = (labels, documents) if mode == "split" else (both,)
    ranks = []
    for scores in sides:
        order = np.argsort(-scores, axis=1, kind="stable")
        rank = np.empty(scores.shape, np.int64)
        np.put_along_axis(rank, order, np.arange(scores.shape[1])[None], axis=1)
        ranks.append(np.where(scores > -np.inf, rank, _FAR))
    return np.split(np.concatenate(ranks, axis=1), [labels.shape[1]], axis=1)


def _limits(one: AugmentedConfig) -> tuple[int, int]:
    """Below which rank a label and a document are retrieved."""
    both = one.labels + one.documents
    return (one.labels, one.documents) if one.mode == "split" else (both, both)


def _space(
    defaults: AugmentedConfig, tune: TuneConfig, prior: np.ndarray | None
) -> dict[str, tuple[Any, ...]]:
    """Field -> what is tried, the default first."""
    space = {}
    for name in FIELDS[1:]:
        tried = getattr(tune, name)
        if name in ("labels", "documents") and defaults.mode == "joint":
            tried = ()  # one search for both has one size
        if name == "prior_weight":
            removes = prior is not None and not (prior > 0).all()
            tried = () if prior is None else [x for x in tried if x >= 0 or not removes]
        space[name] = tuple(dict.fromkeys((getattr(defaults, name), *tried)))
    return space


def _depths(space: Mapping[str, tuple[Any, ...]], mode: str, extra: int) -> tuple[int, int]:
    """Labels and documents to retrieve for all settings; `extra` of them may be filtered."""
    labels, documents = max(space["labels"]), max(space["documents"])
    if mode == "joint":
        return labels + documents + extra, labels + documents + extra
    return labels + extra, documents


def _search(
    start: AugmentedConfig,
    space: Mapping[str, tuple[Any, ...]],
    mean: Callable[[Sequence[AugmentedConfig]], np.ndarray],
) -> AugmentedConfig:
    best = start
    for _ in range(_SWEEPS):
        before = best
        for names in _TOGETHER:
            tried = [
                dataclasses.replace(best, **dict(zip(names, values)))
                for values in itertools.product(*(space[name] for name in names))
            ]
            tried = [best, *tried]  # which stays unless another is better
            best = tried[int(np.argmax(mean(tried)))]
        if best == before:
            break
    return best


def _folds(sources: np.ndarray, folds: int, seed: int) -> Iterator[np.ndarray]:
    """bool[M] per fold: the documents in it; those of one source stay together."""
    _, number = np.unique(sources, return_inverse=True)
    groups = number.max() + 1
    if groups < folds:
        raise ValueError(
            f"tune.folds: expected at least as many sources of validation documents, got {groups} "
            f"for {folds} folds"
        )
    place = np.random.default_rng(seed).permutation(groups)
    for fold in range(folds):
        yield place[number] % folds == fold


def _ranked(one, labels, documents, positives, pairs, k, prior) -> np.ndarray:
    """i32[M, k], the ranking of a setting, by the functions that evaluation uses."""
    extra, num_labels = filtered_per_document(pairs), positives.columns
    retrieved = tuple(x[:, : one.documents] for x in documents)
    if one.mode == "joint":
        wanted = one.labels + one.documents + (extra if one.filter_first else 0)
        retrieved = augmented.merge(labels, documents, num_labels, wanted)
    items = augmented.to_mix(one, labels, retrieved, pairs, num_labels)
    scores, ids = augmented.augment(*items, positives, one, k + extra, prior)
    return drop_filtered(scores, ids, pairs, k)[1]


def _values(one: AugmentedConfig) -> dict[str, Any]:
    return {name: getattr(one, name) for name in FIELDS}
