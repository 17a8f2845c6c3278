"""Weights of retrieval-augmented inference, chosen on validation documents.

`choose` is the pure part: what was retrieved, once and deep enough, to a choice. Many settings of
`AugmentedConfig` are scored on it, none with a search of its own, and the best one counts only if
it beats the settings that the config has by more than chance. `tuned` keeps a choice in a workdir.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from xmc_jax.config import AugmentedConfig, EvalConfig, TuneConfig
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.retrieval import augmented, evaluate, exact
from xmc_jax.retrieval.augmented import Mixture, Nearest
from xmc_jax.retrieval.metrics import NAMES, Truth, parse
from xmc_jax.runtime import distributed
from xmc_jax.runtime.wording import counted

FIELDS = (
    *("mode", "labels", "documents", "temperature", "label_weight", "separate_softmax"),
    *("normalize_rows", "prior_weight"),
)
"""Fields of `AugmentedConfig` that a choice is about; the mode stays as it is."""

_AT_ONCE = 16  # settings whose rankings are in memory
# What is searched together, in this order, the rest held; over again until nothing changes.
_TOGETHER = (
    ("temperature", "label_weight", "separate_softmax"),
    ("documents", "normalize_rows"),
    ("labels",),
    ("prior_weight",),
)
_SWEEPS = 4  # at most


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


def split_of(store: Store) -> str:
    """The split whose documents are for tuning: those that the data name, or drawn ones.

    Raises:
        ValueError: the store has none.
    """
    if store.validation is not None:
        return "validation"
    if store.manifest["validation"] is None:
        raise ValueError(
            f"tune: expected held-out training documents in {store.folder}, found the test split"
        )
    return "test"


def tune(
    documents: np.ndarray,
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
        documents: f32[M, D], unit embeddings of the documents of `split_of(store)`.
        labels: f32[L, D], unit embeddings or prototypes of the labels.
        train: f32[N, D], unit embeddings of the train documents.
        store: the dataset.
        config: of the search, and the settings to start from.
        tune: see `TuneConfig`.
        mesh: see `exact.search`.
        prior: f[L], see `augmented.rank`.

    Raises:
        ValueError: the store has no documents for tuning, mixing is off, or there are too few
            sources.
    """
    split = split_of(store)
    if not config.augmented.enabled:
        raise ValueError("tune: expected --config.eval.augmented.enabled=True, got False")
    sources = store.groups(split)
    sources = np.arange(len(documents)) if sources is None else np.asarray(sources)
    rows = sample(sources, tune.max_documents, tune.seed)
    excluded = Csr.of_pairs(store.filter(split), len(documents), store.num_labels).take(rows)
    depths = _depths(_space(config.augmented, tune, prior), config.augmented.mode, config.k)
    nearest = evaluate.retrieve(
        documents[rows], labels, train, config, depths, excluded, mesh, prior
    )
    if not distributed.is_first():
        return None
    started = time.perf_counter()
    choice = choose(
        *nearest,
        store.positives("train"),
        store.positives(split).take(rows),
        excluded,
        config,
        tune,
        store.inverse_propensity,
        sources[rows],
        prior,
    )
    logging.info(
        "%s on %s in %.1f s",
        counted(choice.settings, "setting"),
        counted(choice.documents, "document"),
        time.perf_counter() - started,
    )
    return choice


def choose(
    labels: Nearest,
    documents: Nearest,
    positives: Csr,
    truth: Csr,
    excluded: Csr,
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
        labels: the labels nearest to M documents, see `augmented.rank`; as many as any setting
            needs.
        documents: the train documents nearest to them, likewise.
        positives: [N, L], of the train documents.
        truth: [M, L], the positives of the M documents.
        excluded: [M, L], labels that must not be predicted.
        config: of the ranking; `config.augmented` are the defaults.
        tune: see `TuneConfig`.
        inverse_propensity: f64[L].
        sources: i[M], where each document comes from.
        prior: f[L], see `augmented.rank`.

    Raises:
        ValueError: there are fewer sources than folds, or the metric goes beyond `config.k`.
    """
    parts = parse(tune.metric)
    if max(k for _, k in parts) > config.k:
        raise ValueError(
            f"tune.metric: expected cut-offs within eval.k = {config.k}, got {tune.metric}"
        )
    defaults = dataclasses.replace(config.augmented, weights="config")
    space = _space(defaults, tune, prior)
    measured = Truth(truth.indptr, truth.indices, inverse_propensity)
    depth = max(k for _, k in parts)
    mixture = Mixture(labels, documents, positives, defaults.mode, excluded, prior, reuse=True)
    seen: dict[AugmentedConfig, np.ndarray] = {}

    def values(settings: Sequence[AugmentedConfig]) -> np.ndarray:
        """f64[S, M], what each document adds to the metric."""
        new = sorted({*settings} - {*seen}, key=_by_cost)
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            for one, (_, ids) in zip(some, mixture.rank(some, depth)):
                ranks = measured.ranks(ids, (depth,))
                seen[one] = np.mean([measured.per_document(*x, ranks) for x in parts], axis=0)
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
    rankings = mixture.rank([defaults, best], config.k)
    for row, one, (_, ids) in zip(("defaults", "best"), (defaults, best), rankings):
        ranks = measured.ranks(ids, config.cut_offs)
        metrics[row] = {
            f"{n}@{k}": measured.mean(n, k, ranks) for n in NAMES for k in config.cut_offs
        }
        metrics[row][tune.metric] = float(seen[one].mean())
        columns = [column for column in evaluate.COLUMNS if column in metrics[row]]
        added[row] = {c: measured.per_document(*parse(c)[0], ranks) for c in columns}
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


def report(choice: Choice, tune: TuneConfig) -> str:
    """What was found, as a table; what to use, as flags."""
    columns = tuple(dict.fromkeys((*evaluate.COLUMNS, tune.metric)))
    rows = {name: choice.metrics[name] for name in ("defaults", "best")}
    rows["difference"] = {
        name: value - rows["defaults"][name] for name, value in rows["best"].items()
    }
    rows["its standard error"] = choice.standard_errors["difference"]
    lines = [
        f"{counted(choice.documents, 'validation document')} of "
        f"{counted(choice.sources, 'source')}, {counted(choice.settings, 'setting')}",
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
        for name, value in values_of(choice.best).items()
        if value != getattr(choice.defaults, name)
    ]


def _space(
    defaults: AugmentedConfig, tune: TuneConfig, prior: np.ndarray | None
) -> dict[str, tuple[Any, ...]]:
    """Field -> what is tried, the default first."""
    space = {}
    for name in FIELDS[1:]:
        tried = getattr(tune, name)
        if name in ("labels", "documents") and defaults.mode == "joint":
            tried = ()  # one search for both has one size
        if name == "prior_weight" and prior is None:
            tried = ()
        space[name] = tuple(dict.fromkeys((getattr(defaults, name), *tried)))
    return space


def _depths(space: Mapping[str, tuple[Any, ...]], mode: str, k: int) -> tuple[int, int]:
    """Labels and documents to retrieve for all settings."""
    most = {name: max(space[name]) for name in ("labels", "documents")}
    return augmented.depths(AugmentedConfig(mode=mode, **most), k)


def _by_cost(one: AugmentedConfig) -> tuple:
    """Neighbours in this order share most of their work in `Mixture.rank`."""
    return one.temperature, one.documents, one.normalize_rows, one.labels, one.prior_weight


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


def values_of(one: AugmentedConfig) -> dict[str, Any]:
    """Those of `FIELDS`."""
    return {name: getattr(one, name) for name in FIELDS}
