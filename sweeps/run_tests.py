"""Run test files in a copy of the tree until one test fails, within a time limit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# These need TRITON_INTERPRET=1, and so a process of their own: tests/kernels/gpu/conftest.py asks for it.
INTERPRETED = re.compile(r"tests/kernels/gpu/test_\w+\.py")
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Outcome:
    """What came of running tests.

    Attributes:
        status: "passed", "failed", or "timed out": one test took longer than it may.
        by: The test that failed, or what ended the process; "" if all passed.
        complete: All tests were run; False if the time was used up before.
    """

    status: str
    by: str = ""
    complete: bool = True


class Tree:
    """A copy of the files that git knows or would take up, in which a file may be changed.

    Args:
        root: The repository.
        folder: Where the copy goes; it must not exist.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        self.folder = folder
        for name in filter(None, listed.split("\0")):
            if (root / name).is_symlink() or (root / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name, follow_symlinks=False)
        found = self._python(["-c", "import moeify; print(moeify.__file__)"]).communicate()[0].strip()
        if Path(found) != folder / "moeify/__init__.py":
            raise RuntimeError(f"the tests would import {found or 'nothing'}, not the copy in {folder}")

    def run(self, stages: Iterable[list[str]], seconds: float, per_test: int) -> Outcome:
        """Run groups of test files, one after the other, until a test fails.

        Args:
            stages: Test files, or ids of tests.
            seconds: For all of them.
            per_test: Seconds for one test.
        """
        end = time.monotonic() + seconds
        for stage in stages:
            for tests in _by_process(stage):
                outcome = self._run(tests, end - time.monotonic(), per_test)
                if outcome.status != "passed" or not outcome.complete:
                    return outcome
        return Outcome("passed")

    def _run(self, tests: list[str], seconds: float, per_test: int) -> Outcome:
        if seconds <= 0:
            return Outcome("passed", complete=False)
        process = self._pytest(tests, "--exitfirst", "-o", f"faulthandler_timeout={per_test}",
                               "-o", "faulthandler_exit_on_timeout=true")  # fmt: skip
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Outcome("passed", complete=False)
        if process.returncode in {0, NO_TESTS}:
            return Outcome("passed")
        if "Timeout (" in err:
            return Outcome("timed out", f"{per_test} s in {tests[0]}")
        return Outcome("failed", next(iter(_failed(out)), f"exit {process.returncode} in {tests[0]}"))

    def failing(self, tests: list[str]) -> set[str]:
        """Return those of some tests that fail in this tree."""
        found = set[str]()
        for group in _by_process(tests):
            found |= set(_failed(self._pytest(group).communicate()[0]))
        return found

    def _pytest(self, tests: list[str], *options: str) -> subprocess.Popen[str]:
        quiet = ["-q", "--tb=no", "--no-header", "-rfE", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        interpreted = "1" if INTERPRETED.match(tests[0]) else "0"
        return self._python(["-m", "pytest", *quiet, *options, *tests], TRITON_INTERPRET=interpreted)

    def _python(self, arguments: list[str], **variables: str) -> subprocess.Popen[str]:
        """Start Python in the tree. Compiled files are not kept: a file may change twice within a second."""
        variables |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env={**os.environ, **variables}, start_new_session=True,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def _by_process(tests: list[str]) -> list[list[str]]:
    """Part the tests that run in Triton's interpreter from the others."""
    interpreted = [test for test in tests if INTERPRETED.match(test)]
    return [group for group in ([test for test in tests if test not in interpreted], interpreted) if group]


def _failed(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (\S+?::.*?|\S+)(?: - .*)?$", output, flags=re.MULTILINE)
