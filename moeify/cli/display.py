"""Tables and numbers for people, on stdout or stderr."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeify.cli.options import silent
from moeify.errors import printable
from moeify.names import folded, quantity

if TYPE_CHECKING:
    from moeify.contract.found import FoundLayer
    from moeify.conversion.cost import Cost
    from moeify.passes.ffn import Inspection
    from moeify.plan import Plan

_WHOLE = "(the model itself)"


class _PlainConsole(Console):
    """A console that prints strings as they are: no markup, no escape codes, each on one line."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is printed of a string, or of a cell of a table."""
        return super().render_str(printable(text), **options)


def stdout() -> Console:
    """Return a console for results."""
    return _PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Return a console for progress and notes, which --quiet silences."""
    return _PlainConsole(stderr=True, quiet=silent(), markup=False, emoji=False, highlight=False, soft_wrap=True)


def warnings() -> Console:
    """Return a console for what must be seen."""
    return _PlainConsole(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def moe_lines(layers: Mapping[str, FoundLayer]) -> list[str]:
    """Return what the MoE layers are, one line for equal ones."""
    alike: dict[str, list[str]] = {}
    for path, layer in layers.items():
        size = f"{layer.num_experts} experts of intermediate size {layer.intermediate}, top-{layer.top_k or '?'}"
        shared = f", shared experts of {layer.shared_intermediate}" if layer.shared_intermediate else ""
        alike.setdefault(f"{size}{shared}, router {layer.kind}", []).append(path or _WHOLE)
    return [f"{folded(paths)} ({len(paths)} layers): {form}" for form, paths in alike.items()]


def inspection_table(inspection: Inspection) -> Table:
    """Return the FFNs, one row for equal ones."""
    table = plain_table("FFNs", "where", "kind", "activation", "hidden", "intermediate")
    table.columns[1].overflow = "fold"
    alike: dict[tuple[object, ...], list[str]] = {}
    for ffn in inspection.ffns:
        facts = (ffn.kind, ffn.activation, ffn.hidden, ffn.intermediate)
        alike.setdefault(facts, []).append(ffn.name or _WHOLE)
    for form, names in alike.items():
        table.add_row(str(len(names)), folded(names), *map(str, form))
    return table


def refusal_lines(inspection: Inspection) -> list[str]:
    """Return the look-alikes of an FFN, one line for each reason."""
    return [f"{folded(names)}: {reason}" for reason, names in inspection.reasons().items()]


def wrapped(texts: Iterable[str], width: int, most: int | None = None) -> list[str]:
    """Return texts in lines of a width; `most` is how many lines each may have."""
    return [
        line
        for text in texts
        for line in textwrap.wrap(printable(text), width, subsequent_indent="  ", max_lines=most, placeholder=" …")
    ]


def fit(sections: Iterable[Sequence[str]], most: int) -> list[str]:
    """Return sections of lines, with empty lines between them, cut to a number of lines, the longest ones first."""
    kept = [list(section) for section in sections if section]
    cut = 0
    while sum(map(len, kept)) + len(kept) + (cut > 0) > most and max(map(len, kept)) > 1:
        max(kept, key=len).pop()
        cut += 1
    lines = [line for section in kept for line in (*section, "")][:-1]
    return [*lines, f"… and {cut} lines more: --all shows them"] if cut else lines


def cost_table(rows: Iterable[tuple[str, Cost]]) -> Table:
    """Return the costs of several models side by side."""
    table = plain_table("", "parameters", "active per token", "checkpoint", "FLOPs per token")
    for label, cost in rows:
        table.add_row(
            label, quantity(cost.parameters), quantity(cost.active), quantity(cost.bytes, "B"), quantity(cost.flops)
        )
    return table


def plan_table(plan: Plan) -> Table:
    """Return the sites of a plan."""
    table = plain_table("layer", "experts", "of", "activation", "hidden", "intermediate")
    for site in plan.sites:
        experts = f"{plan.config.experts}, top-{plan.config.top_k}"
        table.add_row(site.path, experts, site.kind, site.activation, str(site.hidden), str(site.intermediate))
    return table


def plain_table(*columns: str) -> Table:
    """Return an empty table without lines around it."""
    return Table(*columns, box=None, pad_edge=False)
