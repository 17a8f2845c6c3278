"""The report of a run as one page without anything outside it: `<workdir>/report.html`."""

import importlib.resources
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from etils import epath

from xmc_jax.data.store import Store
from xmc_jax.files import atomic
from xmc_jax.reporting import examples, files, overview, predictions
from xmc_jax.reporting.files import Run
from xmc_jax.reporting.markup import Child, element, render
from xmc_jax.retrieval import evaluate
from xmc_jax.retrieval.evaluate import Evaluation

NAME = "report.html"
# Should a text get past the escaping, it still can neither load anything nor run.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def write(
    workdir: epath.PathLike,
    data: Store,
    *,
    evaluation: Evaluation | None = None,
    recipe: Mapping[str, Any] | None = None,
    pictures: Any | None = None,
) -> epath.Path:
    """Writes report.html; of a run that has not ended, what there is by now.

    It shows what the workdir holds: config.json, metrics.jsonl, and where they are metrics.json,
    predictions and run.json (`files.write_facts`). One process writes it.

    Args:
        workdir: of the run, local or remote.
        data: the dataset it was trained and evaluated on.
        evaluation: of its last step, so that its predictions need not be read.
        recipe: the config before flags changed it, to show what they changed; None if not known.
        pictures: where the items' pictures are, a `vision.sources.Place`; None where there are
            none.

    Returns:
        Where it is.

    Raises:
        ValueError: there is no run in the workdir, or a file of it is damaged or of other data.
    """
    run = files.read(workdir)
    path = epath.Path(workdir) / NAME
    atomic.write(path, _page(run, workdir, data, evaluation, recipe, pictures))
    return path


def _page(run: Run, workdir, data: Store, evaluation, recipe, pictures) -> str:
    documents = evaluate.sample(data.num_test)
    rankings = files.rankings(workdir, run.step, documents, data.num_test, evaluation)
    sections: list[Element | None] = [overview.training(run, data)]
    if "plain" in rankings:
        seen = predictions.look(data, documents, rankings)
        sections += [
            predictions.frequency(seen),
            predictions.scores(seen),
            predictions.changes(seen),
            examples.examples(seen, pictures),
        ]
    sections += [overview.time(run, data), overview.config(run, recipe)]
    present = [section for section in sections if section is not None]
    name = run.config["name"]
    return render(
        element(
            "html",
            {"lang": "en"},
            element(
                "head",
                None,
                element("meta", {"charset": "utf-8"}),
                element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
                element(
                    "meta",
                    {"name": "viewport", "content": "width=device-width, initial-scale=1"},
                ),
                element("meta", {"name": "color-scheme", "content": "light dark"}),
                element("title", None, f"{data.name}, {name}"),
                element("style", None, _style()),
            ),
            element(
                "body",
                None,
                element(
                    "header",
                    None,
                    element("h1", None, data.name),
                    element("p", {"class": "facts"}, *_subtitle(run, name)),
                    overview.dataset(data),
                    _contents(present),
                ),
                element("main", None, *overview.headline(run, data), *present),
                element("footer", None, _footer(run)),
            ),
        )
    )


def _subtitle(run: Run, name: str) -> list[Child]:
    steps = max((record["step"] for record in run.records), default=0)
    hardware, ended = run.facts.get("hardware", {}), run.facts.get("ended")
    parts: list[Child] = [element("b", None, name), f", step {steps:,}"]
    if ended:
        parts.append(f", ended {ended}")
    if hardware:
        parts.append(f", on {hardware['devices']}, {hardware['cores']} cores")
    return parts


def _contents(sections: list[Element]) -> Element:
    links = [
        element("a", {"href": f"#{section.get('id')}"}, section[0].text) for section in sections
    ]
    return element("nav", {"aria-label": "Contents"}, *links)


def _footer(run: Run) -> str:
    version = run.facts.get("versions", {}).get("xmc_jax")
    return f"Written by xmc_jax {version}." if version else "Written by xmc_jax."


def _style() -> str:
    return importlib.resources.files(__package__).joinpath("style.css").read_text()
