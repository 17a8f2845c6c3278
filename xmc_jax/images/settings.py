"""What the command that fetches images is told, and flags made of a section."""

import argparse
import pathlib
from typing import Annotated, Any

from pydantic import Field, IPvAnyNetwork
from pydantic.fields import PydanticUndefined

from xmc_jax.config import declare
from xmc_jax.config.declare import Count, NotNegative, Whole, nested, section
from xmc_jax.images.decoding import DecodeLimits

ANY_NETWORK = ("0.0.0.0/0", "::/0")
Networks = tuple[IPvAnyNetwork, ...]
_Seconds = Annotated[float, Field(ge=0.001)]


@section("")
class DownloadLimits:
    """What one URL may cost."""

    max_bytes: Count = Field(1 << 24, description="Bytes of an image file.")
    max_redirects: Whole = Field(5, description="Redirects that an attempt follows.")
    timeout: _Seconds = Field(
        15.0, description="Seconds to resolve, to connect, and between two pieces of an answer."
    )
    deadline: _Seconds = Field(
        300.0, description="Seconds for one URL, with retries and the waits between them."
    )
    min_rate: NotNegative = Field(
        1024.0, description="Bytes per second of an answer, after the first timeout."
    )
    attempts: Count = Field(
        4, description="Per URL; network errors, 408, 425, 429 and 5xx are retried."
    )
    backoff: NotNegative = Field(1.0, description="Seconds before the second attempt, then double.")
    max_wait: NotNegative = Field(
        60.0, description="Seconds; longer waits, also of Retry-After, are cut to this."
    )
    allow_private: Networks = Field(
        (), description="Connect to these networks, too, such as 10.0.0.0/8; none named: to any."
    )


@section("")
class FetchConfig:
    """Which images to fetch, and how."""

    urls: pathlib.Path = Field(
        description="A .parquet, .jsonl or .csv file of ids and image URLs. A cell has a URL or a "
        "list of them; adjacent rows of one id are one item."
    )
    out: pathlib.Path = Field(description="Folder to write, or to go on with.")
    limits: DownloadLimits = nested(DownloadLimits, "Limits of each URL.")
    max_pixels: Count = Field(
        DecodeLimits.max_pixels, description="Most pixels of an image that is decoded."
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(
        64, description="Downloads at a time."
    )
    per_host: Count = Field(32, description="Of those, from one host.")
    id_column: str = Field("id", description="Name of the column of ids.")
    url_column: str = Field("url", description="Name of the column of URLs.")
    max_images: Whole = Field(0, description="The first images of an item; 0 for all.")
    shard_images: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        1024, description="Rows per Parquet file."
    )
    user_agent: Annotated[str, Field(pattern="^[ -~]*$")] = Field(
        "xmc_jax.images.fetch", description="What the servers are told, printable ASCII."
    )
    retry_failed: bool = Field(False, description="Ask again for what failed before.")

    def __post_init__(self):
        if self.limits.max_bytes > 1 << 28:
            raise ValueError(f"max_bytes: expected at most 2^28, got {self.limits.max_bytes}")
        DecodeLimits(self.limits.max_bytes, self.max_pixels)


def add_flags(parser: argparse.ArgumentParser, kind: type, **names: str) -> None:
    """Adds a flag for each field of a section, and of the sections in it.

    Args:
        parser: of the command.
        kind: the section.
        names: field -> name of its flag, where it has another.
    """
    for option in declare.options(kind):
        if option.section is not None:
            add_flags(parser, option.section, **names)
            continue
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.text}
        if option.kind is bool:
            settings["action"] = "store_true"
        elif option.kind == Networks:
            settings |= {"nargs": "*", "metavar": "NETWORK"}
        else:
            settings["type"] = option.kind if option.kind in (int, float) else str
            settings["required"] = option.default is PydanticUndefined
            if not settings["required"] and option.default is not None:
                settings["help"] += f" Default: {option.default}."
        name = names.get(option.name, option.name)
        parser.add_argument(f"--{name}", dest=option.name, **settings)


def from_flags(kind: type, flags: dict[str, Any]) -> Any:
    """The section that parsed flags of `add_flags` make.

    Raises:
        ValueError: a mistaken value.
    """
    values = {}
    for option in declare.options(kind):
        if option.section is not None:
            values[option.name] = from_flags(option.section, flags)
        elif option.name in flags:
            value = flags[option.name]
            values[option.name] = ANY_NETWORK if value == [] else value
    return kind(**values)
