from __future__ import annotations

import pytest

from moeify.errors import CheckpointError, ConfigError, first_line, printable, told_as


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0 [/b] größe 模型 😀", "model.layers.0 [/b] größe 模型 😀"),
        ("a\nError: b\r\tc", r"a\nError: b\r\tc"),
        ("\x1b[31mred\x9b0m\x00", r"\x1b[31mred\x9b0m\x00"),
        ("\udcff\ud800", r"\udcff\ud800"),
        ("a\u202eb\u2066c\u200bd\u2028e\ufefff", r"a\u202eb\u2066c\u200bd\u2028e\ufefff"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_not_printable_becomes_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable() and shown.encode()


def test_some_characters_may_stay() -> None:
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n \n  after empty lines \n"), "after empty lines"),
        (ValueError("field 'x':\n  expected a number\nat y"), "field 'x': expected a number"),
        (ValueError("field 'x':"), "field 'x':"),
        (ValueError(), "ValueError"),
        (MemoryError(), "MemoryError"),
        (ValueError("\x1b[1m"), r"\x1b[1m"),
        (ValueError("x" * 10_000), "x" * 500 + "…"),
    ],
)
def test_the_first_line_is_short_and_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_errors_of_other_libraries_are_told_and_those_of_moeify_pass() -> None:
    with pytest.raises(CheckpointError, match=r"^x is damaged \(no good\)$"), told_as("x is damaged", CheckpointError):
        raise TypeError("no good\nat all")
    with pytest.raises(ConfigError, match=r"^mine$"), told_as("x is damaged", CheckpointError):
        raise ConfigError("mine")
    with pytest.raises(KeyboardInterrupt), told_as("x is damaged"):
        raise KeyboardInterrupt
