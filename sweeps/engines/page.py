"""The page of what engines do with native checkpoints, from its record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeify.families.table import FAMILIES
from sweeps.engines.faults import fault_of
from sweeps.engines.prepare import WIDE
from sweeps.engines.record import ENGINES, REFUSED, RIGHT, SGLANG_LOADER, UNKNOWN, WRONG, Row
from sweeps.models import DOCS

PAGE = DOCS / "engines.md"
LONGEST = 160  # characters of what an engine says
FEW = 2  # sources that a cell names


def table(rows: Sequence[Row]) -> str:
    """Return the page."""
    known = [engine for engine in ENGINES if any(row.engine == engine for row in rows)]
    versions = {row.engine: row.version for row in rows if row.version}
    lines = [
        "# Engines",
        "",
        "Unmodified engines, run on the CPU on native checkpoints that `moeify convert` wrote: tiny random models in",
        "float32, 4 experts, top-2, 256 positions. With experts that are copies the logits are compared with the dense",
        "model's in transformers, with experts that differ with those of the same checkpoint in transformers (of",
        f"{', '.join(WIDE)} in float64, from which its float32 is 1.6e-5 away). A number is the largest difference,",
        f"relative to the largest logit; up to 1e-5 is {RIGHT}. vLLM says the 20 largest",
        "logits of each position; llama.cpp runs what its own converter makes, with tokenizers that it takes;",
        "onnxruntime-genai runs the folder that `moeify export` writes. SGLang's kernels need a GPU: its loader alone",
        "is run, and its number is the relative",
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
        "| engine | family | from | what came of it | where |",
        "|---|---|---|---|---|",
        *_faults(rows),
        "",
        "## Measured",
        "",
        "Copies / differing; of SGLang's loader whether it is right. A dash was not run.",
        "",
        f"| family | source | {' | '.join(known)} |",
        f"|---|---|{'---|' * len(known)}",
        *_measured(rows, known),
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
            sources = [row.source for row in found[result]]
            named = ", ".join(sources) if len(sources) <= FEW else f"{len(sources)} sources"
            parts.append(f"**{result}**{f' from {named}' if right else ''}")
    return "; ".join(parts) or (UNKNOWN if found[UNKNOWN] else "not run")


def _faults(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for what each engine does with a family for one reason."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.result in {WRONG, REFUSED}:
            groups.setdefault((row.engine, row.family, _where(row)), []).append(row)
    for (engine, family, where), alike in groups.items():
        yield f"| {engine} | {family} | {', '.join(row.source for row in alike)} | {_came(alike)} | {where} |"


def _came(alike: Sequence[Row]) -> str:
    """Return what an engine says, or the largest differences."""
    said = next((row.why for row in alike if row.why), "")
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
    numbers = [[value for value in column if value is not None] for column in
               zip(*((row.copies, row.differing) for row in alike), strict=True)]  # fmt: skip
    worst = ", ".join(_number(max(column, default=None)) for column in numbers)
    return (said or f"{alike[0].result}: {worst}").replace("|", "\\|").replace("<", "&lt;")


def _where(row: Row) -> str:
    fault = fault_of(row)
    return f"{fault.where}: {fault.what}" if fault else ""


def _measured(rows: Sequence[Row], known: Sequence[str]) -> Iterator[str]:
    """Yield a line for each family and source."""
    places = {(row.family, row.source, row.engine): row for row in rows}
    for family, source in dict.fromkeys((row.family, row.source) for row in rows):
        told = (_told(places.get((family, source, engine))) for engine in known)
        yield f"| {family} | {source} | {' | '.join(told)} |"


def _told(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.result in {UNKNOWN, REFUSED} or row.engine == SGLANG_LOADER:
        return row.result
    numbers = f"{_number(row.copies)} / {_number(row.differing)}"
    return numbers if row.result == RIGHT else f"**{numbers}**"


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.1e}"
