from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import pytest

from moeify.config.checks import Count, Limit, NotNegative, Positive, Probability, Share, check_fields, field_types
from moeify.errors import ConfigError


@dataclass
class Settings:
    unchecked: ClassVar[str] = "not a field"
    count: Count = 1
    flag: bool = True
    word: Literal["red", "green"] = "red"
    maybe: Positive | None = None
    even: Annotated[int, Limit(lambda number: number % 2 == 0, "an even number")] = 2
    share: Share = 1
    probability: Probability = 0
    loss: NotNegative = 0.0
    name: str = ""
    names: tuple[str, ...] = ()
    pair: tuple[str, int] = ("", 0)


@pytest.mark.parametrize(
    ("field", "right", "wrong", "expected"),
    [
        ("count", [1, 10**9], [0, -1, 1.0, True, "1", None], "a whole number of at least 1"),
        ("flag", [True, False], [0, 1, None, "yes"], "True or False"),
        ("word", ["red", "green"], ["blue", None, 1, ["red"]], "one of red, green"),
        ("maybe", [None, 1, 0.5, Fraction(1, 3)], [0, -1.0, float("inf"), float("nan"), "1", True],
         "a positive number or None"),
        ("even", [0, 4], [3, 4.0], "an even number"),
        ("share", [0, 0.5, 1], [-0.1, 1.1, False], "a number from 0 to 1"),
        ("probability", [0, 0.99], [1, 1.0, -1], "a number from 0 to below 1"),
        ("loss", [0, 5], [-1, float("nan"), float("inf")], "a number that is not negative"),
        ("name", ["x"], [1, None, ["x"]], "a text"),
        ("names", [(), ("x", "y")], [["x"], ("x", 1), "x"], "a list, of each a text"),
        ("pair", [("x", 1)], [("x",), ("x", "y"), ("x", 1, 2), None], "a list of 2: a text, a whole number"),
    ],
)  # fmt: skip
def test_each_kind_of_field(field: str, right: list[object], wrong: list[object], expected: str) -> None:
    for value in right:
        check_fields(Settings(**{field: value}))  # type: ignore[arg-type]
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            check_fields(Settings(**{field: value}), prefix="router.")  # type: ignore[arg-type]
        assert str(caught.value) == f"router.{field} is {value!r}: expected {expected}"
        check_fields(Settings(**{field: value}), besides={field})  # type: ignore[arg-type]


def test_only_fields_have_types() -> None:
    assert list(field_types(Settings)) == ["count", "flag", "word", "maybe", "even", "share", "probability", "loss",
                                                 "name", "names", "pair"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-(10**5000), "a number of thousands of digits"), ("x" * 9999, "xxx…")],
    ids=["10^5000", "text"],
)
def test_a_long_value_is_not_shown_whole(value: object, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fields(Settings(count=value))  # type: ignore[arg-type]
    assert shown in str(caught.value) and len(str(caught.value)) < 300
