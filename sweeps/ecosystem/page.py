"""The page of what other tools do with converted models, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from sweeps.ecosystem.check import FAILS, WITH_A_LINE, WORKS, Row

LONGEST = 160  # characters of an error


def table(rows: Sequence[Row]) -> str:
    """Return the page."""
    works, lined, fail = (sum(row.result == result for row in rows) for result in (WORKS, WITH_A_LINE, FAILS))
    lines = [
        "# Other tools on converted models",
        "",
        "Unmodified releases, run on the CPU on models that `moeify convert` wrote: Llama, Gemma 3 and GPT-2 in",
        "moeify's format (loaded after `moeify.register()`), Mixtral and Qwen3-MoE as stock transformers has them (no",
        "moeify is imported), all with two layers and random weights; and SmolLM2-135M, every fourth layer 4 experts.",
        "A check fails if what it names is not so: experts that a quantizer passes over, routers that a trainer does",
        "not move, an adapter that computes otherwise elsewhere. `make ecosystem` runs all and writes this page from",
        "docs/ecosystem.json.",
        "",
        f"{len(rows)} runs: {works} work, {lined} work with a line of code, {fail} do not.",
        "",
        "| tool | what is done | model | result | seconds |",
        "|---|---|---|---|--:|",
    ]
    for _, alike in groupby(rows, key=lambda row: (row.tool, row.done, row.result, row.line, row.why, row.issue)):
        lines.append(_line(list(alike)))
    return "\n".join(lines) + "\n"


def _line(rows: list[Row]) -> str:
    """Return the line of runs that differ in their model only."""
    row = rows[0]
    models, seconds = ", ".join(each.model for each in rows), max(each.seconds for each in rows)
    tool = f"{row.tool} {row.version}, transformers {row.transformers}"
    return f"| {tool} | {_cell(row.done)} | {models} | {_result(row)} | {seconds:.0f} |"


def _result(row: Row) -> str:
    if row.result == WORKS:
        return WORKS
    issue = f" ({row.issue})" if row.issue else ""
    why = row.why if len(row.why) <= LONGEST else f"{row.why[:LONGEST]}…"
    with_line = f": `{row.line}`; without it" if row.result == WITH_A_LINE else ""
    return _cell(f"{row.result}{with_line}: {why}{issue}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
