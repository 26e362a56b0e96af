"""Runs functions `case_*` of a test module on several ranks: one process imports torch, forks, and all cases run.

Functions `alone_*` end ranks: each gets ranks and a process group of its own, from the same process. What a function
`before` returns, called in a process without ranks, is `before.json` in the folder of `REPORT`.

`python -m tests.moeify.parallel.harness MODULE WORLD FOLDER`
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[3]
SECONDS = 200
HAS_EXPERT_PARALLEL = find_spec("transformers.distributed.expert_parallel") is not None  # before 5.24: another engine
Case = Callable[[int, int], None]
REPORT, BEFORE = "REPORT_OF_THIS_CASE", "before.json"


def cases(module: str) -> list[str]:
    """The names of the cases in a module, in its order."""
    return [name for name in vars(import_module(module)) if name.startswith(("case_", "alone_"))]


@functools.cache
def outcomes(module: str, world: int) -> dict[str, str]:
    """What went wrong in each case, on the first rank where something did; empty where nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.moeify.parallel.harness", module, str(world), folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        found = {}
        for case in cases(module):
            reports = [Path(folder, f"{case}.{rank}") for rank in range(world)]
            texts = [report.read_text() if report.exists() else "it did not run" for report in reports]
            failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
            found[case] = "\n".join([*failed, done.stderr]) if failed else ""
        return found


def on_several_ranks(module: str, *worlds: int) -> Callable[[str, int], None]:
    """The test of the cases that a module has so far, each on these numbers of ranks."""

    @pytest.mark.parametrize("world", worlds)
    @pytest.mark.parametrize("case", cases(module))
    def test_on_several_ranks(case: str, world: int) -> None:
        problem = outcomes(module, world)[case]
        assert not problem, problem

    return test_on_several_ranks


def found_before() -> Any:
    """What the module's function `before` returned."""
    return json.loads(Path(os.environ[REPORT]).with_name(BEFORE).read_text())


def die() -> NoReturn:
    """End this rank as a crash does, in the middle of a case."""
    Path(os.environ[REPORT]).write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def run(module: str, world: int, folder: Path) -> None:
    """Fork the ranks and wait for them."""
    torch.set_num_threads(1)
    import_module(module)
    if before := getattr(import_module(module), "before", None):
        if not (child := os.fork()):
            (folder / BEFORE).write_text(json.dumps(before()))
            os._exit(0)
        _end(child)
    names = cases(module)
    together = [name for name in names if name.startswith("case_")]
    for group in [together, *([name] for name in names if name.startswith("alone_"))]:
        if group:
            _fork(module, group, world, folder)


def _fork(module: str, names: Sequence[str], world: int, folder: Path) -> None:
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            try:
                _rank(module, names, rank, world, folder)
            finally:
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    for child in children:
        _end(child)


def _end(child: int) -> None:
    until = time.monotonic() + SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.02)


def _rank(module: str, names: Sequence[str], rank: int, world: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    timeout = datetime.timedelta(seconds=60)
    meet = f"file://{folder}/{names[0]}.store"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timeout)
    for case in names:
        report, place = "", folder / f"{case}.{rank}"
        os.environ[REPORT] = str(place)
        try:
            getattr(import_module(module), case)(rank, world)
        except BaseException:
            report = traceback.format_exc()
        place.write_text(report)
        if report:
            return  # the other ranks may be anywhere: what follows would say nothing


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
