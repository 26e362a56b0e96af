"""The page of what engines do with native checkpoints, from its record."""

from __future__ import annotations

from collections.abc import Sequence

from moeify.families.table import FAMILIES
from sweeps.engines.faults import fault_of
from sweeps.engines.prepare import WIDE
from sweeps.engines.record import ENGINES, REFUSED, RIGHT, SGLANG_LOADER, UNKNOWN, WRONG, Row
from sweeps.models import DOCS

PAGE = DOCS / "engines.md"
LONGEST = 160  # characters of what an engine says


def table(rows: Sequence[Row]) -> str:
    """Return the page."""
    known = [engine for engine in ENGINES if any(row.engine == engine for row in rows)]
    versions = {row.engine: row.version for row in rows if row.version}
    wrong = [row for row in rows if row.result in {WRONG, REFUSED}]
    lines = [
        "# Engines",
        "",
        "Unmodified engines, run on the CPU on native checkpoints that `moeify convert` wrote: tiny random models in",
        "float32, 4 experts, top-2, 256 positions. With experts that are copies the logits are compared with the dense",
        "model's in transformers, with experts that differ with those of the same checkpoint in transformers (of",
        f"{', '.join(WIDE)} in float64, from which its float32 is 1.6e-5 away). A number is the largest difference,",
        f"relative to the largest logit; up to 1e-5 is {RIGHT}. vLLM says the 20 largest",
        "logits of each position; llama.cpp runs what its own converter makes; onnxruntime-genai runs the folder that",
        "`moeify export` writes. SGLang's kernels need a GPU: its loader alone is run, and its number is the relative",
        "difference of the sums of squares of what it loaded and what is stored; no weight may stay unwritten.",
        "`make engines` runs all and writes this page from docs/engines.json.",
        "",
        *(f"- {engine} {versions.get(engine, '')}" for engine in known),
        "",
        f"| family | {' | '.join(known)} |",
        f"|---|{'---|' * len(known)}",
        *(f"| {name} | {' | '.join(cell(rows, name, engine) for engine in known)} |" for name in FAMILIES),
        "",
        "## Not right",
        "",
        "| engine | family | source | what came of it | where |",
        "|---|---|---|---|---|",
        *(f"| {row.engine} | {row.family} | {row.source} | {_came(row)} | {_where(row)} |" for row in wrong),
        "",
        "## Measured",
        "",
        "| family | source | engine | copies | differing |",
        "|---|---|---|--:|--:|",
        *(f"| {row.family} | {row.source} | {row.engine} | {_number(row.copies)} | {_number(row.differing)} |"
          for row in rows if row.result in {RIGHT, WRONG} and row.engine != SGLANG_LOADER),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def cell(rows: Sequence[Row], family: str, engine: str) -> str:
    """Return what an engine does with a family: the largest difference of all sources, or what else there is."""
    here = [row for row in rows if (row.family, row.engine) == (family, engine)]
    found = {result: [row for row in here if row.result == result] for result in (RIGHT, WRONG, REFUSED, UNKNOWN)}
    right, parts = found[RIGHT], []
    if right:
        numbers = [value for row in right for value in (row.copies, row.differing) if value is not None]
        parts.append(f"{RIGHT}{f', {max(numbers):.1e}' if numbers else ''}")
    for result in (WRONG, REFUSED):
        if found[result]:
            sources = f" from {', '.join(row.source for row in found[result])}" if right else ""
            parts.append(f"**{result}**{sources}")
    return "; ".join(parts) or (UNKNOWN if found[UNKNOWN] else "not run")


def _came(row: Row) -> str:
    numbers = f"{_number(row.copies)}, {_number(row.differing)}"
    said = row.why if len(row.why) <= LONGEST else f"{row.why[:LONGEST]}…"
    return (said or f"{row.result}: {numbers}").replace("|", "\\|").replace("<", "&lt;")


def _where(row: Row) -> str:
    fault = fault_of(row)
    return f"{fault.where}: {fault.what}" if fault else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
