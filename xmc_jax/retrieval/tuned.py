"""The weights that tuning chose, in a workdir, and what they may be used for: tuned.json."""

import dataclasses
import json
from typing import Any

from etils import epath

from xmc_jax.config import AugmentedConfig, RunConfig
from xmc_jax.data.store import Store
from xmc_jax.files import atomic, manifests, workdirs
from xmc_jax.retrieval.augmented import RETIRED
from xmc_jax.retrieval.tuning import FIELDS, Choice, values_of

FILE = "tuned.json"
"""Name of the file in a workdir."""
FORMAT = 1
# Fields of a config, beside `workdirs.RESUMABLE`, that weights do not depend on: names, and what
# differs between a validation run and the run on all training documents.
_APART = (
    *("name", "baseline", "provenance", "data.validation_fraction", "data.validation_seed"),
    *("train.log_every", "train.zero_shot"),
)


def belongs(config: RunConfig, store: Store) -> dict[str, Any]:
    """What a choice depends on: the recipe and the training data; not which documents are held out.

    Args:
        config: of the run.
        store: its data, whole or with documents held out.
    """
    apart = (*workdirs.RESUMABLE, *_APART)
    recipe = {
        name: value
        for name, value in manifests.flat(dataclasses.asdict(config)).items()
        if not any(name == one or name.startswith(f"{one}.") for one in apart)
    }
    raw = store.manifest["raw"]
    files = {
        f"data: {role} file": raw[role]["sha256"]
        for role in ("train", "train labels", "label", "validation")
        if role in raw
    }
    return json.loads(json.dumps(recipe | files))  # tuples are lists there


def write(
    workdir: epath.PathLike,
    choice: Choice,
    config: RunConfig,
    store: Store,
) -> epath.Path:
    """Writes a choice to `tuned.json` in a workdir, and returns its path.

    Args:
        workdir: local or remote.
        choice: see `tuning.choose`.
        config: of the run, see `belongs`.
        store: the data that were tuned on.
    """
    path = epath.Path(workdir) / FILE
    content = {
        "format": FORMAT,
        "augmented": values_of(choice.chosen),
        "prior": choice.chosen.prior,
        "accepted": choice.accepted,
        "metric": config.tune.metric,
        "gain": choice.gain,
        "standard_error": choice.standard_error,
        "rows": {
            name: {
                "augmented": values_of(one),
                "metrics": choice.metrics[name],
                "standard_errors": choice.standard_errors[name],
            }
            for name, one in (("defaults", choice.defaults), ("best", choice.best))
        },
        "standard_errors_of_differences": choice.standard_errors["difference"],
        "validation": {
            **(store.manifest["validation"] or {}),  # how they were drawn, if they were
            "data": store.digest,
            "documents": choice.documents,
            "sources": choice.sources,
        },
        "settings": choice.settings,
        "tune": dataclasses.asdict(config.tune),
        "belongs_to": belongs(config, store),
    }
    atomic.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def read(workdir: epath.PathLike, config: RunConfig, store: Store) -> AugmentedConfig | None:
    """The section `eval.augmented` with the values chosen for a config; None without a file.

    Args:
        workdir: where `write` wrote.
        config: of the run, see `belongs`.
        store: its data.

    Raises:
        ValueError: the file cannot be read, is of another config or dataset, or was made with a
            prior and there is none, or the other way round.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    current, again = config.eval.augmented, "tune again with --mode=tune"
    try:
        content = json.loads(path.read_text())
        prior, then = content["prior"], dict(content["belongs_to"])
        settings = {n: x for n, x in content["augmented"].items() if n not in RETIRED}
        if content["format"] != FORMAT or set(settings) != set(FIELDS):
            raise ValueError("other fields")
        for name, value in settings.items():
            kind = type(getattr(current, name))
            if type(value) is not kind and (kind, type(value)) != (float, int):
                raise ValueError(f"{name}: {value!r:.60}")
        chosen = dataclasses.replace(current, weights="config", **settings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected what --mode=tune writes, got {error!r}; {again}"
        ) from None
    if differ := manifests.difference(then, belongs(config, store)):
        raise ValueError(f"{path}: made for another config ({'; '.join(differ)}); {again}")
    if (prior is None) != (current.prior is None):
        raise ValueError(
            f"{path}: expected --config.eval.augmented.prior as it was tuned with, {prior!r}, got "
            f"{current.prior!r}; set it, or {again}"
        )
    return chosen
