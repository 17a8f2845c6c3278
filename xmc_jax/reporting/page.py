"""The report of a run as one page that needs nothing else: `<workdir>/report.html`."""

import importlib.resources
from collections.abc import Mapping
from typing import Any

from etils import epath
from markupsafe import Markup

from xmc_jax.data.store import Store
from xmc_jax.files import atomic
from xmc_jax.reporting import examples, overview, predictions, workdir_contents
from xmc_jax.reporting.rendering import render
from xmc_jax.retrieval import evaluate
from xmc_jax.retrieval.evaluate import Evaluation

NAME = "report.html"
# Sections in their order: id, which is also the name of the template, and title.
_SECTIONS = {
    "training": "Training",
    "frequency": "Head to tail",
    "scores": "Scores",
    "changes": "Before and after",
    "examples": "Examples",
    "time": "Time",
    "config": "Config",
}


def write(
    workdir: epath.PathLike,
    data: Store,
    *,
    evaluation: Evaluation | None = None,
    recipe: Mapping[str, Any] | None = None,
    pictures: Any | None = None,
) -> epath.Path:
    """Writes report.html. The page of a run that has not ended shows the results so far.

    It shows config.json and metrics.jsonl, and if they exist metrics.json, predictions and run.json
    (`workdir_contents.write_facts`). Only one process may call it.

    Args:
        workdir: of the run, local or remote.
        data: the dataset it was trained and evaluated on.
        evaluation: of its last step, so that its predictions need not be read.
        recipe: the config before flags changed it, to show the changes; None if not known.
        pictures: the source of the items' pictures, a `vision.sources.Place`; None without.

    Returns:
        Path of the page.

    Raises:
        ValueError: there is no run in the workdir, or a file of it is damaged or of other data.
    """
    run = workdir_contents.read(workdir)
    documents = evaluate.sample(data.num_test)
    rankings = workdir_contents.rankings(workdir, run.step, documents, data.num_test, evaluation)
    epochs = overview.epochs(run, data)
    views: dict[str, Any] = {
        "headline": overview.headline(run, data.num_test),
        "training": overview.training(run, data, epochs),
        "time": overview.time(run, epochs),
        "config": run.config,
        "fields": overview.fields(run, recipe),
    }
    if "plain" in rankings:
        matched = predictions.match(data, documents, rankings)
        views |= {
            "predictions": matched,
            "frequency": predictions.frequency(matched),
            "scores": predictions.scores(matched),
            "changes": predictions.changes(matched),
            "examples": examples.examples(matched, pictures),
        }
    page = render(
        "page.html",
        style=Markup(importlib.resources.files(__package__).joinpath("style.css").read_text()),
        sections=[{"id": id, "title": title} for id, title in _SECTIONS.items() if views.get(id)],
        data=data,
        labels_per_document=len(data.positives("train").indices) / max(data.num_documents, 1),
        step=max((record["step"] for record in run.records), default=0),
        epochs=epochs,
        facts=run.facts,
        index=run.index,
        **views,
    )
    path = epath.Path(workdir) / NAME
    atomic.write(path, page)
    return path
