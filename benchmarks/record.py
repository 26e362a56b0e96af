"""Records of what was measured: JSON files, which pages and the numbers of texts are filled in from.

    python -m benchmarks.record    writes the pages of this folder again, from their records

Nothing here imports torch: `measure.py` says why.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moeify", "torch", "transformers")


@dataclass(frozen=True)
class Record:
    """What one run of a program measured.

    Attributes:
        what: What was measured.
        against: What it was measured beside.
        machine: Where.
        date: When, as 2026-11-27.
        commit: Of the code that ran.
        command: What was typed.
        versions: Of the packages that had a part in it.
        code: Paths of the repository that the numbers speak of.
        summary: The numbers that pages and texts say, as a tree by names.
        runs: What the summary was computed from.
        note: What else must be known, such as raw runs that were not kept.
    """

    what: str
    against: str
    machine: str
    date: str
    commit: str
    command: str
    versions: Mapping[str, str]
    code: Sequence[str]
    summary: Mapping[str, Any]
    runs: Any
    note: str = ""

    def line(self) -> str:
        """Return where and when this was measured, for a page."""
        at = f" of commit {self.commit}" if self.commit else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        note = f"\n{self.note}" if self.note else ""
        return f"Measured on {self.date}{at}, on {self.machine}, by\n`{self.command}`, with {versions}.{note}"


def measured(
    what: str, against: str, code: Sequence[str], summary: Mapping[str, Any], runs: Any, *,
    packages: Sequence[str] = (), versions: Mapping[str, str] | None = None,
) -> Record:  # fmt: skip
    """Return the record of what this program has just measured.

    Args:
        what: What was measured.
        against: What it was measured beside.
        code: Paths of the repository that the numbers speak of.
        summary: The numbers that pages and texts say.
        runs: What they were computed from.
        packages: Further packages of this environment whose versions count.
        versions: Versions of what runs in another environment.
    """
    here = about(code, packages)
    here["versions"] |= dict(versions or {})
    return Record(what, against, **here, code=list(code), summary=summary, runs=runs)


def about(code: Sequence[str], packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return machine, date, commit, command and versions of this program as it runs now; see `measured`."""
    return {
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(code),
        "command": _command(),
        "versions": {name: _version(name) for name in (*PACKAGES, *packages)},
    }


def write(record: Record, path: Path) -> None:
    """Write a record: a line for each mapping that holds no further one."""
    path.write_text(_text({name: value for name, value in asdict(record).items() if value != ""}) + "\n")


def read(path: Path) -> Record:
    """Read a record."""
    held = json.loads(path.read_text())
    return Record(**{field.name: held.get(field.name, "") for field in fields(Record)})


def keep(program: str, record: Record, page: Callable[[Record], str]) -> None:
    """Write a record and its page beside a program, and print the page."""
    write(record, Path(program).with_suffix(".json"))
    Path(program).with_suffix(".md").write_text(page(record))
    print(page(record), end="")


def programs() -> list[str]:
    """Return the programs of this folder that have a record, as modules."""
    found = (path.relative_to(ROOT).with_suffix("") for path in Path(__file__).parent.rglob("*.json"))
    return sorted(".".join(path.parts) for path in found)


def record_of(program: str) -> Path:
    """Return the record of a program."""
    return ROOT.joinpath(*program.split(".")).with_suffix(".json")


def rounded(samples: Mapping[str, Sequence[float]], digits: int = 4) -> dict[str, list[float]]:
    """Return samples as a record keeps them."""
    return {name: [float(f"{value:.{digits}g}") for value in values] for name, values in samples.items()}


def _text(value: Any, indent: str = "") -> str:
    if not isinstance(value, dict) or not any(isinstance(each, (dict, list)) for each in value.values()):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + " "
    lines = (f"{inner}{json.dumps(name)}: {_text(each, inner)}" for name, each in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit(code: Sequence[str]) -> str:
    """Return the commit of this checkout, marked where the code in question differs from it; "" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = _said([*git, "rev-parse", "--short", "HEAD"])
        return head + "-dirty" * bool(_said([*git, "status", "--porcelain", "--", *code]))
    except (OSError, subprocess.CalledProcessError):
        return ""


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _command() -> str:
    """Return what was typed, the program as a module of this repository."""
    program = Path(sys.argv[0]).resolve()
    if not program.is_relative_to(ROOT):
        return shlex.join([program.name, *sys.argv[1:]])
    name = ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def main() -> None:
    """Write every page again."""
    for name in programs():
        path = record_of(name)
        path.with_suffix(".md").write_text(import_module(name).page(read(path)))


if __name__ == "__main__":
    main()
