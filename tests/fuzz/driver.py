"""Running a command of moeify in a forked child that may crash, hang or swallow memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moeify.cli import main

SECONDS = 10  # of CPU time
WALL_SECONDS = 120  # for what waits; the machine may have other work
GROWTH = 2**30  # bytes of memory above what the child starts with
_ADDRESSES = 6 * 2**30  # more of address space: files are mapped


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Its exit code; 97 for an exception that came out of the command line itself.
        signal: What killed it, or 0.
        stdout, stderr: What it said.
        growth: Bytes of memory above what it started with.
        seconds: Of CPU time.
        where: The innermost place in moeify of the error behind an exit code, if there is one.
    """

    code: int
    signal: int
    stdout: str
    stderr: str
    growth: int
    seconds: float
    where: str


def execute(arguments: list[str], work: Path) -> Outcome:
    """Run `moeify` with some arguments in a folder, with "y" as the answer to every question."""
    with TemporaryDirectory(prefix="fuzz-said-") as folder:
        said = Path(folder)
        (said / "stdin").write_text("y\n" * 100)
        for name in ("stdout", "stderr", "where"):
            (said / name).touch()
        before = _resident()
        with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of forks where there are threads
            child = os.fork()
        if child == 0:
            _in_child(arguments, work, said)
        _, status, usage = os.wait4(child, 0)
        out, err, where = ((said / name).read_text(errors="replace") for name in ("stdout", "stderr", "where"))
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = -killed if killed else os.WEXITSTATUS(status)
    growth = max(0, usage.ru_maxrss * 1024 - before)
    return Outcome(code, killed, out, err, growth, usage.ru_utime + usage.ru_stime, where)


def _in_child(arguments: list[str], work: Path, said: Path) -> None:
    """Run the command with limits, and end the process whatever happens."""
    code = 96
    try:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(said / name, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
        )
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)  # as Python opens it
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_AS, (_addresses() + _ADDRESSES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(WALL_SECONDS)
        os.chdir(work)
        code = _run(arguments, said)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(arguments: list[str], said: Path) -> int:
    try:
        main(arguments, prog_name="moeify")
    except SystemExit as end:
        with contextlib.suppress(Exception):
            (said / "where").write_text(_place(end))
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 97
    return 0


def _place(end: BaseException) -> str:
    """Name the line of moeify where the error behind an exit came up."""
    error = end.__context__
    while error is not None and error.__cause__ is not None and "moeify.errors" not in type(error).__module__:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [
        frame for frame in frames if f"{os.sep}moeify{os.sep}" in frame.filename and "/tests/" not in frame.filename
    ]
    if not ours:
        return ""
    return f"{ours[-1].filename.rpartition(os.sep + 'moeify' + os.sep)[2]}:{ours[-1].lineno} {type(error).__name__}"


def _resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
