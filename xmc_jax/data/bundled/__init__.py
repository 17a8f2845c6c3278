"""Small real datasets that come with the package, as raw Extreme Classification files."""

import importlib.resources
import pathlib

NAMES = ("LF-DebianTitles-3K",)


def path(name: str) -> pathlib.Path:
    """The raw folder of a bundled dataset, as `data.prepare` reads it; see DATA_CARD.md there.

    Raises:
        ValueError: no such dataset is bundled.
    """
    if name not in NAMES:
        raise ValueError(f"bundled: expected one of {', '.join(NAMES)}, got {name!r}")
    return pathlib.Path(str(importlib.resources.files(__name__) / name))
