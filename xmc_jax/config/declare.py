"""How a section of a config is declared: a frozen pydantic dataclass whose errors are one line."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

_Kind = TypeVar("_Kind", bound=type)
_SECTION = "__config_section__"
# What is expected, by the type of pydantic's error; the names in braces are of its context.
_EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "string_too_short": "a text of at least {min_length} characters",
    "tuple_type": "a sequence",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "missing": "a value",
    "dict_type": "a section",
    "dataclass_type": "a section",
    "dataclass_exact_type": "a section",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a section.

    Attributes:
        name: of the field.
        kind: its type, without limits and without None.
        optional: whether it may be None.
        default: its value if none is given.
        text: what it means, with its origin in brackets at the end.
        section: the class of a nested section, None for a value.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    text: str
    section: type | None


def section(path: str) -> Any:
    """Makes a class a section of the config.

    Args:
        path: dotted name of the section, which errors begin with.

    Returns:
        A decorator. The class refuses unknown fields and values out of range with a ValueError of
        one line; a `__post_init__` that compares fields raises one that begins with a field's name.
    """

    def decorate(kind: _Kind) -> _Kind:
        settings = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=False)
        made = pydantic.dataclasses.dataclass(frozen=True, config=settings)(kind)
        setattr(made, _SECTION, path)
        validate = made.__init__

        @functools.wraps(validate)
        def __init__(self, *arguments, **values):
            try:
                validate(self, *arguments, **values)
            except pydantic.ValidationError as error:
                raise ValueError(explain(error, made)) from None

        made.__init__ = __init__
        return made

    return decorate


def explain(error: pydantic.ValidationError, kind: type) -> str:
    """The first of pydantic's errors in one line: the field, what is expected, what is given.

    Args:
        error: raised while a section was made.
        kind: the class of the section.
    """
    first = error.errors()[0]
    path = [getattr(kind, _SECTION)] if getattr(kind, _SECTION) else []
    at: type | None = kind
    for step in first["loc"]:
        if isinstance(step, int):
            path[-1] += f"[{step}]"
            continue
        known = {option.name: option for option in options(at)} if at else {}
        if step not in known and first["type"].startswith("unexpected_"):
            return _unknown(".".join(path), step, list(known))
        path.append(step)
        at = known[step].section if step in known else None
    name = ".".join(path)
    if first["type"] == "value_error":  # raised by our own functions
        said = str(first["ctx"]["error"])
        return f"{name}.{said}" if at and name else said if at else f"{name}: {said}"
    expected = _EXPECTED.get(first["type"])
    if expected is None:
        return f"{name}: {first['msg']}"
    context = {key: _number(value) for key, value in first.get("ctx", {}).items()}
    given = "none" if first["type"] == "missing" else f"{first['input']!r:.100}"
    return f"{name}: expected {expected.format(**context)}, got {given}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most like a mistyped one."""
    return difflib.get_close_matches(name, known, 1, 0)[0]


def options(kind: type) -> Iterator[Option]:
    """The fields of a section, in order."""
    hints = typing.get_type_hints(kind)
    declared: dict[str, FieldInfo] = kind.__pydantic_fields__
    for name, field in declared.items():
        hint, optional = hints[name], False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
            optional = True
        nested = hint if hasattr(hint, _SECTION) else None
        default = field.get_default(call_default_factory=True)
        yield Option(name, hint, optional, default, field.description or "", nested)


def choices(kind: type, name: str) -> tuple[str, ...]:
    """The values that a field of a section, or each value of a sequence, may have."""
    hint = next(option.kind for option in options(kind) if option.name == name)
    return typing.get_args(typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint)


def nested(kind: type, text: str) -> Any:
    """The declaration of a section within a section."""
    return Field(default_factory=kind, description=text)


def _unknown(path: str, name: str, known: Sequence[str]) -> str:
    before = f"{path}." if path else ""
    printed = f"{name if name.isprintable() else repr(name):.60}"
    return f"{before}{printed}: no such field; did you mean {before}{nearest(name, known)}?"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def checked(check: Any) -> AfterValidator:
    """A limit of a field that a function states: it raises ValueError("expected ..., got ...")."""

    def validate(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(validate)
