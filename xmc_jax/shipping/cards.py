"""What a person reads in an exported folder: a model card, a data card, licences."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from xmc_jax.config import DataConfig
from xmc_jax.data import bundled
from xmc_jax.models import hf
from xmc_jax.retrieval import evaluate
from xmc_jax.runtime.wording import counted
from xmc_jax.training.run import Run

NAMES = ("README.md", "DATA_CARD.md", "LICENSE.md")
_ROWS = {"plain": "labels by inner product", "augmented": "mixed with neighbouring documents"}


def make(content: Mapping[str, Any], run: Run) -> dict[str, str]:
    """Name of a file, one of `NAMES`, to its text.

    Args:
        run: the run that is exported.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    data_card, data_images = _source(run.config.data) / "DATA_CARD.md", run.data.images
    values = {
        **content,
        "base": _base(run),
        "columns": evaluate.COLUMNS,
        "counted": counted,
        "data_card": data_card.read_text("utf-8").strip() if data_card.is_file() else "",
        "images": content["model"]["images"],
        "num_test": run.data.num_test,
        "picture_shares": {} if data_images is None else data_images.shares,
        "rows": _ROWS,
    }
    return {name: templates.get_template(name).render(values) for name in NAMES}


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


def _source(section: DataConfig) -> pathlib.Path:
    """The folder that the data came from."""
    if section.records is not None:
        records = pathlib.Path(section.records)
        return records.parent if records.is_file() else records
    if section.raw_dir == "bundled":
        return bundled.path(section.dataset)
    return pathlib.Path(section.raw_dir)
