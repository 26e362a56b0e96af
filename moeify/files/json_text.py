"""JSON from files that others made: the one place that parses it, with limits that are checked before it is parsed.

It is stricter than `json.loads`: UTF-8 without a byte order mark, no key twice, no half of a surrogate pair.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from moeify.errors import CheckpointError
from moeify.files.limits import JSON_DEPTH, JSON_DIGITS, JSON_VALUES
from moeify.files.reading import read_bytes

JsonObject: TypeAlias = dict[str, Any]

_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (JSON_DIGITS + 1))
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # one deeper, or one back, as signed bytes


def parse_json(text: bytes | str, *, values: int = JSON_VALUES, constants: bool = True) -> object:
    """Return what a JSON text says.

    Args:
        text: UTF-8, or text that is already decoded.
        values: How many values it may hold.
        constants: NaN and Infinity, which JSON itself does not have, are allowed.

    Raises:
        ValueError: One line that says what is wrong with it.
    """
    raw = text if isinstance(text, bytes) else text.encode()
    _check_limits(raw, values)
    decoded = raw.decode() if isinstance(text, bytes) else text
    value: object = json.loads(
        decoded, object_pairs_hook=_unique_keys, parse_constant=None if constants else _no_constant
    )
    if _SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return value


def read_json_object(path: Path, limit: int, values: int = JSON_VALUES) -> JsonObject:
    """Read a file that holds a JSON object.

    Args:
        path: The file.
        limit: Bytes that it may hold.
        values: Values that it may hold.

    Raises:
        CheckpointError: It cannot be read, passes a limit, is not JSON, or not an object.
    """
    try:
        value = parse_json(read_bytes(path, limit), values=values)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download or copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _check_limits(raw: bytes, values: int) -> None:
    """Check a text in linear time, looking at what is outside its strings."""
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') > 4 * values:  # a key and a string have two quotes each
        raise ValueError(f"it holds more than {values:,} values")
    structure = b"".join(unescaped.split(b'"')[::2])
    if 1 + sum(map(structure.count, (b",", b"[", b"{"))) > values:  # a value follows each of them
        raise ValueError(f"it holds more than {values:,} values")
    steps = memoryview(structure.translate(_STEPS, _NOT_BRACKETS)).cast("b")
    if max(accumulate(steps), default=0) > JSON_DEPTH:
        raise ValueError(f"it is nested more than {JSON_DEPTH} deep")
    if _LONG_NUMBER.search(structure):
        raise ValueError(f"it holds a number of more than {JSON_DIGITS} digits")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:99]} is there twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")
