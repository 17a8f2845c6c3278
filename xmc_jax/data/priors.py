"""A number for each label, known before any document: popularity, margin, in stock."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from xmc_jax.data.store import Store
from xmc_jax.data.tables import cell_values, table_files
from xmc_jax.runtime.wording import counted

FREQUENCY = "frequency"
"""The prior that needs no file."""

_COLUMNS = ("id", "prior")


def read(source: str, store: Store) -> np.ndarray:
    """f64[L], the prior of every label of a dataset.

    A file has columns `id` and `prior`, see `record_files`; `.tsv`, `.txt` and `.csv` may have no
    header. Ids that no label has are passed over.

    Args:
        source: the path of a file; or "frequency", 1 + the training documents of a label, so that
            labels without any remain.
        store: the dataset; labels are known by their `uids`.

    Raises:
        ValueError: there is no such file, a record has no number of at least 0 for an id, an id
            has two records, or a label has none.
    """
    if source == FREQUENCY:
        return 1.0 + store.label_frequency
    path = pathlib.Path(source)
    if not path.is_file():
        raise ValueError(
            f"eval.augmented.prior: expected a file or {FREQUENCY!r}, found no file {source!r}"
        )
    labels = list(map(cell_values.normal, store.uids("label")))
    numbers: dict[str, float] = dict.fromkeys(labels, math.nan)
    for where, label, number in _numbers(path):
        if label in numbers:
            if not math.isnan(numbers[label]):
                raise ValueError(f"{where}: expected a label once, found {label!r} again")
            numbers[label] = number
    prior = np.array([numbers[label] for label in labels])
    missing = np.flatnonzero(np.isnan(prior))
    if len(missing):
        raise ValueError(
            f"{path}: expected a number for each of {counted(len(labels), 'label')}, found none "
            f"for {len(missing):,}, the first {labels[missing[0]]!r}; 1 leaves a score as it is"
        )
    return prior


def _numbers(path: pathlib.Path) -> Iterator[tuple[str, str, float]]:
    """Place, id of the label and number of each record."""
    table = table_files.open_table(path, headerless=_COLUMNS)
    if absent := [name for name in _COLUMNS if table.columns and name not in table.columns]:
        listed = ", ".join(table.columns)[:200]
        raise ValueError(f"{path}: expected columns id and prior, found {listed}; no {absent[0]}")
    for place, cells in table.rows(_COLUMNS) if table.columns else ():
        try:
            label, number = cell_values.identifier(cells[0]), _number(cells[1])
        except ValueError as error:
            raise ValueError(f"{table.at(place)}: {error}") from None
        yield table.at(place), label, number


def _number(cell: Any) -> float:
    try:
        number = float(cell) if isinstance(cell, str | int | float) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < math.inf:
        raise ValueError(f"expected a finite number of at least 0 as prior, found {cell!r:.60}")
    return number
