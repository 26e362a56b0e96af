"""Tables and numbers for people, on stdout or stderr."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeify.errors import printable

if TYPE_CHECKING:
    from moeify.conversion.cost import Cost
    from moeify.passes.ffn import Inspection, Refusal
    from moeify.plan import Plan


class _PlainConsole(Console):
    """A console that prints strings as they are: no markup, no escape codes, each on one line."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is printed of a string, or of a cell of a table."""
        return super().render_str(printable(text), **options)


def stdout() -> Console:
    """Return a console for results."""
    return _PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Return a console for progress and notes."""
    return _PlainConsole(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def quantity(number: float, unit: str = "") -> str:
    """Return 134,515,008 as 134.5M; with a unit, 538060032 as 538.1 MB."""
    for limit, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{' ' * bool(unit)}{letter}{unit}"
    return f"{number:.0f}{' ' * bool(unit)}{unit}"


def ranges(names: Sequence[str]) -> str:
    """Return names as one line: the first, and the last if there are more."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def inspection_table(inspection: Inspection) -> Table:
    """Return the FFNs, one row for each run of equal ones."""
    table = _table("FFNs", "where", "kind", "activation", "hidden", "intermediate")
    for form, run in groupby(inspection.ffns, key=lambda f: (f.kind, f.activation, f.hidden, f.intermediate)):
        names = [ffn.name or "(the model itself)" for ffn in run]
        table.add_row(str(len(names)), ranges(names), *map(str, form))
    return table


def refusals_table(inspection: Inspection) -> Table:
    """Return the look-alikes of an FFN, one row for each reason."""
    table = _table("refused", "where", "because", "stopped at")
    reasons: dict[str, list[Refusal]] = {}
    for refusal in inspection.refused:
        reasons.setdefault(refusal.reason, []).append(refusal)
    for reason, alike in reasons.items():
        where, nodes = [refusal.name for refusal in alike], [refusal.node for refusal in alike]
        table.add_row(str(len(alike)), ranges(where), reason, ranges(nodes))
    return table


def cost_table(rows: Iterable[tuple[str, Cost]]) -> Table:
    """Return the costs of several models side by side."""
    table = _table("", "parameters", "active per token", "checkpoint", "FLOPs per token")
    for label, cost in rows:
        table.add_row(
            label, quantity(cost.parameters), quantity(cost.active), quantity(cost.bytes, "B"), quantity(cost.flops)
        )
    return table


def plan_table(plan: Plan) -> Table:
    """Return the sites of a plan."""
    table = _table("layer", "experts", "of", "activation", "hidden", "intermediate")
    for site in plan.sites:
        experts = f"{plan.config.experts}, top-{plan.config.top_k}"
        table.add_row(site.path, experts, site.kind, site.activation, str(site.hidden), str(site.intermediate))
    return table


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)
