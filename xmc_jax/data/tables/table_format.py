"""What every file of records offers, whatever its format."""

import abc
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_RECORD = 16 << 20
"""Most bytes of a record of a text file, and most characters of a text in Parquet."""


class Table(abc.ABC):
    """A file of records.

    Attributes:
        path: the file.
        columns: their names; none if the file is empty.
        types: column -> type, as Arrow calls it; {} of text files.
        dialect: how the file is written, where that is not what its name says; "" otherwise.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.columns: Sequence[str] = ()
        self.types: Mapping[str, str] = {}
        self.dialect = ""

    @abc.abstractmethod
    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        """Place and cells of each record, in order; blank lines and rows of empty cells have none.

        A null, and what a JSON object lacks, is None. An empty cell of CSV is "".

        Args:
            required: those of `names` that every JSON object should have; where one lacks it the
                cell is `record_cells.Absent`.

        Raises:
            ValueError: a record is damaged; names its place.
        """

    def at(self, place: int) -> str:
        """A place, as errors begin with it."""
        return f"{self.path}:{place}"

    def count(self) -> int | None:
        """Records, about; None where counting them takes reading them."""
        return None

    @property
    def loose(self) -> bool:
        """Whether a later record may have columns that `columns` lacks."""
        return False
