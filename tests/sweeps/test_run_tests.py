from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sweeps.run_tests import INTERPRETED, Outcome, Tree

GPU_TESTS = Path(__file__).resolve().parents[1] / "kernels/gpu"

FILES = {
    ".gitignore": "secret.py\n",
    "secret.py": "",
    "moeify/__init__.py": "X = 1\n",
    "tests/test_right.py": "import moeify\n\n\ndef test_x():\n    assert moeify.X == 1\n",
    "tests/test_wrong.py": "def test_first():\n    pass\n\n\ndef test_second():\n    assert 1 == 2\n",
    "tests/test_broken.py": "1 / 0\n",
    "tests/test_slow.py": "import time\n\n\ndef test_slow():\n    time.sleep(30)\n",
    "tests/test_killed.py": "import os\n\n\ndef test_killed():\n    os.abort()\n",
    "tests/kernels/gpu/test_gemm.py": "import os\n\n\ndef test():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("repository")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "link").symlink_to("moeify")
    subprocess.run(["git", "init", "--quiet", "."], cwd=root, check=True)
    return Tree(root, tmp_path_factory.mktemp("copies") / "copy")


def test_the_tests_for_the_interpreter_are_those_of_their_conftest() -> None:
    assert 'os.environ.get("TRITON_INTERPRET") != "1"' in (GPU_TESTS / "conftest.py").read_text()
    assert all(INTERPRETED.match(f"tests/kernels/gpu/{path.name}") for path in GPU_TESTS.glob("test_*.py"))
    assert not INTERPRETED.match("tests/kernels/test_ops.py")


def test_the_copy_holds_links_and_no_ignored_file(tree: Tree) -> None:
    assert (tree.folder / "link").is_symlink()
    assert (tree.folder / "moeify/__init__.py").read_text() == "X = 1\n"
    assert not (tree.folder / "secret.py").exists()


def test_a_copy_that_would_not_be_imported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    subprocess.run(["git", "init", "--quiet", "."], cwd=tmp_path, check=True)
    with pytest.raises(RuntimeError, match="not the copy in"):
        Tree(tmp_path, tmp_path / "copy")


@pytest.mark.parametrize(
    ("stages", "outcome"),
    [
        ([["tests/test_right.py"], ["tests/kernels/gpu/test_gemm.py"]], Outcome("passed")),
        ([["tests/test_right.py"], ["tests/test_wrong.py"]], Outcome("failed", "tests/test_wrong.py::test_second")),
        ([["tests/test_broken.py"]], Outcome("failed", "tests/test_broken.py")),
        ([["tests/test_killed.py"]], Outcome("failed", "exit -6 in tests/test_killed.py")),
        ([["tests/test_slow.py"]], Outcome("timed out", "2 s in tests/test_slow.py")),
    ],
    ids=["passed", "failed", "broken", "killed", "slow"],
)
def test_the_outcome_of_running_tests(tree: Tree, stages: list[list[str]], outcome: Outcome) -> None:
    assert tree.run(stages, seconds=60, per_test=2) == outcome


def test_what_does_not_fit_the_time_is_not_complete(tree: Tree) -> None:
    stages = [["tests/test_right.py"], ["tests/test_slow.py"]]
    assert tree.run(stages, seconds=4, per_test=60) == Outcome("passed", complete=False)
    assert tree.run(stages, seconds=0, per_test=60) == Outcome("passed", complete=False)


def test_failing_names_the_tests_that_fail(tree: Tree) -> None:
    tests = ["tests/test_right.py::test_x", "tests/test_wrong.py::test_first", "tests/test_wrong.py::test_second"]
    assert tree.failing(tests) == {"tests/test_wrong.py::test_second"}
