"""A number for each label, known before any document: popularity, margin, in stock."""

import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from xmc_jax.data import raw
from xmc_jax.data.store import Store

FREQUENCY = "frequency"
"""The prior that needs no file."""


def read(source: str, store: Store) -> np.ndarray:
    """f64[L], the prior of every label of a dataset.

    A file has a line per label: `.tsv` or `.txt` have `id <tab> number`, `.jsonl` has
    `{"id": ..., "prior": number}`; either may be gzipped. Other ids than labels' are passed over.

    Args:
        source: the path of a file; or "frequency", 1 + the training documents of a label, so that
            labels without any remain.
        store: the dataset; labels are known by their `uids`.

    Raises:
        ValueError: there is no such file, a line has no number of at least 0 for an id, an id has
            two lines, or a label has none.
    """
    if source == FREQUENCY:
        return 1.0 + store.label_frequency
    path = pathlib.Path(source)
    if not path.is_file():
        raise ValueError(
            f"eval.augmented.prior: expected a file or {FREQUENCY!r}, found no file {source!r}"
        )
    labels = store.uids("label")
    numbers: dict[str, float] = dict.fromkeys(labels, math.nan)
    for where, label, number in _lines(path):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{where}: expected a finite number of at least 0, found {number:g}")
        if label in numbers:
            if not math.isnan(numbers[label]):
                raise ValueError(f"{where}: expected a label once, found {label!r} again")
            numbers[label] = number
    prior = np.array([numbers[label] for label in labels])
    missing = np.flatnonzero(np.isnan(prior))
    if len(missing):
        raise ValueError(
            f"{path}: expected a number for each of {len(labels):,} labels, found none for "
            f"{len(missing):,}, the first {labels[missing[0]]!r}; 1 leaves a score as it is"
        )
    return prior


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str, float]]:
    """Where it stands, the label's id and the number, of each line."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    parse = {"tsv": _tabbed, "txt": _tabbed, "jsonl": _object}.get(kind)
    if parse is None:
        raise ValueError(f"{path}: expected .tsv, .txt or .jsonl, perhaps .gz, found another name")
    for number, line in raw.whole_lines(path):
        where = f"{path}:{number}"
        try:
            text = line.rstrip(b"\r\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: expected UTF-8, found byte 0x{line[error.start]:02x}"
            ) from None
        if text.strip():
            yield where, *parse(where, text)


def _tabbed(where: str, text: str) -> tuple[str, float]:
    label, tab, written = text.rpartition("\t")
    try:
        number = float(written)
    except ValueError:
        tab = ""
    if not tab:
        raise ValueError(f"{where}: expected an id, a tab and a number, found {text[:80]!r}")
    return label, number


def _object(where: str, text: str) -> tuple[str, float]:
    expected = 'expected {"id": a text, "prior": a number}'
    try:
        found = json.loads(text, parse_int=float)  # past float64's range inf
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {expected}, found no JSON: {error}") from None
    label, number = (found.get("id"), found.get("prior")) if isinstance(found, dict) else (0, 0)
    if not isinstance(label, str) or not isinstance(number, float | bool):  # true is 1
        raise ValueError(f"{where}: {expected}, found {text[:80]!r}")
    return label, float(number)
