"""The page docs/config.md: every field of a config, its type, its default and its meaning."""

import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from xmc_jax.config.declare import Option, options
from xmc_jax.config.run_config import RunConfig
from xmc_jax.config.shipping_config import LabelsConfig, PredictConfig, ServeConfig

_WIDTH = 100
_HEAD = """\
# Config

Every field of a config. This page is made by `python -m xmc_jax.config > docs/config.md` from the
declarations in `xmc_jax/config/`, which are also what `configs/vixml.py` starts from and what
checks the values. `--config.SECTION.FIELD=VALUE` sets a field of a run; the sections `predict`,
`labels` and `serve` belong to the modes of these names, and `--SECTION.FIELD=VALUE` sets them.

The end of a line says where a default comes from: [V] the ViXML paper, arXiv 2511.13189v1, with its
supplement; [script] the run scripts or the code of the reference; [ours] chosen here. A recipe may
replace the default (`configs/`)."""
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "fields"}


def page() -> str:
    """The page, in lines of at most 100 columns."""
    blocks = [_HEAD, *_section("", RunConfig)]
    for name, kind in (
        ("predict", PredictConfig),
        ("labels", LabelsConfig),
        ("serve", ServeConfig),
    ):
        blocks += _section(name, kind)
    return "\n\n".join(blocks) + "\n"


def _section(path: str, kind: type) -> Iterator[str]:
    """The blocks of a section and of the sections within it."""
    about = " ".join((kind.__doc__ or "").split())
    if path:
        yield f"## `{path}`\n\n{textwrap.fill(about, _WIDTH, break_on_hyphens=False)}"
    declared = list(options(kind))
    values = [_value(path, option) for option in declared if option.section is None]
    yield "\n".join(values)
    for option in declared:
        if option.section:
            yield from _section(f"{path}.{option.name}" if path else option.name, option.section)


def _value(path: str, option: Option) -> str:
    name = f"{path}.{option.name}" if path else option.name
    kind = _kind(option.kind) + (" or none" if option.optional else "")
    default = "none" if option.default is None else f"`{option.default!r}`"
    meaning = option.text.replace("*", r"\*").replace("<", r"\<")
    text = f"- `{name}` ({kind}; default {default}): {meaning}"
    return textwrap.fill(
        text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _kind(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        each = _kind(parts[0])
        return f"pairs: {each}" if typing.get_origin(parts[0]) is tuple else f"sequence: {each}"
    if origin is tuple:
        return ", ".join(map(_kind, parts))
    return _NAMES[origin or hint]
