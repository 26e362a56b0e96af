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


Count = Annotated[int, Limit(lambda number: number >= 1, "a whole number of at least 1")]
CountOrZero = Annotated[int, Limit(lambda number: number >= 0, "a whole number of at least 0")]
NotNegative = Annotated[float, Limit(lambda number: 0 <= number < math.inf, "a number that is not negative")]
Positive = Annotated[float, Limit(lambda number: 0 < number < math.inf, "a positive number")]
Share = Annotated[float, Limit(lambda number: 0 <= number <= 1, "a number from 0 to 1")]
Probability = Annotated[float, Limit(lambda number: 0 <= number < 1, "a number from 0 to below 1")]

_Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what is expected in words
_RULES: dict[Any, _Rule] = {
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    NoneType: (lambda value: value is None, "None"),
}


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
        if name in besides:
            continue
        fits, expected = _rule(kind)
        if not fits(value := getattr(settings, name)):
            raise ConfigError(f"{prefix}{name} is {value!r}: expected {expected}")


@cache
def field_types(settings: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass."""
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: hints[field.name] for field in fields(settings)}


def _rule(kind: Any) -> _Rule:
    """Return the rule of an annotation: one of `_RULES`, a Literal of words, one with a limit, or a union of these."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return lambda value: value in inside, f"one of {', '.join(inside)}"
    if origin is Annotated:
        fits, limit = _rule(inside[0])[0], inside[1]
        return lambda value: fits(value) and limit.holds(value), limit.words
    if origin in {Union, UnionType}:
        rules = [_rule(option) for option in inside]
        return lambda value: any(fits(value) for fits, _ in rules), " or ".join(words for _, words in rules)
    return _RULES[kind]
