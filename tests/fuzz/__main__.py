"""Damaged and hostile inputs by the thousand: what moeify does with them, counted.

python -m tests.fuzz                          4000 cases, a table, and docs/fuzz.json
python -m tests.fuzz --cases 200 --seed 7     fewer, others; without --write no record
python -m tests.fuzz --group config           one group
python -m tests.fuzz --case "config:17"       one case again, with all that it says
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeify.cli import main
from tests.fuzz.commands import BASE
from tests.fuzz.groups import GROUPS
from tests.fuzz.run import Result, run_case, table
from tests.fuzz.sources import source

RECORD = Path(__file__).resolve().parents[2] / "docs/fuzz.json"


def prepare() -> None:
    """Do what children do once, without threads: they share what it loads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        for arguments in (["convert", str(source("llama")), f"{folder}/moe", *BASE],
                          ["verify", str(source("llama")), f"{folder}/moe"]):  # fmt: skip
            main(arguments, standalone_mode=False)


def write(seed: int, results: dict[str, list[Result]]) -> None:
    """Keep the counts and whatever went wrong."""
    counts = {
        group: {outcome: sum(one.outcome == outcome for one in found) for outcome in sorted({r.outcome for r in found})}
        for group, found in results.items()
    }
    wrong = [one.report(seed) for found in results.values() for one in found if not one.right]
    keep({"seed": seed, "cases": counts, "wrong": wrong})


def keep(entries: dict[str, object]) -> None:
    """Put entries into the record; the others stay as they are."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps({**record, **entries}, indent=1, ensure_ascii=True) + "\n")


def again(seed: int, name: str) -> int:
    """Run one case and show all of it."""
    group, _, number = name.rpartition(":")
    result, outcome = run_case(seed, group, int(number), check=True)
    print(f"{result.case}\n--- stdout\n{outcome.stdout}--- stderr\n{outcome.stderr}---")
    print(f"{result.outcome}: {result.reason or 'right'}; exit code {outcome.code}, at {outcome.where or 'no place'}, "
          f"{result.seconds:.1f} s of CPU time, {outcome.growth / 1e6:.0f} MB")  # fmt: skip
    return int(not result.right)


def fuzz() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=4000, help="in all groups together")
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--case", metavar="GROUP:NUMBER")
    parser.add_argument("--write", action="store_true", help="write docs/fuzz.json")
    parser.add_argument("--log", type=Path, help="write a line of JSON for every case")
    asked = parser.parse_args()
    prepare()
    if asked.case:
        return again(asked.seed, asked.case)
    names = [asked.group] if asked.group else list(GROUPS)
    share = asked.cases / sum(GROUPS[name].quick for name in names)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for name in names:
        for number in range(round(GROUPS[name].quick * share)):
            result, _ = run_case(asked.seed, name, number)
            results[name].append(result)
            if not result.right:
                print(result.report(asked.seed), flush=True)
            if asked.log:
                with asked.log.open("a") as log:
                    log.write(json.dumps([result.outcome, result.reason, str(result.case), result.where, result.line,
                                          round(result.seconds, 2)]) + "\n")  # fmt: skip
    print("\n".join(table(results)))
    if asked.write:
        write(asked.seed, results)
    return int(any(not one.right for found in results.values() for one in found))


if __name__ == "__main__":
    sys.exit(fuzz())
