"""Kills at random moments of outputs of about 230 MB, and races for one place: what is there afterwards, counted.

python -m tests.fuzz.kills                    all of them (an hour of one core), a table, and the record docs/fuzz.json
python -m tests.fuzz.kills --only export      one kind; without --write no record
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.make_checkpoint import llama
from tests.fuzz.__main__ import keep, prepare
from tests.fuzz.part_kills import kill_parts_once
from tests.fuzz.process import OPTIONS, Digest, digest, finish, lock_of, run, start, swapping, timed, wait_until
from tests.fuzz.sources import source

# Layers and hidden size; an export holds float32.
_SHAPES = {"convert": (2, 1024), "gguf": (2, 1024), "export": (4, 512)}
_OUTPUTS = {"convert": "dst", "gguf": "dst.gguf", "export": "out.onnx"}
_SWAPS = 0.25  # of the kills come when the files are about to get their places


@dataclass(frozen=True)
class Task:
    """A command that is killed, and what may be there afterwards.

    Attributes:
        folder: Where it runs; nothing but its input and its output is in there.
        output: The name of the output.
        arguments: What is typed.
        resumes: Whether the command has `--resume`.
        old: What stands at the place of the output before it, or None.
        new: What stands there after a whole run.
        seconds: From the first file to the end of a whole run.
    """

    folder: Path
    output: str
    arguments: tuple[str, ...]
    resumes: bool
    old: Path | None
    new: Digest
    seconds: float


def prepared(task: Task) -> None:
    """Put the folder of a task in the state from which it starts."""
    for path in [*task.folder.glob(f"{task.output}*"), *task.folder.glob(".*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if task.old is not None:
        for path in task.old.iterdir():
            target = task.folder / path.name
            shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)


def kill_once(task: Task, rng: random.Random) -> tuple[str, str]:
    """Kill a run, look, and run again; return what was there after the kill, and what is wrong."""
    prepared(task)
    before = digest(task.folder, task.output)
    with TemporaryDirectory() as there:
        child = start(task.arguments, task.folder, Path(there, "said"))
        if rng.random() < _SWAPS:
            wait_until(partial(swapping, task.folder), child)
            time.sleep(rng.random() * 0.01)
        else:
            wait_until(lambda: lock_of(task.folder) is not None, child)
            time.sleep(rng.random() * task.seconds)
        os.kill(child, signal.SIGKILL)
        finish(child)
    left = digest(task.folder, task.output)
    seen = {name: what for name, what in left.items() if not name.startswith(".")}
    hidden = " and a work folder" if len(seen) < len(left) else ""
    found = {"": "absent", str(before): "old", str(task.new): "new"}.get(str(seen) if seen else "", "torn")
    if found == "torn":
        return found, f"a torn output: {sorted(seen)}"
    return found + hidden, _again(task, rng, whole=found == "new")


def _again(task: Task, rng: random.Random, *, whole: bool) -> str:
    """Run again after a kill; return what is wrong."""
    resume = ("--resume",) if task.resumes and rng.random() < 0.5 else ()
    code, errors = run((*task.arguments, *resume), task.folder)
    if whole and "--overwrite" not in task.arguments:
        if code != 1 or len(errors) != 1 or "exists" not in errors[0]:
            return f"beside a whole output the next run ended with {code}: {errors}"
    elif code or errors:
        return f"the next run ended with {code}: {errors}"
    after = digest(task.folder, task.output)
    return "" if after == task.new else f"the next run left {sorted(set(after.items()) ^ set(task.new.items()))}"[:500]


def race_once(folder: Path, rng: random.Random, new: Digest) -> tuple[str, str]:
    """Let two runs write one output; return how they ended, and what is wrong."""
    shutil.rmtree(folder / "dst", ignore_errors=True)
    arguments = ("convert", "src", "dst", *OPTIONS)
    with TemporaryDirectory() as there:
        first = start(arguments, folder, Path(there, "0"))
        time.sleep(rng.random() * 0.3)
        second = start(arguments, folder, Path(there, "1"))
        codes = finish(first), finish(second)
        errors = [[line for line in Path(there, name).read_text().splitlines() if "Error" in line] for name in "01"]
    good = sorted(codes) == [0, 1] and [len(said) for said in errors] == [int(code > 0) for code in codes]
    if not good or digest(folder, "dst") != new:
        return "torn", f"{codes} {errors}"
    return f"one refused, {'at work' if 'another run' in str(errors) else 'afterwards'}", ""


def task_of(kind: str, room: Path) -> Task:
    """Make the input, the old output and the new one of a kind of task."""
    folder, old = room / "work", room / "old"
    what, _, overwrite = kind.partition(" ")
    output, command = _OUTPUTS[what], "export" if what == "export" else "convert"
    options = OPTIONS if command == "convert" else ()
    arguments = (command, "src", output, *options, *overwrite.split())
    if overwrite:
        old.mkdir()
        (old / "src").symlink_to(folder / "src")
        run((command, "src", output, *options, "--seed", "1"), old)
        (old / "src").unlink()
    seconds = timed(arguments, folder)
    return Task(folder, output, arguments, what == "convert", old if overwrite else None,
                digest(folder, output), seconds)  # fmt: skip


def output_of(path: Path, task: Task) -> bool:
    return path.is_file() and path.relative_to(task.folder).parts[0].startswith(task.output)


def kills(kind: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill a command some times; return what was there after the kills, and what was wrong."""
    rng, found, wrong = random.Random(f"{seed} {kind}"), Counter[str](), []
    with TemporaryDirectory(prefix="kills-") as there:
        room = Path(there)
        (room / "work").mkdir()
        torch.manual_seed(0)
        layers, hidden = _SHAPES[kind.partition(" ")[0]]
        llama(room / "work/dense", layers, hidden)
        if kind == "export":
            run(("convert", "dense", "src", *OPTIONS), room / "work")
        else:
            (room / "work/dense").rename(room / "work/src")
        task = task_of(kind, room)
        nbytes = sum(path.stat().st_size for path in task.folder.rglob("*") if output_of(path, task))
        print(f"{kind}: {task.seconds:.1f} s, {nbytes / 1e6:.0f} MB", flush=True)
        for number in range(count):
            left, problem = kill_once(task, rng)
            found[left] += 1
            if problem:
                wrong.append(f"{kind} {number}: {left}: {problem}")
            print(f"{kind} {number}: {left}: {problem or 'right'}", flush=True)
    return found, wrong


def races(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Let pairs of conversions race for one place."""
    rng, found, wrong = random.Random(f"{seed} races"), Counter[str](), []
    with TemporaryDirectory(prefix="races-") as there:
        folder = Path(there)
        shutil.copytree(source("llama"), folder / "src")
        run(("convert", "src", "dst", *OPTIONS), folder)
        new = digest(folder, "dst")
        for number in range(count):
            ended, problem = race_once(folder, rng, new)
            found[ended] += 1
            if problem:
                wrong.append(f"race {number}: {problem}")
    return found, wrong


def part_kills(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill parts of one conversion some times; return what was there after the kills, and what was wrong."""
    rng, found, wrong = random.Random(f"{seed} parts"), Counter[str](), []
    with TemporaryDirectory(prefix="kills-") as there:
        folder = Path(there)
        torch.manual_seed(0)
        llama(folder / "src", *_SHAPES["convert"])
        seconds = timed(("convert", "src", "dst", *OPTIONS), folder)
        new = digest(folder, "dst")
        for number in range(count):
            left, problem = kill_parts_once(folder, rng, new, seconds / 2)
            found[left] += 1
            if problem:
                wrong.append(f"parts {number}: {left}: {problem}")
            print(f"parts {number}: {left}: {problem or 'right'}", flush=True)
    return found, wrong


def cli() -> int:
    kinds = {"convert": 40, "convert --overwrite": 40, "gguf": 10, "gguf --overwrite": 10, "export": 10, "parts": 20,
             "races": 30}  # fmt: skip
    many = {"parts": part_kills, "races": races}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=kinds)
    parser.add_argument("--count", type=int, help="of each kind, instead of " + json.dumps(kinds))
    parser.add_argument("--write", action="store_true", help="write docs/fuzz.json")
    asked = parser.parse_args()
    prepare()
    wrong: list[str] = []
    for kind in [asked.only] if asked.only else kinds:
        count = asked.count or kinds[kind]
        found, problems = many.get(kind, partial(kills, kind))(count, asked.seed)
        wrong += problems
        print(f"{kind}: {count}, {len(problems)} wrong: {dict(found)}", *problems, sep="\n", flush=True)
        if asked.write:
            keep({f"stopped: {kind}": {"seed": asked.seed, "runs": count, "found": dict(found), "wrong": problems}})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(cli())
