"""Run the checks of every tool on every model, and write docs/ecosystem.json and docs/ecosystem.md.

    python -m sweeps.ecosystem                     everything (half an hour)
    python -m sweeps.ecosystem trl peft            some tools, or checks, again: the other rows stay
    python -m sweeps.ecosystem peft --model gpt2   with one model
    python -m sweeps.ecosystem --page              only write the page

Each check runs in a process of its own, in the environment that holds its tool, and has a deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

from sweeps.ecosystem import (
    with_accelerate,
    with_auto_round,
    with_bitsandbytes,
    with_llmcompressor,
    with_modelopt,
    with_optimum,
    with_peft,
    with_smollm2,
    with_torchao,
    with_trl,
)
from sweeps.ecosystem.check import FAILS, Check, Row, find, outcome, row
from sweeps.ecosystem.models import MODELS, Subject, prepare
from sweeps.ecosystem.page import table
from sweeps.models import DOCS

RECORD, PAGE = DOCS / "ecosystem.json", DOCS / "ecosystem.md"
ROOT = DOCS.parent
ENVIRONMENTS = {"main": ".venv-ecosystem", "llmcompressor": ".venv-ecosystem-llmcompressor"}
TOOLS = (with_trl, with_peft, with_smollm2, with_accelerate, with_llmcompressor, with_auto_round, with_torchao,
         with_modelopt, with_bitsandbytes, with_optimum)  # fmt: skip
CHECKS = tuple(check for tool in TOOLS for check in tool.CHECKS)
SECONDS = 900


def run(check: Check, model: str, models: Path, python: Path) -> Row:
    """Run a check in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), "-m", "sweeps.ecosystem", "--check", check.name, "--model", model,
                   "--models", str(models), "--scratch", scratch]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
                       "PYTHONWARNINGS": "ignore"}  # fmt: skip
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return row(check, model, FAILS, "", f"not done after {SECONDS} seconds", SECONDS)
    written = [line for line in done.stdout.splitlines() if line.startswith('{"tool"')]
    if not written:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return row(check, model, FAILS, "", f"the process ended with {done.returncode}: {said}", 0)
    return Row(**json.loads(written[-1]))


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tools", nargs="*", help="distributions; all of them without")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--models", type=Path, default=ROOT / ".venv-ecosystem/models", help="where the models lie")
    parser.add_argument("--environments", type=Path, default=ROOT, help="the folder that holds the environments")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--check", help=argparse.SUPPRESS)  # in the process of the check
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.check:
        subject = Subject(given.model, given.models / given.model, given.scratch)
        print(json.dumps(asdict(outcome(find(CHECKS, given.check), subject))), flush=True)
        return
    if not given.page:
        run_all(given)
    PAGE.write_text(table(read_record()))


def run_all(given: argparse.Namespace) -> None:
    """Run the checks that are asked for, one after the other, and keep each outcome in the record."""
    asked = [(check, model) for check in CHECKS for model in check.models
             if (not given.tools or {check.tool, check.name} & set(given.tools)) and given.model in {None, model}
             ]  # fmt: skip
    prepare(given.models, sorted({model for _, model in asked}))
    for check, model in asked:
        python = given.environments / ENVIRONMENTS[check.environment] / "bin/python"
        new = run(check, model, given.models, python)
        keep(new)
        print(check.tool, check.name, model, *filter(None, [new.result, new.line, new.why]), sep=" | ", flush=True)


def keep(new: Row) -> None:
    """Put a row in its place in the record; rows of checks that are gone are dropped."""
    held = {(row.tool, row.done, row.model): row for row in [*read_record(), new]}
    places = [(check.tool, check.done, model) for check in CHECKS for model in check.models]
    rows = [asdict(held[place]) for place in places if place in held]
    RECORD.write_text(json.dumps(rows, indent=1) + "\n")


def read_record() -> list[Row]:
    """Read what was run."""
    return [Row(**entry) for entry in json.loads(RECORD.read_text())] if RECORD.exists() else []


if __name__ == "__main__":
    main()
