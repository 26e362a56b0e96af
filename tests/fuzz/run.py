"""Running cases and counting how they end."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.fuzz.driver import Outcome, execute
from tests.fuzz.groups import Case, make_case
from tests.fuzz.judge import ACCEPTED, RIGHT, WRONG, judge, state_of, wrong_card

CHECKED = 0.25  # of the outputs are loaded and compared with their source


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        case: What was done.
        outcome: One of `RIGHT` or `WRONG`.
        reason: What is wrong.
        where: The place in moeify where its error came up.
        line: The last line on stderr.
        seconds: Of CPU time.
    """

    case: Case
    outcome: str
    reason: str
    where: str
    line: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.outcome in RIGHT

    def report(self, seed: int) -> str:
        """Say what is wrong, and how to see it again."""
        again = f'python -m tests.fuzz --seed {seed} --case "{self.case.name}"'
        return f"{self.outcome}: {self.reason}\n    {self.case}\n    {self.line}\n    {again}"


def run_case(seed: int, group: str, number: int, *, check: bool | None = None) -> tuple[Result, Outcome]:
    """Make a case, run it and judge it.

    Args:
        seed: Of all cases.
        group: Its group.
        number: Its number in the group.
        check: Whether an output is compared with its source; None for a part of the cases.
    """
    with TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder) / "work"  # its parent is watched, too
        work.mkdir()
        case = make_case(seed, group, number, work)
        before = state_of(Path(folder))
        outcome = execute(case.arguments, work, loads_only=case.loads_only)
        found, reason = judge(outcome, before, state_of(Path(folder)), _targets(case))
        if check is None:
            check = Random(f"check {seed} {case.name}").random() < CHECKED
        if found == ACCEPTED and check and (work / "dst/config.json").exists() and "holds NaN" not in outcome.stderr:
            said = _check(case, work)
            found, reason = ("broken output", said) if said else (found, reason)
        shutil.rmtree(work)
    line = (outcome.stderr.splitlines() or [""])[-1][:300]
    return Result(case, found, reason, outcome.where, line, outcome.seconds), outcome


def _check(case: Case, work: Path) -> str:
    """Load the output strictly, with its card, and compare it with its source; return what is wrong."""
    if said := wrong_card(work / "dst/README.md"):
        return said
    trust = [option for option in ("--allow-pickle", "--trust-remote-code", "--dequantize") if option in case.arguments]
    compared = execute(["verify", case.source.name, "dst", *trust], work)
    return (compared.stderr.splitlines() or ["no reason"])[-1][:300] if compared.code else ""


def _targets(case: Case) -> tuple[str, ...]:
    """What the command of a case may write, from the folder above its own."""
    command, *rest = case.arguments
    if command == "report" and "--output" in rest:
        return ("work/dst",)
    if command not in ("convert", "export") or len(rest) < 2 or "--dry-run" in rest:
        return ()
    above = os.path.realpath(case.source.parent.parent)
    target = Path(os.path.relpath(os.path.realpath(case.source.parent / rest[1]), above))
    parents = tuple(str(parent) for parent in target.parents if parent.name not in ("", "work", ".."))
    return (str(target), f"{target}.data", *parents)


def table(results: dict[str, list[Result]]) -> list[str]:
    """Count the outcomes of each group, a row each."""
    used = {result.outcome for found in results.values() for result in found}
    columns = [outcome for outcome in (*RIGHT, *WRONG) if outcome in used or outcome in RIGHT]
    rows = [["group", "cases", *columns]]
    for group, found in results.items():
        counts = Counter(result.outcome for result in found)
        rows.append([group, str(len(found)), *(str(counts[column] or "") for column in columns)])
    total = Counter(result.outcome for found in results.values() for result in found)
    rows.append(["all", str(total.total()), *(str(total[column] or "") for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
