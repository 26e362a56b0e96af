"""What safe outputs cost: `moeify convert` and `moeify export` against the commit before the room moeify/files.

    python -m benchmarks.safe_output --old FOLDER

FOLDER is a checkout of the older commit (`git worktree add --detach FOLDER b1d242f`). A checkpoint of random weights is
converted, and a smaller one exported, by turns, on one thread: by the older code, by this code, and by this code with
`os.fsync` switched off, which the older code did not call. Record and page are written beside this file.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Command, Run, key, make_checkpoint, measure, raw
from benchmarks.record import Record, keep, measured

ROOT = Path(__file__).parents[1]
CODE = ("moeify/files", "moeify/cli/writing.py")
OPTIONS = ("--experts", "3", "--top-k", "2", "--shard-size", "50MB")
_SHIM = "import os; os.fsync = lambda _: None; from moeify.cli import main; main()"
_PLAIN = "from moeify.cli import main; main()"


def commands(old: Path, work: Path) -> dict[str, list[Command]]:
    """The three ways of each task, by the task's name."""
    convert = ("convert", make_checkpoint("llama-1b", work / "dense", layers=2, hidden=1024), work / "moe", *OPTIONS)
    smaller = make_checkpoint("llama-1b", work / "smaller", layers=4, hidden=512)
    subprocess.run([sys.executable, "-m", "moeify", "convert", smaller, work / "small-moe", *OPTIONS], check=True)
    export = ("export", work / "small-moe", work / "onnx/model.onnx")
    found = {}
    for task, arguments in {"convert": convert, "export": export}.items():
        out = work / {"convert": "moe", "export": "onnx"}[task]
        ways = {"before": (old, _PLAIN), "now, no fsync": (ROOT, _SHIM), "now": (ROOT, _PLAIN)}
        found[task] = [
            Command(f"{task}: {way}", ("env", f"PYTHONPATH={root}", sys.executable, "-c", program, *arguments), out)
            for way, (root, program) in ways.items()
        ]
    return found


def turns(ways: list[Command], rounds: int) -> dict[str, list[Run]]:
    """Run the ways of a task by turns, in a random order."""
    runs: dict[str, list[Run]] = {way.name: [] for way in ways}
    for number in range(rounds + 1):
        for way in random.sample(ways, len(ways)):
            run = measure(way)
            if number:  # the first round fills the caches
                runs[way.name].append(run)
    return runs


def summary(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, dict[str, Any]]:
    """Return the medians of the ways of each task, with the ratios to the first way."""
    found = {}
    for ways in runs.values():
        base = next(iter(ways.values()))
        first = {what: median(run[what] for run in base) for what in ("cpu_seconds", "seconds")}
        for name, of_way in ways.items():
            cpu, wall = (median(run[what] for run in of_way) for what in first)
            by_round = [run["cpu_seconds"] / other["cpu_seconds"] for run, other in zip(of_way, base, strict=True)]
            found[key(name)] = {
                "name": name, "runs": len(of_way), "written_mb": of_way[0]["out_bytes"] / 1e6, "cpu_seconds": cpu,
                "cpu_ratio": cpu / first["cpu_seconds"], "cpu_ratio_by_rounds": median(by_round), "seconds": wall,
                "ratio": wall / first["seconds"],
            }  # fmt: skip
    return found


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# What safe outputs cost\n",
        f"{record.what}; {record.against} is before. "
        "Seconds, medians; the first ratio is of the medians, the second the median of the ratios of a round.",
        f"{record.line()}\n",
        "| task | way | runs | written | CPU time | ratio | by rounds | wall time | ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record.summary.values():
        name = row["name"].replace(": ", " | ")
        lines.append(
            "| {} | {runs} | {written_mb:.0f} MB | {cpu_seconds:.2f} | {cpu_ratio:.3f} | {cpu_ratio_by_rounds:.3f} "
            "| {seconds:.2f} | {ratio:.3f} |".format(name, **row)
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    head = ["git", "-C", asked.old, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        ways = commands(asked.old.resolve(), Path(work))
        runs = {task: raw(turns(of_task, asked.rounds)) for task, of_task in ways.items()}
    keep(__file__, measured("`moeify` on one thread", f"commit {commit}", CODE, summary(runs), runs), page)


if __name__ == "__main__":
    main()
