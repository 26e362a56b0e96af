"""Every module of the library has a test file of its name in the mirrored place, or a line that says what tests it."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("moeify", "passes", "kernels")

# A module without a test file of its name, or a folder of data, and the test file that covers it. `make mutants` asks
# `covered_by` too.
COVERED_BY = {
    "moeify/families/targets": "tests/moeify/families/test_pairs.py",
    "moeify/families/granite.py": "tests/moeify/families/test_pairs.py",
    "moeify/families/sigmoid.py": "tests/moeify/families/test_pairs.py",
    "moeify/checkpoint/quantized/base.py": "tests/moeify/checkpoint/quantized/test_gptq.py",
    "moeify/checkpoint/quantized/schemes.py": "tests/moeify/checkpoint/quantized/test_files.py",
    "moeify/checkpoint/download.py": "tests/moeify/checkpoint/test_source.py",
    "moeify/checkpoint/derived.py": "tests/moeify/checkpoint/quantized/test_files.py",
    "moeify/__init__.py": "tests/test_packaging.py",
    "moeify/cli/__init__.py": "tests/moeify/cli/test_convert.py",
    "moeify/cli/options.py": "tests/moeify/cli/test_usage.py",
    "moeify/cli/writing.py": "tests/moeify/cli/test_convert.py",
    "moeify/parallel/agreement.py": "tests/moeify/parallel/test_shard.py",
    "moeify/parallel/advice.py": "tests/moeify/parallel/test_estimate.py",
    "moeify/parallel/costs.py": "tests/moeify/parallel/test_estimate.py",
    "moeify/parallel/sizes.py": "tests/moeify/parallel/test_estimate.py",
    "moeify/parallel/gradients.py": "tests/moeify/parallel/test_shard.py",
    "moeify/parallel/mesh.py": "tests/moeify/parallel/test_shard.py",
    "moeify/parallel/noise.py": "tests/moeify/parallel/test_shard.py",
    "moeify/report/about.py": "tests/moeify/report/test_collect.py",
    "moeify/report/data.py": "tests/moeify/report/test_render.py",
    "moeify/report/text.py": "tests/moeify/report/test_collect.py",
    "moeify/report/watching.py": "tests/moeify/report/test_collect.py",
    "moeify/families/words.py": "tests/moeify/cli/test_usage.py",
    "moeify/methods/__init__.py": "tests/moeify/config/test_choice.py",
    "moeify/routers/__init__.py": "tests/moeify/config/test_choice.py",
}


def covered_by(path: str) -> str | None:
    """The test file that the table names for a module or for its folder, if it does."""
    return COVERED_BY.get(path, COVERED_BY.get(PurePosixPath(path).parent.as_posix()))


def mirrored(path: str) -> str:
    """Where the test of a module belongs: tests/passes/test_lower.py for passes/lower.py."""
    module = PurePosixPath(path)
    return (PurePosixPath("tests") / module.parent / f"test_{module.name}").as_posix()


def defines_something(path: Path) -> bool:
    """Whether there is a function, a class or a table to test: `__init__` files may hold imports only."""
    kinds = (ast.Import, ast.ImportFrom, ast.Expr)
    left = [node for node in ast.parse(path.read_text()).body if not isinstance(node, kinds)]
    return any(not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__") for node in left)


def modules() -> list[str]:
    """The modules of the library, by path; moeify/passes and moeify/kernels are links, and are not followed."""
    found = [path for folder in LIBRARY for path in (ROOT / folder).rglob("*.py") if defines_something(path)]
    real = [path for path in found if not any(parent.is_symlink() for parent in path.parents)]
    return sorted(path.relative_to(ROOT).as_posix() for path in real)


def test_every_module_has_a_test_of_its_name_or_a_line_in_the_table() -> None:
    bare = [path for path in modules() if covered_by(path) is None and not (ROOT / mirrored(path)).exists()]
    lines = "\n".join(f"{path}: {mirrored(path)}" for path in bare)
    assert not bare, f"{len(bare)} modules have no test file; write it, or say in COVERED_BY what covers them:\n{lines}"


def test_the_table_is_short_and_true() -> None:
    known = set(modules())
    known.update(PurePosixPath(path).parent.as_posix() for path in modules())
    assert [path for path in COVERED_BY if path not in known] == [], "these modules are gone"
    assert [path for path in COVERED_BY if (ROOT / mirrored(path)).exists()] == [], "these have a test of their name"
    assert [test for test in COVERED_BY.values() if not (ROOT / test).exists()] == [], "these tests do not exist"


def test_the_place_of_a_test_mirrors_the_place_of_its_module() -> None:
    assert mirrored("passes/matching/operators.py") == "tests/passes/matching/test_operators.py"
    assert mirrored("moeify/plan.py") == "tests/moeify/test_plan.py"
