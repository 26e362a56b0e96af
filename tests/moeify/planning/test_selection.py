from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.errors import ConfigError
from moeify.planning.selection import select_layers

PATHS = [f"encoder.block.{i}.ff" for i in range(4)] + [f"decoder.block.{i}.ff" for i in range(7)]


@pytest.mark.parametrize(
    ("spec", "chosen"),
    [
        ("all", list(range(11))),
        ("every:2", [1, 3, 5, 7, 9]),
        ("every:4", [3, 7]),
        ("last:3", [8, 9, 10]),
        ("last:99", list(range(11))),
        ("last:" + "9" * 5000, list(range(11))),
        ("first:2", [0, 1]),
        ("0", [0]),
        ("9,2-4,3", [2, 3, 4, 9]),
        ("^decoder", [4, 5, 6, 7, 8, 9, 10]),
        (r"block\.(0|3)\.", [0, 3, 4, 7]),
    ],
)
def test_a_selection_names_indices(spec: str, chosen: list[int]) -> None:
    assert select_layers(spec, PATHS) == chosen


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("every:0", "positive number"),
        ("last:x", "positive number"),
        ("every:12", "selects none of the 11 FFNs"),
        ("11", "outside the 11 FFNs"),
        ("5-2", "outside"),
        ("mlp", "selects none"),
        ("(", "regular expression"),
        ("every:²", "positive number"),
        ("every:" + "9" * 5000, "selects none"),
        ("7" * 5000, "outside the 11 FFNs"),
        ("0-" + "7" * 5000, "outside the 11 FFNs"),
        ("٣", "selects none"),
    ],
)
def test_a_wrong_selection_says_what_is_wrong(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        select_layers(spec, PATHS)
    assert len(str(caught.value)) < 300


@given(st.sets(st.integers(0, 10), min_size=1))
def test_numbers_select_themselves(numbers: set[int]) -> None:
    assert select_layers(",".join(map(str, numbers)), PATHS) == sorted(numbers)
