from __future__ import annotations

import pytest

from moeify.files.limits import YAML_BYTES
from moeify.files.yaml_text import parse_yaml


def test_a_value_is_the_text_that_stands_there() -> None:
    found = parse_yaml(b"a: no\nb: 1e-3\nc: [010, 2026-01-01, null]\nd: {x: true}\ne:\n")
    assert found == {"a": "no", "b": "1e-3", "c": ["010", "2026-01-01", "null"], "d": {"x": "true"}, "e": ""}


def test_tags_make_nothing() -> None:
    assert parse_yaml(b"!!python/object/apply:os.system ['false']") == ["false"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a: 1\nb: 2\na: 3\n", "line 1: a key is there twice"),
        (b"a: 1\nb: [1\n", "line 3: "),
        (b"a: \xff\n", "codec can't decode"),
        (b"a: \x00\n", "unacceptable character"),
        (b"[" * 100_000, "nested too deep"),
        (b"&a [*a]", "recursive"),
        (b"? [a]\n: b\n", "unhashable key"),
        (b'b: c\na: "\\ud800"', "line 2: it holds half a character"),
        (b"a: " + b"x" * YAML_BYTES, "expected at most 200,000"),
    ],
)
def test_what_is_damaged_is_said_in_one_line(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_yaml(raw)
    assert "\n" not in str(caught.value)


def test_many_aliases_of_one_value_stay_one_value() -> None:
    """Each line names the one before ten times: as a text it would have 10^30 values."""
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 31))]
    found = parse_yaml("\n".join(lines).encode())
    assert isinstance(found, dict) and len(found) == 31
