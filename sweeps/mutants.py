"""Change the library in one place at a time and see which changes no test notices: a sample, drawn by a seed.

    python -m sweeps.mutants 150 --seed 0        # go on where the last run stopped; `make mutants` does the same
    python -m sweeps.mutants --again             # run the survivors of the record again, after the tests were mended

Each mutant lives in a copy of the tree. Its tests run near ones first (sweeps/covering_tests.py) and stop at the first
failure. The record is sweeps/mutants.json. What no test can notice stands in sweeps/equivalent_mutants.toml, with its
reason, and is neither run nor counted. (mutmut and cosmic-ray were looked at: the first changes functions only and
wraps each in another, which torch.export would trace; the second runs one test command for all; neither draws a
sample.)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import subprocess
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

from sweeps.covering_tests import CoveringTests
from sweeps.mutation import Mutant, is_another_program, mutants
from sweeps.run_tests import Tree

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "sweeps/mutants.json"
EQUIVALENT = ROOT / "sweeps/equivalent_mutants.toml"

# How often a mutant is drawn from each area; an area that is not named has DEFAULT_WEIGHT.
WEIGHTS = {
    "passes": 24, "passes/matching": 10, "moeify/conversion": 16, "moeify/checkpoint": 16, "moeify/layers": 14,
    "moeify/routers": 8, "moeify/routing": 8, "moeify/planning": 10, "moeify/training": 14, "moeify/export": 16,
    "kernels": 12, "kernels/gpu": 8, "kernels/tools": 2,
}  # fmt: skip
DEFAULT_WEIGHT = 5

Record = dict[str, Any]


def area_of(path: str) -> str:
    """Return the folder of a module: moeify/export, passes, kernels/gpu; "moeify" for its files."""
    return str(Path(*Path(path).parent.parts[:2]))


def sources() -> dict[str, bytes]:
    """The files of the library. moeify/passes and moeify/kernels are links, and are not followed."""
    found = [path for folder in ("moeify", "passes", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    real = [path for path in found if not any(parent.is_symlink() for parent in path.parents)]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in real}


def draw(files: dict[str, bytes], seed: int) -> Iterator[Mutant]:
    """Yield mutants without end but for the code's: one of each line at most, the areas by turns as they weigh.

    A longer sample begins with a shorter one of the same seed.
    """
    lines: dict[str, list[list[Mutant]]] = defaultdict(list)
    for path, source in sorted(files.items()):
        by_line = defaultdict(list)
        for mutant in mutants(path, source):
            by_line[mutant.line].append(mutant)
        lines[area_of(path)] += by_line.values()
    for area, found in sorted(lines.items()):
        random.Random(f"{seed} {area}").shuffle(found)
    taken = dict.fromkeys(sorted(lines), 0)
    while left := [area for area in taken if lines[area]]:
        area = max(left, key=lambda area: WEIGHTS.get(area, DEFAULT_WEIGHT) / (2 * taken[area] + 1))
        taken[area] += 1
        choices = lines[area].pop()
        mutant = random.Random(f"{seed} {choices[0].path} {choices[0].line}").choice(choices)
        if is_another_program(mutant.apply(files[mutant.path]), files[mutant.path]):
            yield mutant


def tree_digest() -> str:
    """A digest of the library and its tests: results of another tree are not gone on with."""
    digest = hashlib.sha256()
    for folder in ("moeify", "passes", "kernels", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(args: argparse.Namespace) -> Record:
    """Return the record to go on with, or a new one."""
    old: Record = json.loads(args.record.read_text()) if args.record.exists() else {}
    same = old.get("tree") == tree_digest() and old.get("seed") == args.seed
    if args.again or same:
        return {**old, "tree": tree_digest()}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"tree": tree_digest(), "commit": commit.stdout.strip(), "seed": args.seed,
            "seconds": {"mutant": args.limit, "test": args.per_test}, "mutants": {}}  # fmt: skip


def write_record(path: Path, record: Record) -> None:
    """Write the record whole."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def judge(mutant: Mutant, tree: Tree, covering: CoveringTests, args: argparse.Namespace) -> Record:
    """Run the tests on one mutant, in a tree that is the same afterwards."""
    file, started = tree.folder / mutant.path, time.monotonic()
    source = file.read_bytes()
    file.write_bytes(mutant.apply(source))
    try:
        outcome = tree.run(covering.stages(mutant.path), args.limit, args.per_test)
    finally:
        file.write_bytes(source)
    status = {"passed": "survived", "failed": "killed"}.get(outcome.status, outcome.status)
    return {"line": mutant.line, "kind": mutant.kind, "status": status, "by": outcome.by,
            "all tests": outcome.complete, "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def run_all(todo: list[Mutant], record: Record, args: argparse.Namespace) -> None:
    """Judge mutants, several at a time, and write each result at once; then run the killing tests on unchanged code."""
    covering, trees = CoveringTests(ROOT, list(sources())), queue.SimpleQueue[Tree]()

    def work(mutant: Mutant) -> Record:
        tree = trees.get()
        try:
            return judge(mutant, tree, covering, args)
        finally:
            trees.put(tree)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for index in range(args.jobs):
            trees.put(Tree(ROOT, Path(folder) / str(index)))
        jobs = {pool.submit(work, mutant): mutant for mutant in todo}
        for count, job in enumerate(as_completed(jobs), start=1):
            result = record["mutants"][jobs[job].key] = job.result()
            write_record(args.record, record)
            print(f"{count}/{len(todo)} {result['status']} in {result['seconds']} s: {jobs[job].key}", flush=True)
        killers = {entry["by"] for entry in record["mutants"].values() if "::" in entry["by"]}
        record["fail on unchanged code"] = sorted(trees.get().failing(sorted(killers)) & killers)
        write_record(args.record, record)


def summary(record: Record, equivalent: dict[str, str]) -> str:
    """A table by area, and what survived."""
    areas: dict[str, Counter[str]] = defaultdict(Counter, {"all": Counter()})
    survivors, broken = [], set(record["fail on unchanged code"])
    for key, entry in record["mutants"].items():
        if key in equivalent or entry["by"] in broken:
            continue
        for area in (area_of(key.partition(" ")[0]), "all"):
            areas[area][entry["status"]] += 1
        if entry["status"] == "survived":
            survivors.append(f"{key} (line {entry['line']}{'' if entry['all tests'] else ', the time was up'})")
    head = ("killed", "timed out", "survived")
    lines = [f"{'area':24}" + "".join(f"{name:>11}" for name in (*head, "score"))]
    for area, counts in sorted(areas.items(), key=lambda item: (item[0] == "all", item[0])):
        score = f"{1 - counts['survived'] / counts.total():.0%}" if counts.total() else "-"
        lines.append(f"{area:24}" + "".join(f"{counts[name]:11}" for name in head) + f"{score:>11}")
    notes = [f"fails on unchanged code, so its kills do not count: {test}" for test in sorted(broken)]
    return "\n".join([*lines, *notes, "", "survived:", *survivors])


def main() -> None:
    """Draw, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=150, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run the survivors of the record again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at the same time")
    parser.add_argument("--limit", type=int, default=900, help="seconds for a mutant")
    parser.add_argument("--per-test", type=int, default=180, help="seconds for one test")
    parser.add_argument("--record", type=Path, default=RECORD)
    args = parser.parse_args()
    equivalent: dict[str, str] = tomllib.loads(EQUIVALENT.read_text())
    record = read_record(args)
    done = record["mutants"]
    if args.again:
        survived = {key for key, entry in done.items() if entry["status"] == "survived"}
        todo = [m for path, source in sources().items() for m in mutants(path, source) if m.key in survived]
        for key in survived - {mutant.key for mutant in todo}:
            del done[key]  # the code has changed there
    else:
        todo = [mutant for mutant in islice(draw(sources(), args.seed), args.count) if mutant.key not in done]
    run_all([mutant for mutant in todo if mutant.key not in equivalent], record, args)
    print(summary(record, equivalent))


if __name__ == "__main__":
    main()
