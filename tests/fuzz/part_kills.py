"""Kills at random moments of the parts of one conversion: what is there afterwards, and whether the parts go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.process import OPTIONS, Digest, digest, finish, lock_of, run, start, swapping, wait_until

PARTS = 3


def arguments(number: int) -> tuple[str, ...]:
    """What is typed for a part, from 1 on."""
    return ("convert", "src", "dst", *OPTIONS, "--part", f"{number}/{PARTS}")


def kill_parts_once(folder: Path, rng: random.Random, new: Digest, seconds: float) -> tuple[str, str]:
    """Run the parts in any order, kill some, and run those again.

    Args:
        folder: Where they run; it holds `src`.
        rng: Draws the order and the moments.
        new: What one run without parts leaves.
        seconds: What a part takes.

    Returns:
        What the kills left, and what is wrong.
    """
    clear(folder)
    order = rng.sample(range(1, PARTS + 1), PARTS)
    for number in order:
        if rng.random() < 0.3 or number == order[-1]:
            kill_part(folder, number, rng, seconds)
        elif (code := run(arguments(number), folder)[0]) not in (0, 1):
            return "torn", f"part {number} ended with {code}"
    output = {name: what for name, what in digest(folder, "dst").items() if name.partition("/")[0] == "dst"}
    if output not in ({}, new):
        return "torn", f"a torn output: {sorted(output)}"
    left = ["absent", "new"][bool(output)] + f" and {len(list(folder.glob('dst.part-*')))} parts"
    return left, _again(folder, order, new, joined=bool(output))


def kill_part(folder: Path, number: int, rng: random.Random, seconds: float) -> None:
    """Start a part, and kill it while it writes or gets its place, or while all parts are joined or removed."""
    with TemporaryDirectory() as there:
        child = start(arguments(number), folder, Path(there, "said"))
        moment = rng.choice(["writing", "placing", "joining", "removing"])
        if moment == "writing":
            wait_until(lambda: lock_of(folder) is not None, child)
            time.sleep(rng.random() * seconds)
        elif moment == "placing":
            wait_until(partial(swapping, folder), child)
            time.sleep(rng.random() * 0.01)
        elif moment == "joining":
            wait_until((folder / f"dst.part-{number}-of-{PARTS}").exists, child)
            time.sleep(rng.random() * 0.1)
        else:
            wait_until((folder / "dst").exists, child)
            time.sleep(rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        finish(child)


def clear(folder: Path) -> None:
    """Leave the source alone in a folder."""
    for path in [*folder.glob("dst*"), *folder.glob(".*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _again(folder: Path, order: list[int], new: Digest, *, joined: bool) -> str:
    """Run all parts again; return what is wrong."""
    for number in order:
        code, errors = run(arguments(number), folder)
        refused = code == 1 and len(errors) == 1 and "exists" in errors[0]
        if not refused and (code or errors):
            return f"part {number} run again ended with {code}: {errors}"
        if joined and not refused:
            return f"beside a whole output part {number} ended with {code}: {errors}"
    after = digest(folder, "dst")
    if joined:  # parts may be left where a run was killed while it removed them
        after = {name: what for name, what in after.items() if not name.startswith("dst.part-")}
    return "" if after == new else f"the parts left {sorted(set(after.items()) ^ set(new.items()))}"[:500]
