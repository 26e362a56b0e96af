"""Fill the numbers of texts in from records, and check them.

    python -m sweeps.claims             write every claim as its record has it
    python -m sweeps.claims --check     only say what differs, and which records are too old; exit code 1 if any

A claim is a link whose text is the number and whose target is the record and a name in it, such as
`[0.61](benchmarks/convert_vs_mergekit.json#mergekit_moe.time)`: readers see the number and can follow it. Names are
looked up in the record's summary, then in the record. The text itself says how many digits are written.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLAIM = re.compile(r"\[([^][]+)\]\(([^()#\s]+\.json)#([^()\s]+)\)")
NUMBER = re.compile(r"-?[\d,]*\d(?:\.(?P<digits>\d+))?(?P<power>e[+-]?\d+)?")
HELD = {"README.md": "Numbers"}  # sections whose tables hold no number but claims in their last columns
DAYS = 30  # by which the newest commit of the code may be younger than the record

# Records that do not say themselves which code they speak of; their date is that of their last commit.
CODE = {
    "docs/ecosystem.json": ("moeify/contract", "moeify/hub"),
    "docs/engines.json": ("moeify/families",),
    "docs/families.json": ("moeify/families",),
    "docs/fuzz.json": ("moeify/checkpoint", "moeify/files", "moeify/cli"),
    "docs/gpu.jsonl": ("kernels/gpu",),
}


class ClaimError(Exception):
    """A claim names a record or a number that is not there."""


def pages() -> list[Path]:
    """Return every text of the repository that may hold claims."""
    found = chain(ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in ("docs", "benchmarks", "examples")))
    return sorted(found)


def records() -> list[Path]:
    """Return every record: those that say which code they speak of, and those of the table."""
    found = chain(*((ROOT / name).rglob("*.json") for name in ("docs", "benchmarks", "examples")))
    saying = {path for path in found if "code" in json.loads(path.read_text())}
    return sorted(saying | {ROOT / name for name in CODE if (ROOT / name).exists()})


def filled(text: str, folder: Path) -> str:
    """Return a text with every claim as its record has it.

    Args:
        text: The text, in Markdown.
        folder: Where it lies: links count from there.

    Raises:
        ClaimError: There is no such record, or no such number in it.
    """

    def link(found: re.Match[str]) -> str:
        said, file, name = found.groups()
        return f"[{written(value(folder / file, name), said)}]({file}#{name})"

    return CLAIM.sub(link, text)


def value(path: Path, name: str) -> str | float:
    """Return what a record has under a name such as `layers_80.seconds`, or `rows.0.loss` in a list.

    Raises:
        ClaimError: There is no such record, or no such number in it.
    """
    if not path.is_file():
        raise ClaimError(f"there is no record {path}")
    at: Any = json.loads(path.read_text())
    if isinstance(at, dict) and name.partition(".")[0] in at.get("summary", ()):
        at = at["summary"]
    for part in name.split("."):
        at = _child(at, part)
    if not isinstance(at, (str, int, float)):
        raise ClaimError(f"{path} has no number {name}")
    return at


def _child(tree: Any, name: str) -> Any:
    if isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
        return tree[int(name)]
    return tree.get(name) if isinstance(tree, dict) else None


def written(number: str | float, said: str) -> str:
    """Return a number in the form of what stands in the text: its digits, commas and powers of ten."""
    form = NUMBER.fullmatch(said)
    if isinstance(number, str) or form is None:
        return str(number)
    digits = len(form["digits"] or "")
    if form["power"]:
        return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{number:.{digits}e}").replace("e+", "e")
    return f"{number:{',' if ',' in said else ''}.{digits}f}"


def unclaimed(text: str) -> list[str]:
    """Return the numbers in the last columns of a section's tables, and in what stands between them, of no record."""
    found = []
    for line in CLAIM.sub("", text).splitlines():
        cells = line.strip().strip("|").split("|")
        found += re.findall(r"(?<![\w.-])\d[\w.,]*(?:-\d+)?", " ".join(cells[1:] or cells))
    return found


def stale(path: Path) -> str | None:
    """Return why a record is too old for the code it speaks of, or None; without the history nothing is judged."""
    if code := CODE.get(_name(path)):
        made = last_change(path.parent, path.name)
    else:
        record = json.loads(path.read_text())
        code, made = record["code"], date.fromisoformat(record["date"][:10])
    newest = last_change(ROOT, *code)
    if made is None or newest is None or (newest - made).days <= DAYS:
        return None
    return f"{_name(path)} is of {made}, and {', '.join(code)} changed on {newest}: measure it again"


def last_change(folder: Path, *paths: str) -> date | None:
    """Return the date of the last commit that touched one of some paths; None where the history is not whole."""
    git = ["git", "-C", str(folder)]
    try:
        shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True)
        if shallow.stdout.strip() != "false":
            return None
        said = subprocess.run([*git, "log", "-1", "--format=%cs", "--", *paths], capture_output=True, text=True)
    except OSError:
        return None
    return date.fromisoformat(said.stdout.strip()) if said.stdout.strip() else None


def faults() -> Iterator[str]:
    """Yield what differs between texts and records, numbers of no record, and records that are too old."""
    for page in pages():
        text = page.read_text()
        try:
            right = filled(text, page.parent)
        except ClaimError as error:
            yield f"{_name(page)}: {error}"
            continue
        for said, held in zip(text.splitlines(), right.splitlines(), strict=True):
            if said != held:
                yield f"{_name(page)} says\n  {said}\nand the records\n  {held}\npython -m sweeps.claims writes it"
        if section := HELD.get(_name(page)):
            inside = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
            yield from (f"{_name(page)}: {number} in {section!r} is of no record" for number in unclaimed(inside))
    yield from filter(None, map(stale, records()))


def main(arguments: list[str]) -> int:
    """Fill in, or check; return the exit code."""
    if arguments == ["--check"]:
        found = list(faults())
        print(*found or ["every number is that of its record"], sep="\n")
        return bool(found)
    for page in pages():
        page.write_text(filled(page.read_text(), page.parent))
    return 0


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
