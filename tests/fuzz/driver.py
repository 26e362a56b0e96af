"""Running a command of moeify in a forked child that may crash, hang or swallow memory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeify.cli import main
from moeify.errors import RefusedError
from moeify.export import pipeline

SECONDS = 10  # of CPU time
EXPORT_SECONDS = 60  # of CPU time for a whole export: a tiny one takes ten
IDLE_SECONDS = 10  # asleep without using the processor: it waits for something that does not come
LOADED = "the export ends here: the model is loaded"
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


def execute(arguments: list[str], work: Path, *, loads_only: bool = False) -> Outcome:
    """Run `moeify` with some arguments in a folder, with "y" as the answer to every question.

    Args:
        arguments: What was typed.
        work: Where.
        loads_only: An export ends when the model and its tokenizer are loaded.
    """
    with TemporaryDirectory(prefix="fuzz-said-") as folder:
        said = Path(folder)
        (said / "stdin").write_text("y\n" * 100)
        for name in ("stdout", "stderr", "where"):
            (said / name).touch()
        before = _resident()
        with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of forks where there are threads
            child = os.fork()
        if child == 0:
            _in_child(arguments, work, said, loads_only)
        status, usage = _wait(child)
        out, err, where = ((said / name).read_text(errors="replace") for name in ("stdout", "stderr", "where"))
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = -killed if killed else os.WEXITSTATUS(status)
    growth = max(0, usage.ru_maxrss * 1024 - before)
    return Outcome(code, killed, out, err, growth, usage.ru_utime + usage.ru_stime, where)


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    """Wait for the end of a child; one that only sleeps is ended with SIGALRM, however busy the machine is."""
    since, used = time.monotonic(), -1
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return status, usage
        time.sleep(0.01)
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        now = int(fields[11]) + int(fields[12])  # ticks of CPU time
        if fields[0] != "S" or now != used:
            since, used = time.monotonic(), now
        elif time.monotonic() - since > IDLE_SECONDS:
            os.kill(child, signal.SIGALRM)


def _in_child(arguments: list[str], work: Path, said: Path, loads_only: bool) -> None:
    """Run the command with limits, and end the process whatever happens."""
    code = 96
    try:
        faulthandler.disable()  # pytest's would speak for a child
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(said / name, os.O_RDWR), number)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace")  # as Python opens it
        whole_export = arguments[0] == "export" and not loads_only
        seconds = EXPORT_SECONDS if whole_export else SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 2))
        resource.setrlimit(resource.RLIMIT_AS, (_addresses() + _ADDRESSES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)  # the parent's pool of threads is not here
        os.chdir(work)
        if arguments[0] in ("convert", "inspect", "verify"):  # ONNX Runtime, of the others, writes into it
            os.environ["HOME"] = str(work)
        if loads_only:
            pipeline.export = _loaded  # type: ignore[assignment]
        code = _run(arguments, said)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _loaded(*_: object) -> None:
    raise RefusedError(LOADED)


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
    shown = end.__context__  # click's error, whose cause is what came up
    error = shown and (shown.__cause__ or shown)
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [frame for frame in frames if "/moeify/" in frame.filename and "/tests/" not in frame.filename]
    if not ours:
        return ""
    return f"{ours[-1].filename.rpartition('/moeify/')[2]}:{ours[-1].lineno} {type(error).__name__}"


def _resident() -> int:
    """Bytes of memory of this process that a child starts with: those that are not of files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def _addresses() -> int:
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
