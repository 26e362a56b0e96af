"""Wall time and peak memory of commands, run by turns, and a table of the medians.

The process that measures must stay small: Linux counts the memory of the process that starts a command as the
command's own peak. So nothing here, nor in the programs that use it, imports torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

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


def table(runs: dict[str, list[Run]], against: str) -> str:
    """The medians as a Markdown table, with the time of each as a multiple of the time of `against`."""
    base = median(run.seconds for run in runs[against])
    lines = [
        f"| command | runs | written | median time | fastest, slowest | CPU time | memory | time against {against} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, of_command in runs.items():
        seconds = [run.seconds for run in of_command]
        middle = median(seconds)
        cpu = median(run.cpu_seconds for run in of_command)
        written = median(run.out_bytes for run in of_command) / GIB
        peak = median(run.peak_bytes for run in of_command) / GIB
        cells = (
            name,
            f"{len(seconds)}",
            f"{written:.2f} GiB",
            f"{middle:.1f} s",
            f"{min(seconds):.1f} s, {max(seconds):.1f} s",
            f"{cpu:.1f} s",
            f"{peak:.2f} GiB",
            f"{middle / base:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> str:
    """The machine in one line."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = (line.partition(":")[2].strip() for line in facts if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{os.cpu_count()} cores ({next(cpus, platform.machine())}), {memory:.0f} GiB of memory"


def need_space(folder: Path, gib: int) -> None:
    """Make the folder, and stop unless it has the space."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / GIB
    if free < gib:
        raise SystemExit(f"{folder} has {free:.0f} GiB free and {gib} are needed: name another folder with --work")
