"""Raw dataset folders as benchmarks take them: flags, and the folder read by the package."""

import argparse
import dataclasses
import pathlib
from typing import Any

from xmc_jax.data import known, raw_folder
from xmc_jax.data.raw_folder import RawDataset


@dataclasses.dataclass(frozen=True)
class RawData:
    """A raw folder, and how its texts and labels count.

    Attributes:
        folder: any that `prepare` reads.
        dataset: its name; published counts of known names are checked.
        text: "title" or "title_content".
        propensity: constants A and B.
    """

    folder: pathlib.Path
    dataset: str
    text: str
    propensity: tuple[float, float]

    def read(self) -> RawDataset:
        """All of it, texts included."""
        return raw_folder.read(raw_folder.find(self.folder), self.dataset, "utf-8")

    def fields(self) -> dict[str, Any]:
        """The same as fields of a config's section `data`."""
        return {
            "raw_dir": str(self.folder.absolute()),
            "dataset": self.dataset,
            "text": self.text,
            "propensity_a": self.propensity[0],
            "propensity_b": self.propensity[1],
        }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `of` reads."""
    parser.add_argument("--raw", type=pathlib.Path, required=True, help="raw dataset folder")
    parser.add_argument("--dataset", help="its name; by default the folder's")
    parser.add_argument(
        "--text", choices=("title", "title_content"), help="what is read; by default by the name"
    )
    parser.add_argument(
        "--propensity", nargs=2, type=float, metavar=("A", "B"), help="by default by the name"
    )


def of(arguments: argparse.Namespace) -> RawData:
    """What the flags name."""
    dataset = arguments.dataset or arguments.raw.absolute().name
    return RawData(
        arguments.raw,
        dataset,
        arguments.text or known.text(dataset),
        tuple(arguments.propensity or known.propensity(dataset)),
    )
