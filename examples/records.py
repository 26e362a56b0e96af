"""Records of what the examples measured: JSON beside each example, with what is needed to measure it again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parents[1]
NAME = "record.json"
PACKAGES = ("moeify", "torch", "transformers")


def about(folder: Path) -> dict[str, Any]:
    """Versions, machine, date, commit and command of the example in a folder, as it runs now."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", "-m", f"examples.{folder.name}.run", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("moeify", "torch", "transformers")},
        },
        "commit": git.stdout.strip(),
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    beside.replace(path)


def keep(folder: Path, seed: int, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Put the table of a seed into an example's record, beside those of the other seeds."""
    path = folder / NAME
    record = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
    table = [dict(zip(header, row, strict=True)) for row in rows]
    record["seeds"][str(seed)] = {**about(folder), "rows": table}
    write_json(path, record)
