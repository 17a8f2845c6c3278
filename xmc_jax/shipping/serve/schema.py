"""Bodies of requests and answers, and one line for an invalid request."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from xmc_jax.config import ServeConfig
from xmc_jax.data.tables import cell_values

_SEPARATOR = "|"  # of ids in a text, as in files of documents


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


@dataclasses.dataclass(frozen=True)
class Requests:
    """Classes of the bodies of requests.

    Attributes:
        predict: of /v1/predict.
        neighbours: of /v1/neighbours.
    """

    predict: type[BaseModel]
    neighbours: type[BaseModel]


class _Given(_Strict):
    """An object of a request; a field that is null is taken as left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {k: x for k, x in given.items() if x is not None or k not in cls.model_fields}


def requests(config: ServeConfig) -> Requests:
    """The classes, with the limits of a config."""
    Id = Annotated[
        str,
        Field(max_length=config.max_text),
        BeforeValidator(cell_values.identifier, json_schema_input_type=str | float | dict),
    ]
    Text = Annotated[str, Field(max_length=config.max_text)]
    count = Field(10, ge=1, le=config.max_k, description="How many of each query; at most so many.")

    def several(kind: Any, most: int | None = None) -> Any:
        return Annotated[list[kind], Field(max_length=most, fail_fast=True)]

    def listed(cell: Any) -> list[Any]:
        if isinstance(cell, str) and len(cell) > config.max_text:
            raise ValueError(f"expected a list of ids, got a text of {len(cell)} characters")
        return [cell] if cell_values.is_null(cell) else cell_values.listed(cell, _SEPARATOR)

    def ids(most: int) -> Any:
        taken = list[Id] | str | float | dict
        return Annotated[several(Id, most), BeforeValidator(listed, json_schema_input_type=taken)]

    class ItemBody(_Given):
        text: Text | None = ""
        images: several(str) | None = Field(
            [],
            description="Image files in base64, or as data: URLs; nothing is fetched.",
        )

    class QueryBody(ItemBody):
        only: ids(config.max_only) | None = Field(
            None,
            description="Ids of the labels that may be ranked; all if left out. Written as in a "
            "file of documents: a list, or a text in which | separates ids; numbers are ids, too.",
        )
        exclude: ids(config.max_exclude) | None = Field(
            [], description="Ids of labels that may not be ranked, likewise."
        )

    class PredictBody(_Given):
        queries: Annotated[several(QueryBody, config.max_queries), Field(min_length=1)]
        k: int | None = count
        ranking: Literal["auto", "plain", "augmented"] | None = Field(
            "auto",
            description="plain: labels by inner product; augmented: mixed with the labels of near "
            "training documents; auto: as the model was exported.",
        )

    class NeighboursBody(_Given):
        queries: Annotated[several(ItemBody, config.max_queries), Field(min_length=1)]
        k: int | None = count

    return Requests(PredictBody, NeighboursBody)


class ErrorAnswer(_Strict):
    """Why a request was refused."""

    error: str = Field(description="One line.")


class NamedAnswer(_Strict):
    """A label."""

    id: str
    text: str


class RankedAnswer(NamedAnswer):
    """A label or a document that was ranked."""

    score: float = Field(description="Inner product in [-1, 1]; augmented, a share in [0, 1].")
    image: str | None = Field(description="Path of a small picture of it, if there is one.")


class DocumentAnswer(RankedAnswer):
    """A training document."""

    labels: list[NamedAnswer] = Field(description="Its first labels.")


class _OfQuery(_Strict):
    cut: bool = Field(
        False,
        description="True where the text has more tokens than the model takes; left out elsewhere.",
    )


class QueryLabels(_OfQuery):
    """The labels of a query, best first."""

    labels: list[RankedAnswer]


class QueryDocuments(_OfQuery):
    """The training documents near a query, nearest first."""

    documents: list[DocumentAnswer]


class PredictionsAnswer(_Strict):
    """Of each query, in their order."""

    ranking: Literal["plain", "augmented"]
    results: list[QueryLabels]


class NeighboursAnswer(_Strict):
    """Of each query, in their order."""

    results: list[QueryDocuments]


class LabelAnswer(NamedAnswer):
    """A label, and how many training documents have it."""

    frequency: int
    image: str | None


class ImagesAnswer(_Strict):
    """Whether queries may have images."""

    possible: bool
    reason: str | None = Field(description="Why not.")
    per_query: int = Field(description="At most so many.")


class InfoAnswer(_Strict):
    """The model that is served."""

    name: str
    digest: str = Field(description="SHA-256 of artifact.json.")
    created: str
    version: str = Field(description="Of xmc_jax, that serves.")
    dataset: str
    labels: int
    documents: int
    shows_documents: bool = Field(description="Whether answers may hold training documents.")
    rankings: list[str] = Field(description="The first is the default.")
    images: ImagesAnswer
    metrics: dict[str, dict[str, float]] = Field(description="On the test set, as fractions.")
    limits: dict[str, float]
    examples: list[str] = Field(description="Texts of some training documents.")


class HealthAnswer(_Strict):
    """The state of the server."""

    status: str


_STARTS = ("Input should be ", "Input should have ", "String should have ", "List should have ")
_OBJECTS = ("model_attributes_type", "model_type", "dict_type")
_EXPECTED = {
    "missing": "expected a value, got none",
    "extra_forbidden": "no such field",
}


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Status and one line for what pydantic says of a request."""
    error = errors[0]
    kind, where = error["type"], _path(error["loc"])
    if kind == "json_invalid":
        said = " ".join(str(error.get("ctx", {}).get("error", "another")).split())
        return 400, f"body: expected JSON, got: {said}"
    if kind == "value_error":
        return 422, f"{where}: {error['ctx']['error']}"
    if kind in _EXPECTED:
        return 422, f"{where}: {_EXPECTED[kind]}"
    said = "an object" if kind in _OBJECTS else " ".join(error["msg"].split())
    for start in _STARTS:
        said = said.removeprefix(start)
    said = said.split(" after validation")[0]
    return 422, f"{where}: expected {said[:1].lower()}{said[1:]}, got {_got(error.get('input'))}"


def _got(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str) and len(value) > 60:
        return f"{len(value)} characters"
    return repr(value)[:60]


def _path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts[1:] if parts and parts[0] == "body" else parts:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part[:60]}"
    return path or "body"
