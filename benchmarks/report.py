"""How long `moeify report` takes on the demo's model, and how large its page is.

    python -m benchmarks.report --work FOLDER

SmolLM2-135M becomes a Mixtral of 8 experts first, which is not counted. `sweeps/report_pages.py` measures how soon a
browser shows a page. Record and page are written beside this file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import GIB, Command, by_turns, measure, medians, need_space, raw
from benchmarks.record import Record, keep, measured
from moeify.cli.demo import model_file

ALONE, WITH_DENSE = "moeify report MOE", "moeify report MOE DENSE"
CODE = ("moeify/report", "moeify/cli/report.py", "moeify/proving")
HEAD = "| command | runs | median time | fastest, slowest | CPU time | memory | page |\n|---|--:|--:|--:|--:|--:|--:|"
ROW = (
    "| `{name}` | {runs} | {seconds:.1f} s | {fastest:.1f} s, {slowest:.1f} s | {cpu_seconds:.1f} s "
    "| {memory_gib:.2f} GiB | {megabytes:.2f} MB |"
)


def compare(work: Path, repeats: int) -> Record:
    """Return what was measured."""
    dense, moe = model_file(), work / "moe"
    options = ("--experts", "8", "--top-k", "2", "--to", "mixtral", "--no-verify")
    measure(Command("moeify convert", (sys.executable, "-m", "moeify", "convert", dense, moe, *options), moe))
    runs = by_turns([report(ALONE, work, moe), report(WITH_DENSE, work, moe, dense)], repeats)
    what = "`moeify report` of SmolLM2-135M as a Mixtral of 8 experts, top-2: 2,048 tokens of Python's documentation"
    return measured(what, "an aim of 60 s and 3 MB", CODE, summary(raw(runs)), raw(runs))


def report(name: str, work: Path, *models: Path) -> Command:
    """Return the command that writes a page, into a folder that it makes."""
    out = work / "out"
    moeify: tuple[str | Path, ...] = (sys.executable, "-m", "moeify", "report", *models, "-o", out / "report.html")
    return Command(name, ("sh", "-c", 'mkdir "$0" && exec "$@"', out, *moeify), out)


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return the medians of each command, with the size of its page."""
    rows = medians(runs, ALONE)
    return {name: {**row, "megabytes": row["written_gib"] * GIB / 1e6} for name, row in rows.items()}


def page(record: Record) -> str:
    """Return the page of a record."""
    rows = "\n".join(ROW.format(**row) for row in record.summary.values())
    return f"# moeify report\n\n{record.what}.\n{record.line()}\n\n{HEAD}\n{rows}\n"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 4 GiB free")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    need_space(args.work, 4)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        keep(__file__, compare(Path(work), args.repeats), page)


if __name__ == "__main__":
    main()
