"""Records of what the examples measured: JSON beside each example, with what is needed to measure it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import about

ROOT = Path(__file__).resolve().parents[1]
NAME = "record.json"


def code_of(folder: Path) -> tuple[str, str]:
    """Return what the numbers of an example speak of."""
    return str(folder / "run.py"), "moeify"


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
    record["seeds"][str(seed)] = {**about(code_of(folder)), "rows": table}
    write_json(path, record)
