"""Files and functions stay short enough to read at once, and `Any` stays rare: no file is excepted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("moeify", "passes", "kernels")
PROGRAMS = ("tests", "examples", "benchmarks", "sweeps")

FILE_LINES = 300  # a file has fewer
KERNEL_FILE_LINES = 400  # a file of kernels/ has fewer: one Triton kernel is one function
FUNCTION_LINES = 40  # a function has at most as many, from `def` to its last line
KERNEL_FUNCTION_LINES = 50  # one of kernels/: an operator documents ten arguments
ANY_PER_1000_LINES = 10  # in the whole library

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """The files of some folders, relative to the root. moeify/passes and moeify/kernels are links: not followed."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found if not any(part.is_symlink() for part in path.parents))


def functions(tree: ast.Module) -> Iterator[Function]:
    """All functions whose length counts: a Triton kernel's does not."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and not any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
            yield node


def too_long(path: str, source: str) -> list[str]:
    """What is too long in one file, a line each."""
    of_kernels = path.startswith("kernels/")
    limit, most = (KERNEL_FILE_LINES, KERNEL_FUNCTION_LINES) if of_kernels else (FILE_LINES, FUNCTION_LINES)
    count = len(source.splitlines())
    found = [f"{path}: {count} lines, expected fewer than {limit}"] if count >= limit else []
    for node in functions(ast.parse(source)):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > most:
            found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, expected at most {most}")
    return found


def count_any(source: str) -> int:
    """How often `Any` is used; its import does not count."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(source)))


def test_files_and_functions_are_short() -> None:
    paths = python_files(*LIBRARY, *PROGRAMS)
    found = [line for path in paths for line in too_long(path.as_posix(), (ROOT / path).read_text())]
    assert not found, "split these:\n" + "\n".join(found)


def test_any_is_rare_in_the_library() -> None:
    counts, lines = {}, 0
    for path in python_files(*LIBRARY):
        source = (ROOT / path).read_text()
        counts[path.as_posix()] = count_any(source)
        lines += len(source.splitlines())
    total, allowed = sum(counts.values()), ANY_PER_1000_LINES * lines // 1000
    most = sorted(counts.items(), key=lambda item: -item[1])[:20]
    report = "\n".join(f"{count:4} {path}" for path, count in most)
    assert total <= allowed, (
        f"Any is used {total} times in {lines} lines, expected at most {allowed}; most of all in\n{report}"
    )


@pytest.mark.parametrize(
    ("path", "lines", "right"),
    [
        ("passes/x.py", 299, True),
        ("passes/x.py", 300, False),
        ("tests/test_x.py", 300, False),
        ("kernels/gpu/x.py", 399, True),
        ("kernels/gpu/x.py", 400, False),
    ],
)
def test_the_length_of_a_file_is_held_to_its_limit(path: str, lines: int, right: bool) -> None:
    assert (too_long(path, "x = 1\n" * lines) == []) is right


@pytest.mark.parametrize(
    ("head", "lines", "right"),
    [
        ("def f():", 40, True),
        ("def f():", 41, False),
        ("async def f():", 41, False),
        ("class A:\n  def f(self):", 41, False),
        ("@triton.jit\ndef f():", 99, True),
        ("@triton.jit(debug=True)\ndef f():", 99, True),
        ("@functools.cache\ndef f():", 41, False),
    ],
)
def test_the_length_of_a_function_is_held_to_its_limit(head: str, lines: int, right: bool) -> None:
    assert (too_long("passes/x.py", head + "\n" + "    x = 1\n" * (lines - 1)) == []) is right


def test_a_function_of_kernels_may_document_more() -> None:
    assert too_long("kernels/x.py", "def f():\n" + "    x = 1\n" * 49) == []
    assert too_long("kernels/x.py", "def f():\n" + "    x = 1\n" * 50) != []


def test_uses_of_any_are_counted_and_its_import_is_not() -> None:
    assert count_any("from typing import Any\nx: Any = 1\ndef f(y: list[Any]) -> Any: ...\n") == 3
