"""One model type: built on the meta device, searched for FFNs by dataflow, and counted by names."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

from moeify.errors import MoeifyError
from moeify.passes.ffn import FFN, Inspection
from moeify.passes.find_ffn import find_ffns_in
from moeify.planning.placement import Placer
from moeify.tracing.trace import UNTRACED, trace
from sweeps.count_by_name import Sizes, by_name
from sweeps.models import build, example_inputs, looked_up, model_types


@dataclass(frozen=True)
class Row:
    """The result for one model type."""

    model_type: str
    task: str
    found: Sizes = field(default_factory=dict)
    expected: Sizes = field(default_factory=dict)
    forms: tuple[str, ...] = ()
    shared_experts: int = 0
    refused: tuple[str, ...] = ()
    parts: int = 0
    applier: str = ""
    note: str = ""
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether exactly the expected FFNs were found, with the right sizes."""
        return not self.problem and self.found == self.expected


def examine(model_type: str) -> Row:
    """Build a model, search it by dataflow and by names."""
    logging.disable()
    warnings.simplefilter("ignore")
    task, facts = model_types()[model_type], looked_up(model_type)
    row = Row(model_type, task, note=facts.get("note", ""))
    try:
        model = build(model_type, task, facts.get("config", {}))
    except Exception as error:  # whatever stops a model from being built is the row's content
        return Row(model_type, task, problem="not built: " + _line(error), note=row.note)
    inputs = example_inputs(facts.get("inputs", {}), getattr(model, "config", None))
    expected = by_name(model, facts.get("also", []), facts.get("not", []))
    try:
        graph_module = trace(model, inputs or None)
    except MoeifyError as error:
        return Row(model_type, task, expected=expected, problem="not traced: " + _line(error), note=row.note)
    found = find_ffns_in(graph_module)
    routed = any(re.search(r"\bexperts\b", name) for name, _ in model.named_parameters())
    only_routed = routed and not found.ffns and not expected
    return Row(
        model_type,
        task,
        found={ffn.down.weight: (ffn.hidden, ffn.intermediate) for ffn in found.ffns},
        expected=expected,
        forms=tuple(dict.fromkeys(f"{ffn.activation} {ffn.kind}" for ffn in found.ffns)),
        shared_experts=sum(ffn.shared_expert for ffn in found.ffns),
        refused=("all its FFNs are routed experts",) if only_routed else _reasons(found),
        parts=len(graph_module.meta[UNTRACED]),
        applier=_applier(found.ffns, Placer(graph_module)),
        note=row.note,
    )


def _applier(ffns: tuple[FFN, ...], placer: Placer) -> str:
    graph_only = 0
    for ffn in ffns:
        try:
            placer.place(ffn)
        except MoeifyError:
            graph_only += 1
    if not ffns:
        return ""
    return "in place" if not graph_only else "graph" if graph_only == len(ffns) else "in place; graph for some"


def _reasons(found: Inspection) -> tuple[str, ...]:
    """Return the distinct reasons, numbers and names left out, most frequent first."""
    general = (re.sub(r": [\w.]+ and [\w.]+|`|_\d+|\([^)]*\)", "", r.reason) for r in found.refused)
    counts = Counter(re.sub(r"\s+", " ", re.sub(r"\b[\w.]+\.[\w.]+ projects", "another layer projects", text))
                     for text in general)  # fmt: skip
    return tuple(f"{count}x {reason}" for reason, count in counts.most_common(3))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
