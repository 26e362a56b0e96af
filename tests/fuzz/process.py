"""Runs of the command line in children, to be killed, and what they leave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeify.cli import main

OPTIONS = ("--experts", "3", "--top-k", "2", "--no-verify", "--method", "noise", "--shard-size", "50MB")
_POLL = 0.0005  # seconds

Digest = dict[str, str]


def digest(folder: Path, output: str) -> Digest:
    """What lies at the place of an output, its companion included, and everything hidden, by name."""
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith((output, ".")):
            for path in sorted([folder / name, *(folder / name).rglob("*")]):
                if path.is_file():
                    with path.open("rb") as file:
                        found[str(path.relative_to(folder))] = sha256(file.read()).hexdigest()
                else:
                    found[str(path.relative_to(folder))] = "folder"
    return found


def start(arguments: tuple[str, ...], folder: Path, said: Path) -> int:
    """Run a command in a child, which needs not load torch again."""
    child = os.fork()
    if child == 0:
        code = 97
        try:
            os.chdir(folder)
            for number in (1, 2):
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
            torch.set_num_threads(1)
            main(list(arguments), prog_name="moeify")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: tuple[str, ...], folder: Path) -> tuple[int, list[str]]:
    """Run a command to its end; return its code and its error lines."""
    with TemporaryDirectory() as there:
        code = finish(start(arguments, folder, Path(there, "said")))
        lines = Path(there, "said").read_text(errors="replace").splitlines()
    return code, [line for line in lines if line.startswith(("Error: ", "Traceback"))]


def lock_of(folder: Path) -> Path | None:
    """The lock and journal of the run that is at work in a folder."""
    return next(folder.glob(".*.moeify-partial/lock"), None)


def wait_until(happens: Callable[[], bool], child: int) -> None:
    """Wait for something, or for the end of a child, which is not reaped."""
    while not happens() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(_POLL)


def swapping(folder: Path) -> bool:
    """Whether a run is giving its files their places."""
    try:
        lock = lock_of(folder)
        return lock is not None and b"placing" in lock.read_bytes()
    except FileNotFoundError:
        return True


def timed(arguments: tuple[str, ...], folder: Path) -> float:
    """Run a command; return the seconds from its first file to its end."""
    with TemporaryDirectory() as there:
        child = start(arguments, folder, Path(there, "said"))
        wait_until(lambda: lock_of(folder) is not None, child)
        begun = time.monotonic()
        code = finish(child)
        if code:
            raise SystemExit(f"{arguments} ended with {code}: {Path(there, 'said').read_text()[-500:]}")
    return time.monotonic() - begun
