"""Check the fields of a dataclass against their annotations: types, words, and limits on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moeify.errors import ConfigError
from moeify.files.limits import EXPERTS

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
_AT_MOST = f", at most {EXPERTS}"
Experts = Annotated[int, Limit(lambda number: 1 <= number <= EXPERTS, f"a whole number of at least 1{_AT_MOST}")]
ExpertsOrZero = Annotated[int, Limit(lambda number: 0 <= number <= EXPERTS, f"a whole number of at least 0{_AT_MOST}")]
NotNegative = Annotated[float, Limit(lambda number: 0 <= number < math.inf, "a number that is not negative")]
Positive = Annotated[float, Limit(lambda number: 0 < number < math.inf, "a positive number")]
Share = Annotated[float, Limit(lambda number: 0 <= number <= 1, "a number from 0 to 1")]
Probability = Annotated[float, Limit(lambda number: 0 <= number < 1, "a number from 0 to below 1")]

_SHOWN = 200  # characters of a value in a message
_Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what is expected in words
_RULES: dict[Any, _Rule] = {
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
    str: (lambda value: isinstance(value, str), "a text"),
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
            raise ConfigError(f"{prefix}{name} is {_shown(value)}: expected {expected}")


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
    if origin is tuple and inside[1:] == (...,):
        fits, words = _rule(inside[0])
        return lambda value: isinstance(value, tuple) and all(map(fits, value)), f"a list, of each {words}"
    if origin is tuple:
        parts = [_rule(part) for part in inside]
        return lambda value: _fits_each(
            value, parts
        ), f"a list of {len(parts)}: {', '.join(words for _, words in parts)}"
    if origin in {Union, UnionType}:
        rules = [_rule(option) for option in inside]
        return lambda value: any(fits(value) for fits, _ in rules), " or ".join(words for _, words in rules)
    return _RULES[kind]


def _fits_each(value: object, parts: Sequence[_Rule]) -> bool:
    if not isinstance(value, tuple) or len(value) != len(parts):
        return False
    return all(fits(each) for each, (fits, _) in zip(value, parts, strict=True))


def _shown(value: object) -> str:
    """Return a value for a message; Python does not print numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) < _SHOWN else f"{text[:_SHOWN]}…"
