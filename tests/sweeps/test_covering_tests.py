from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.covering_tests import CoveringTests, module_of

FILES = {
    "moeify/__init__.py": "",
    "moeify/a/__init__.py": "",
    "moeify/a/low.py": "",
    "moeify/a/middle.py": "def f():\n    from moeify.a import low",
    "moeify/high.py": "import moeify.a.middle",
    "moeify/word.py": "A = 'moeify.a'",
    "passes/p.py": "",
    "tests/helper.py": "from moeify.passes import p",
    "tests/moeify/a/test_low.py": "",
    "tests/moeify/a/test_beside.py": "",
    "tests/moeify/test_uses_low.py": "from moeify.a.low import x",
    "tests/moeify/test_uses_middle.py": "import moeify.a.middle",
    "tests/moeify/test_uses_high.py": "from moeify.high import f",
    "tests/moeify/test_uses_word.py": "from moeify import word",
    "tests/test_uses_p.py": "from tests import helper",
    "tests/test_uses_face.py": "import moeify\nmoeify.convert",
    "tests/test_nothing.py": "import torch",
}


@pytest.fixture
def covering(tmp_path: Path) -> CoveringTests:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return CoveringTests(tmp_path, [name for name in FILES if not name.startswith("tests")])


def test_near_tests_come_first(covering: CoveringTests) -> None:
    assert covering.stages("moeify/a/low.py") == [
        ["tests/moeify/a/test_low.py"],  # of its name
        ["tests/moeify/a/test_beside.py"],  # in its folder
        ["tests/moeify/test_uses_low.py"],  # imports it
        ["tests/moeify/test_uses_middle.py"],  # imports what imports it
        ["tests/moeify/test_uses_high.py", "tests/moeify/test_uses_word.py"],
    ]


def test_what_a_helper_of_the_tests_imports_counts(covering: CoveringTests) -> None:
    assert covering.stages("passes/p.py") == [["tests/test_uses_p.py"]]


def test_a_name_of_the_public_face_counts_as_its_module(tmp_path: Path) -> None:
    import moeify

    home = f"moeify/{moeify._HOME['convert'].replace('.', '/')}.py"
    for name, text in {home: "", "tests/test_face.py": "import moeify\nmoeify.convert(x)\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert CoveringTests(tmp_path, [home]).stages(home) == [["tests/test_face.py"]]


def test_names_of_modules() -> None:
    assert module_of("passes/lower.py") == "moeify.passes.lower"
    assert module_of("kernels/gpu/gemm.py") == "moeify.kernels.gpu.gemm"
    assert module_of("moeify/routers/__init__.py") == "moeify.routers"
