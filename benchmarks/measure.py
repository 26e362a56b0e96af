"""Wall time and peak memory of commands, run by turns, and a table of the medians.

The process that measures must stay small: Linux counts the memory of the process that starts a command as the
command's own peak. So nothing here, nor in the programs that use it, imports torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Command:
    """What is run under a name; `out` is the folder it writes, removed before each run."""

    name: str
    argv: tuple[str | Path, ...]
    out: Path


@dataclass(frozen=True)
class Run:
    """Seconds from start to exit, seconds of CPU, peak resident bytes of the largest process, bytes written."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    out_bytes: int


def make_checkpoint(kind: str, dst: Path, **options: int) -> Path:
    """Write a dense checkpoint, in a process of its own."""
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, Path(__file__).with_name("make_checkpoint.py"), kind, dst, *more], check=True)
    return dst


def measure(command: Command) -> Run:
    """Run a command once, after the disk has come to rest.

    Raises:
        SystemExit: the command failed; the message ends with the last lines it printed.
    """
    shutil.rmtree(command.out, ignore_errors=True)
    os.sync()
    log = command.out.with_suffix(".log")
    start = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(command.argv, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{command.name}: exit code {process.returncode}\n{tail}")
    run = Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, folder_bytes(command.out))
    print(
        f"{command.name}: {run.seconds:.1f} s, CPU {run.cpu_seconds:.1f} s, {run.peak_bytes / GIB:.2f} GiB", flush=True
    )
    return run


def by_turns(commands: list[Command], repeats: int) -> dict[str, list[Run]]:
    """Run the commands A, B, A, B, …, so that a change in the machine's mood meets them all alike."""
    runs: dict[str, list[Run]] = {command.name: [] for command in commands}
    for _ in range(repeats):
        for command in commands:
            runs[command.name].append(measure(command))
            shutil.rmtree(command.out)
    return runs


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def raw(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, float]]]:
    """Return runs as a record keeps them."""
    return {name: [asdict(run) for run in of_command] for name, of_command in runs.items()}


def medians(runs: Mapping[str, Sequence[Mapping[str, float]]], against: str) -> dict[str, dict[str, Any]]:
    """Return the medians of each command by the key of its name, with its time as a multiple of that of `against`."""
    base = median(run["seconds"] for run in runs[against])
    found = {}
    for name, of_command in runs.items():
        columns = {field.name: [run[field.name] for run in of_command] for field in fields(Run)}
        seconds = columns["seconds"]
        found[key(name)] = {
            "name": name,
            "runs": len(seconds),
            "written_gib": median(columns["out_bytes"]) / GIB,
            "seconds": median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "cpu_seconds": median(columns["cpu_seconds"]),
            "memory_gib": median(columns["peak_bytes"]) / GIB,
            "time": median(seconds) / base,
        }
    return found


def table(rows: Mapping[str, Mapping[str, Any]], against: str) -> str:
    """Return what `medians` found as a Markdown table."""
    lines = [
        f"| command | runs | written | median time | fastest, slowest | CPU time | memory | time against {against} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows.values():
        lines.append(
            "| {name} | {runs} | {written_gib:.2f} GiB | {seconds:.1f} s | {fastest:.1f} s, {slowest:.1f} s "
            "| {cpu_seconds:.1f} s | {memory_gib:.2f} GiB | {time:.2f} |".format(**row)
        )
    return "\n".join(lines)


def machine() -> str:
    """Return the machine in one line."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = (line.partition(":")[2].strip() for line in facts if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{os.cpu_count()} cores ({next(cpus, platform.machine())}), {memory:.0f} GiB"


def key(name: str) -> str:
    """Return a name as the summary has it: words and underscores, so that it can stand in a link."""
    return "_".join(re.findall(r"\w+", name, re.ASCII))


def need_space(folder: Path, gib: int) -> None:
    """Make the folder, and stop unless it has the space."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / GIB
    if free < gib:
        raise SystemExit(f"{folder} has {free:.0f} GiB free and {gib} are needed: name another folder with --work")
