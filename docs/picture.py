"""Writes what architecture.md shows of the folders: their list, and the way of the data.

    python docs/picture.py

The folders are those of the package, in the order of `LAYERS` of tests/test_layering.py; their
sentences are the docstrings of their `__init__.py`.
"""

import ast
import pathlib
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "xmc_jax"
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- written by docs/picture.py -->", "<!-- end -->"

# From folder to folder, and what goes there. `tests/test_pages.py` says if a folder is missing.
WAY = (
    ("data/tables", "data/records", "records"),
    ("data/records", "data", "raw files"),
    ("data/synthetic", "data", "raw files"),
    ("data/bundled", "data", "raw files"),
    ("data/tables", "images", "paths, URLs"),
    ("images", "data", "image vectors"),
    ("data", "training", "batches"),
    ("models", "training", "encoder, weights"),
    ("training", "retrieval", "embeddings"),
    ("retrieval", "training", "metrics"),
    ("training", "planning", "programs"),
    ("training", "reporting", "records"),
    ("retrieval", "reporting", "predictions"),
    ("training", "shipping", "checkpoint"),
    ("retrieval", "shipping", "index"),
    ("shipping", "shipping/serve", "exported folder"),
)
BASE = ("files", "config", "runtime")  # all others use them


def layers() -> list[tuple[str, ...]]:
    """The parts of the package by layer; a layer imports only those before it."""
    text = (ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8")
    assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    values = {ast.unparse(node.targets[0]): node.value for node in assigned}
    return list(ast.literal_eval(values["LAYERS"]))[::-1]


def folders() -> list[str]:
    """All packages within the package, as paths."""
    return sorted(x.parent.relative_to(PACKAGE).as_posix() for x in PACKAGE.rglob("*/__init__.py"))


def block() -> str:
    """The list and the picture, in Markdown."""
    lines = []
    for part in [part for layer in layers() for part in layer]:
        file = PACKAGE / part / "__init__.py" if (PACKAGE / part).is_dir() else PACKAGE / part
        text = file.with_suffix(".py").read_text(encoding="utf-8")
        sentence = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        item = f"- `{part}`: {sentence.partition(': `python')[0].rstrip('.')}."
        lines.append(textwrap.fill(item, 100, subsequent_indent="  "))
    lines += ["", "```mermaid", "flowchart LR"]
    for start, end, what in WAY:
        lines.append(f'    {_node(start)} -- "{what}" --> {_node(end)}')
    lines.append('    subgraph base["used by all"]')
    lines += [f"        {_node(folder)}" for folder in BASE]
    return "\n".join([*lines, "    end", "```"])


def _node(folder: str) -> str:
    return f'{folder.replace("/", "_")}["{folder}/"]'


def page(text: str) -> str:
    """The page with its block written anew."""
    before, rest = text.split(START)
    return f"{before}{START}\n{block()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
