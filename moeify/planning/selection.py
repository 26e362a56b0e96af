"""Which FFNs to convert: the words that `--layers` understands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeify.errors import ConfigError

_COUNTED = re.compile(r"(every|last|first):(.+)")
_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*", re.ASCII)
_SHOWN = 99  # characters of a selection in a message


def select_layers(spec: str, paths: Sequence[str]) -> list[int]:
    """Return the indices of the FFNs that a selection names.

    Args:
        spec: "all"; "every:N", the last of each N (every:2 is 1, 3, 5, … as in GShard and `decoder_sparse_step`);
            "last:N"; "first:N"; numbers and ranges such as "0,3-7"; anything else is a regular expression that is
            searched in the paths.
        paths: Where the FFNs are, in order of execution.

    Raises:
        ConfigError: The selection is malformed or matches nothing.
    """
    check_selection(spec)
    numbers = range(len(paths))
    chosen: Sequence[int] = numbers
    if counted := _COUNTED.fullmatch(spec):
        word, size = counted[1], _number(counted[2])
        chosen = {"every": numbers[size - 1 :: size], "last": numbers[-size:], "first": numbers[:size]}[word]
    elif _NUMBERS.fullmatch(spec):
        chosen = sorted({number for part in spec.split(",") for number in _range(part, len(paths))})
    elif spec != "all":
        chosen = [number for number, path in enumerate(paths) if re.search(spec, path)]
    if not chosen:
        example = f"{paths[0]} … {paths[-1]}" if paths else "none"
        raise ConfigError(f"layers {spec[:_SHOWN]!r} selects none of the {len(paths)} FFNs ({example})")
    return list(chosen)


def check_selection(spec: str) -> None:
    """Check what can be checked of a selection without a model.

    Raises:
        ConfigError: It is malformed.
    """
    shown = f"layers {spec[:_SHOWN]!r}"
    if counted := _COUNTED.fullmatch(spec):
        text = counted[2]
        if not (text.isascii() and text.isdigit() and _number(text) >= 1):
            raise ConfigError(f"{shown}: expected a positive number after the colon")
    elif is_pattern(spec):
        try:
            re.compile(spec)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{shown} is not a selection and not a regular expression: {error}") from error


def is_pattern(spec: str) -> bool:
    """Return whether a selection is a regular expression."""
    return not (spec == "all" or _COUNTED.fullmatch(spec) or _NUMBERS.fullmatch(spec))


def _range(part: str, count: int) -> range:
    first, _, last = part.partition("-")
    low, high = _number(first), _number(last or first)
    if high < low or high >= count:
        raise ConfigError(f"layers {part[:_SHOWN]!r} is outside the {count} FFNs of this model (0-{count - 1})")
    return range(low, high + 1)


def _number(digits: str) -> int:
    """Return the number, or one beyond every layer: Python does not read thousands of digits."""
    return int(digits) if len(digits) < 10 else 10**9
