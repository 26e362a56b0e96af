from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moeify.errors import CheckpointError
from moeify.files.json_text import parse_json, read_json_object
from moeify.files.limits import JSON_DEPTH, JSON_DIGITS

ROOT = Path(__file__).resolve().parents[3]

texts = st.text(st.characters() | st.sampled_from('"\\[]{},:\ud800\udc00'), max_size=9)
numbers = st.integers(-(10**20), 10**20) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
# Whole texts, and texts in which something was cut out, put in or exchanged.
written = st.builds(lambda value, ascii: json.dumps(value, ensure_ascii=ascii), values, st.booleans())
spoiled = st.builds(
    lambda text, at, cut, put: text[: at % (len(text) + 1)] + put + text[at % (len(text) + 1) + cut :],
    written, st.integers(0, 99), st.integers(0, 3), st.text('"\\[]{},:0123456789eE.+-nutrfalsINy \n', max_size=4),
)  # fmt: skip


def expected(text: str) -> Any:
    """What `json.loads` makes of a text; a ValueError where it or one of our own rules refuses it."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    value = json.loads(text.encode().decode(), object_pairs_hook=unique)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    return value


def equal(mine: Any, theirs: Any) -> bool:
    """Equality of values and of their types; NaN equals itself."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, dict):
        return list(mine) == list(theirs) and all(equal(mine[name], theirs[name]) for name in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    return bool(mine == theirs or (isinstance(mine, float) and math.isnan(mine) and math.isnan(theirs)))


@given(written | spoiled | st.text(max_size=20))
@example('{"\\\\": "\\"]", "\\\\\\"": ["[[[["]}')
@example('["\\ud800\\udc00"]')
@example('["\\ud800"]')
@example('{"a": 1, "\\u0061": 2}')
@example("\ufeff{}")
@example('["' + "[" * 999 + '"]')
def test_what_is_accepted_is_what_json_accepts(text: str) -> None:
    try:
        value = expected(text)
    except ValueError:
        for form in (text, text.encode("utf-8", "surrogatepass")):
            with pytest.raises(ValueError):
                parse_json(form)
        return
    assert equal(parse_json(text), value)
    assert equal(parse_json(text.encode()), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * (JSON_DEPTH + 1) + "]" * (JSON_DEPTH + 1), "nested more than 64 deep"),
        ('{"a":' * 100_000, "nested more than 64 deep"),
        ('"]]]]"' + "[" * 100_000, "nested more than 64 deep"),
        (r'["\"", ' + "[" * 100_000, "nested more than 64 deep"),
        (r'["\\", ' + "[" * 100_000, "nested more than 64 deep"),
        ("1" * (JSON_DIGITS + 1), "a number of more than 300 digits"),
        ("[" + "1," * 9 + "1]", "more than 9 values"),
        ("[" + "{}," * 9 + "1]", "more than 9 values"),
        ('{"a": 1, "b": 2, "a": 3}', "a is there twice"),
        (b"\xff\xfe{\x00}\x00", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'["\\udc00"]', "surrogates not allowed"),
        ("[", "Expecting value"),
    ],
)
def test_what_passes_a_limit_is_refused_in_one_line(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, values=9 if "values" in message else 10**6)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_at_the_limits_is_read() -> None:
    assert parse_json("[" * JSON_DEPTH + "]" * JSON_DEPTH) is not None
    assert parse_json("1" * JSON_DIGITS) == int("1" * JSON_DIGITS)
    assert parse_json("[1,2,3]", values=4) == [1, 2, 3]
    assert parse_json('{"' + "1" * 999 + '": "' + "[" * 999 + ',,,,,,"}', values=9) is not None


def test_constants_are_refused_where_they_are_not_wanted() -> None:
    assert parse_json("[Infinity, -Infinity]") == [math.inf, -math.inf]
    with pytest.raises(ValueError, match="NaN is not a number of JSON"):
        parse_json("[NaN]", constants=False)


def test_keys_are_compared_in_linear_time() -> None:
    text = "{" + ",".join(f'"{number}":1' for number in range(200_000)) + ',"7":2}'
    with pytest.raises(ValueError, match="7 is there twice"):
        parse_json(text)


def test_a_file_holds_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_json_object(path, 10) == {"a": [1]}
    with pytest.raises(CheckpointError, match="holds 10 bytes, expected at most 9"):
        read_json_object(path, 9)
    for text, message in (("[]", "holds a JSON list, expected an object"), ("{", "a.json is not valid JSON")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json_object(path, 99)


def test_json_is_parsed_in_one_place() -> None:
    """Whatever else calls `json.load` or `json.loads` reads without limits."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("moeify", "passes")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"\bjson\.loads?\b", ast.unparse(ast.parse(path.read_text())))
    ]
    assert found == ["moeify/files/json_text.py"]
