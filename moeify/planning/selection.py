"""Which FFNs to convert: the words that `--layers` understands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeify.errors import ConfigError

_NUMBERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def select_layers(spec: str, paths: Sequence[str]) -> list[int]:
    """Return the indices of the FFNs that a selection names.

    Args:
        spec: "all"; "every:N", the last of each N (every:2 is 1, 3, 5, … as in GShard and `decoder_sparse_step`);
            "last:N"; "first:N"; numbers and ranges such as "0,3-7"; anything else is a regular expression that is
            searched in the paths.
        paths: Where the FFNs are, in order of execution.

    Raises:
        ConfigError: the selection is malformed or matches nothing.
    """
    count = len(paths)
    word, _, number = spec.partition(":")
    if is_pattern(spec):
        try:
            chosen = [i for i, path in enumerate(paths) if re.search(spec, path)]
        except re.error as error:
            raise ConfigError(f"layers {spec!r} is not a selection and not a regular expression: {error}") from error
    elif spec == "all":
        chosen = list(range(count))
    elif number:
        chosen = _counted(word, _positive(spec, number), count)
    else:
        chosen = _listed(spec, count)
    if not chosen:
        example = f"{paths[0]} … {paths[-1]}" if paths else "none"
        raise ConfigError(f"layers {spec!r} selects none of the {count} FFNs ({example})")
    return chosen


def is_pattern(spec: str) -> bool:
    """Whether a selection is a regular expression."""
    word, _, number = spec.partition(":")
    counted = word in {"every", "last", "first"} and number
    return not (spec == "all" or counted or _NUMBERS.fullmatch(spec))


def _counted(word: str, number: int, count: int) -> list[int]:
    match word:
        case "every":
            return list(range(number - 1, count, number))
        case "last":
            return list(range(max(count - number, 0), count))
        case _:
            return list(range(min(number, count)))


def _positive(spec: str, number: str) -> int:
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"layers {spec!r}: expected a positive number after the colon")
    return int(number)


def _listed(spec: str, count: int) -> list[int]:
    chosen: set[int] = set()
    for part in spec.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if high < low or high >= count:
            raise ConfigError(f"layers {part!r} is outside the {count} FFNs of this model (0-{count - 1})")
        chosen.update(range(low, high + 1))
    return sorted(chosen)
