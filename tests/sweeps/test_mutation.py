from __future__ import annotations

import ast

import pytest

from sweeps.mutation import is_another_program, mutants


def changes(source: str) -> set[str]:
    """What becomes of a piece of code: each mutant as text."""
    return {mutant.apply(source.encode()).decode() for mutant in mutants("x.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x < y", {"(x <= y)", "(x > y)"}),
        ("x is y", {"(x is not y)"}),
        ("x + y", {"(x - y)"}),
        ("a and b", {"(a or b)", "(a)", "(b)"}),
        ("not x", {"(x)"}),
        ("-x", {"(x)"}),
        ("x[3]", {"x[(4)]", "x[(2)]"}),
        ("x[0]", {"x[(1)]"}),
        ("x = True", {"x = (False)"}),
        ("x = 0.5", {"x = (1.0)"}),
        ("x if y else z", {"x if (True) else z", "x if (False) else z"}),
        ("[x for x in y if z]", {"[x for x in y if (True)]"}),
        ("x = f(a, b=c)", {"x = (f(a))"}),
        ("x = min(a)", {"x = (max)(a)"}),
        ("{a, b}", {"({a})", "({b})"}),
        ("x = ('a', 'b')", {"x = (('a',))", "x = (('b',))"}),
        ("{'a': b, 'c': d}", {"({'a': b})", "({'c': d})"}),
        ("x.y = z", {"pass"}),
        ("f(x)", {"pass"}),
        ("if x:\n    raise E(1)", {"if (True):\n    raise E(1)", "if (False):\n    raise E(1)", "if x:\n    pass"}),
        ("(a + b) * c", {"(((a + b) + c))", "((a - b)) * c"}),
    ],
)
def test_what_becomes_of_a_piece_of_code(source: str, expected: set[str]) -> None:
    found = changes(source)
    assert {ast.dump(ast.parse(text)) for text in found} == {ast.dump(ast.parse(text)) for text in expected}


@pytest.mark.parametrize(
    "source",
    [
        "assert x == 1",
        "x: Literal[1, 2]",
        "def f(x: int | None) -> int | None: ...",
        "@mark(1)\ndef f(): ...",
        "class A(B, metaclass=C): ...",
        "if TYPE_CHECKING:\n    x = 1",
        "__all__ = ['a', 'b']",
        "T = TypeVar('T', bound=int)",
        'x = f"{y:3}"',
        'x = "a" + y',
        "x = zip(a, b, strict=True)",
        "x = (a, b)",
    ],
)
def test_what_no_test_can_notice_is_left_alone(source: str) -> None:
    assert changes(source) == set()


def test_a_message_stays_as_it_is() -> None:
    assert changes("raise Error(1 + 1, x=y)") == {"pass"}


def test_the_rest_of_a_file_stays_as_it_is() -> None:
    source = 'x = "é" if y == 1 else z  # é\n\n# a comment\nw  =  2\n'
    (mutant,) = (m for m in mutants("x.py", source.encode()) if m.kind == "comparison")
    assert mutant.apply(source.encode()).decode() == 'x = "é" if (y != 1) else z  # é\n\n# a comment\nw  =  2\n'
    assert mutant.line == 1


def test_the_key_of_a_mutant_names_the_function_and_which_of_equals_it_is() -> None:
    source = b"class A:\n    def f(self):\n        return x == 1 or x == 1\n"
    keys = [mutant.key for mutant in mutants("x.py", source) if mutant.kind == "comparison"]
    assert keys == ["x.py A.f: x == 1 -> x != 1", "x.py A.f: x == 1 -> x != 1 #2"]


def test_a_change_that_is_none_is_told_apart() -> None:
    assert is_another_program(b"x = (2)", b"x = 1")
    assert not is_another_program(b"x = (1)", b"x = 1")
    assert not is_another_program(b"x = )", b"x = 1")
