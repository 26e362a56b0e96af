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
from pathlib import Path

from tests.fuzz.groups import GROUPS
from tests.fuzz.run import Result, run_case, table

RECORD = Path(__file__).resolve().parents[2] / "docs/fuzz.json"


def prepare() -> None:
    """Load what every child needs, once, without threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    from moeify.cli import convert, export, inspect, run, verify  # noqa: F401  # what they import, children share
    from moeify.conversion.checkpoint import convert_checkpoint  # noqa: F401
    from moeify.proving.proof import verify_checkpoints  # noqa: F401


def write(seed: int, results: dict[str, list[Result]]) -> None:
    """Keep the counts and whatever went wrong."""
    counts = {
        group: {outcome: sum(one.outcome == outcome for one in found) for outcome in sorted({r.outcome for r in found})}
        for group, found in results.items()
    }
    wrong = [one.report(seed) for found in results.values() for one in found if not one.right]
    RECORD.write_text(json.dumps({"seed": seed, "cases": counts, "wrong": wrong}, indent=1, ensure_ascii=True) + "\n")


def again(seed: int, name: str) -> int:
    """Run one case and show all of it."""
    group, _, number = name.rpartition(":")
    result, outcome = run_case(seed, group, int(number), check=True)
    print(f"{result.case}\n--- stdout\n{outcome.stdout}--- stderr\n{outcome.stderr}---")
    print(f"{result.outcome}: {result.reason or 'right'}; exit code {outcome.code}, {result.seconds:.1f} s of CPU time, "
          f"{outcome.growth / 1e6:.0f} MB, at {outcome.where or 'no place in moeify'}")  # fmt: skip
    return int(not result.right)


def main() -> int:
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
    sys.exit(main())
