"""What a person reads in an exported folder: a model card, a data card, licences."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from xmc_jax.data import bundled
from xmc_jax.models import hf
from xmc_jax.retrieval import evaluate
from xmc_jax.runtime.wording import counted
from xmc_jax.training.run import Run

NAMES = ("README.md", "DATA_CARD.md", "LICENSE.md")
_ROWS = {"plain": "labels by inner product", "augmented": "mixed with neighbouring documents"}

_LICENSE_TEXT = """The files of this folder come under the licences of what they are made of:

- the weights are derived from {base}: see that model's licence;
- label and document texts, identifiers and what is computed of them, are those of {dataset}: see
  DATA_CARD.md;
- xmc_jax, which wrote the folder, is under the Apache License 2.0, which asks nothing of what it
  writes.

Who ships this folder says here under which licence.
"""


def make(content: Mapping[str, Any], fields: Mapping[str, Any], run: Run) -> dict[str, str]:
    """Name of a file, one of `NAMES`, to its text.

    Args:
        content: of artifact.json.
        fields: the config of the run.
    """
    texts = (
        _model_card(content, fields, run),
        _data_card(content, fields, run),
        _LICENSE_TEXT.format(base=_base(run), dataset=content["dataset"]["name"]),
    )
    return dict(zip(NAMES, texts, strict=True))


def public(tree: Any) -> Any:
    """A config as JSON, in which a path of this machine is the name of its file or folder.

    Others need no such path, and it may tell names that they should not know.
    """
    if isinstance(tree, Mapping):
        return {key: public(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [public(value) for value in tree]
    if not isinstance(tree, str) or not tree:
        return tree
    is_path = tree.startswith(("/", "~", "./", "../")) or re.fullmatch(r"\w+://\S+", tree)
    if is_path or ("/" in tree and pathlib.Path(tree).exists()):
        return pathlib.PurePath(tree).name
    return tree


def _base(run: Run) -> str:
    config = run.config.encoder
    if config.init == "random":
        return f"random weights in the shape of {public(config.backbone)}"
    return public(hf.resolve(config.backbone, config.revision, weights=False).public_name)


def _model_card(content: Mapping[str, Any], fields: Mapping[str, Any], run: Run) -> str:
    dataset, base, model = content["dataset"]["name"], _base(run), content["model"]
    front = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [xmc_jax, extreme-multi-label-classification, retrieval, sentence-transformers]",
        *([f"base_model: {json.dumps(base)}"] if base.count("/") == 1 else []),
        "---",
    ]
    columns = evaluate.COLUMNS
    rows = [
        f"| {_ROWS.get(kind, kind)} | "
        + " | ".join(f"{100 * found[name]:.2f}" if name in found else "-" for name in columns)
        + " |"
        for kind, found in content["metrics"].items()
    ]
    images = model["images"]
    takes = (
        "texts" if images is None else f"texts and up to {counted(images['per_item'], 'picture')}"
    )
    lines = [
        *front,
        f"# {content['name']}",
        "",
        f"Ranks the {counted(content['labels']['count'], 'label')} of {dataset} for "
        f"documents of {takes}. One Siamese tower of {base}, trained with xmc_jax "
        f"{content['versions']['xmc_jax']} ({counted(content['step'], 'step')}); exported "
        f"{content['created']}.",
        "",
        "## Use",
        "",
        "```python",
        "from xmc_jax.shipping.predictor import Predictor",
        'predictor = Predictor.open("path/to/this/folder")',
        'predictor.predict(["a new document"], k=10)',
        "```",
        "",
        "`python -m xmc_jax.main --mode=predict --artifact=path/to/this/folder --input=new.jsonl "
        "--output=out.jsonl` does the same for files, `--mode=serve --artifact=...` over HTTP. "
        '`SentenceTransformer("path/to/this/folder").encode(texts)` gives the same embeddings of '
        "texts; the labels to compare them with are `labels/embeddings.npy`.",
        "",
        "## How good it is",
        "",
        f"On the {counted(run.data.num_test, 'test document')} of {dataset}, percent:",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *rows,
    ]
    if content["index"]:
        index = content["index"]
        lines += [
            "",
            f"The ScaNN index finds {100 * index['recall']:.2f} % of the "
            f"{counted(index['k'], 'label')} that exact search finds, on "
            f"{counted(index['queries'], 'test document')}.",
        ]
    lines += ["", "## What it takes", ""]
    lines += [f"- texts of at most {model['max_length']} tokens; more is cut"]
    if images is None:
        lines += ["- no pictures"]
    else:
        carried = "carried in `vision/`" if images["folder"] else "not in this folder"
        revision = f" at {images['revision']}" if images["revision"] else ""
        lines += [
            f"- pictures, as vectors of {images['encoder']}{revision} "
            f"(sha256 {images['digest']}), {carried}"
        ]
    lines += [
        *_prompt_lines(model),
        "- embeddings are unit vectors, " + f"{model['width']} wide, pooled by {model['pooling']}",
        "",
        "## Limits",
        "",
        "It knows what its training documents and their labels show, and repeats their biases: "
        "labels that few documents have are predicted worse (PSP@k against P@k above says how much "
        "worse). Scores order labels; they are no probabilities.",
        "",
        "## Made with",
        "",
        ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        + ". The whole config is in `artifact.json`.",
        "",
    ]
    return "\n".join(lines)


def _prompt_lines(model: Mapping[str, Any]) -> list[str]:
    document, label = model["document_prompt"], model["label_prompt"]
    if not document and not label:
        return []
    return [f"- texts of documents begin with {document!r}, those of labels with {label!r}"]


def _data_card(content: Mapping[str, Any], fields: Mapping[str, Any], run: Run) -> str:
    report = content["dataset"]["report"]
    lines = [
        f"# {content['dataset']['name']}",
        "",
        "What the model was trained and tested on.",
        "",
    ]
    for split, facts in report.items():
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items())
        lines.append(f"- **{split}**: {shown}")
    if run.data.images is not None:
        shares = run.data.images.shares
        lines.append(
            "- **pictures**: "
            + ", ".join(f"{share:.1f} % of {split}" for split, share in shares.items())
        )
    own = _source(fields["data"]) / "DATA_CARD.md"
    if own.is_file():
        lines += ["", "---", "", own.read_text(encoding="utf-8").strip()]
    else:
        lines += [
            "",
            "Its origin and licence are not recorded; who ships this folder says them here.",
        ]
    return "\n".join(lines) + "\n"


def _source(section: Mapping[str, Any]) -> pathlib.Path:
    """The folder that the data came from."""
    if section["records"] is not None:
        given = pathlib.Path(section["records"])
        return given.parent if given.is_file() else given
    if section["raw_dir"] == "bundled":
        return bundled.path(section["dataset"])
    return pathlib.Path(section["raw_dir"])
