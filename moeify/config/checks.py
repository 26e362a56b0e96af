"""Check the fields of a dataclass against their annotations: types, words, and limits on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moeify.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Limit:
    """A limit on a number, for `Annotated`.

    Attributes:
        holds: Whether a number keeps to the limit.
        words: What is expected, for the error message.
    """

    holds: Callable[[float], bool]
    words: str


Count = Annotated[int, Limit(lambda number: number >= 1, "at least 1")]
CountOrZero = Annotated[int, Limit(lambda number: number >= 0, "a number that is not negative")]
NotNegative = Annotated[float, Limit(lambda number: 0 <= number < math.inf, "a number that is not negative")]
Positive = Annotated[float, Limit(lambda number: 0 < number < math.inf, "a positive number")]
Share = Annotated[float, Limit(lambda number: 0 <= number <= 1, "a number from 0 to 1")]
Probability = Annotated[float, Limit(lambda number: 0 <= number < 1, "a number from 0 to below 1")]

_KINDS = {int: (Integral, "a whole number"), float: (Real, "a number"), bool: (bool, "True or False")}


def check_fields(settings: DataclassInstance, prefix: str = "", besides: Collection[str] = ()) -> None:
    """Check every field of a dataclass.

    Args:
        settings: The dataclass.
        prefix: What the message writes before a field's name.
        besides: Fields that are left out.

    Raises:
        ConfigError: A value does not fit; the message names the field.
    """
    for name, kind in field_types(type(settings)).items():
        if name not in besides and (expected := _expected(getattr(settings, name), kind)):
            raise ConfigError(f"{prefix}{name} is {getattr(settings, name)!r}: expected {expected}")


@cache
def field_types(settings: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass."""
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in fields(settings)}


def _expected(value: object, kind: Any) -> str | None:
    """Return what `kind` asks for, in words; None if the value fits."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, limit = inside
        return _expected(value, base) or (None if limit.holds(value) else limit.words)
    if origin is Literal:
        return None if value in inside else f"one of {', '.join(inside)}"
    if origin in {Union, UnionType}:
        options = [_expected(value, option) for option in inside]
        return None if None in options else " or ".join(str(option) for option in options)
    if kind is NoneType:
        return None if value is None else "None"
    abstract, words = _KINDS.get(kind, (kind, kind.__name__))
    right = isinstance(value, abstract) and (kind is bool or not isinstance(value, bool))
    return None if right else words
