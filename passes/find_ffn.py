"""Find the dense FFNs of a traced model by dataflow, and say why what looks like one is none.

An FFN, to us: one or more projections that read the same activation, a position-wise computation with a nonlinearity,
one projection down to the hidden size that it came from, and a result that joins the residual stream.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from moeify.errors import RefusedError
from moeify.passes.base import FINDINGS, Pass, PassResult
from moeify.passes.ffn import FFN, Inspection, Refusal
from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.activation import CUSTOM
from moeify.passes.matching.match import Matcher, NoMatch
from moeify.passes.matching.operators import op_name
from moeify.passes.matching.projection import Projection

__all__ = ["FFN", "FindFFN", "Inspection", "Refusal", "find_ffns_in", "findings"]


@dataclass(frozen=True)
class FindFFN(Pass):
    """Find dense FFNs. The graph stays as it is; `findings` returns what was found.

    Before:
        %up   = linear(%x, mlp.up.weight)
        %act  = silu(%up)
        %down = linear(%act, mlp.down.weight)
        %out  = add(%x, %down)

    After: the same graph, and one `FFN(name="mlp", kind="mlp", activation="silu", …)`.

    Refuses: projections that read different activations (attention, cross-attention); a last projection to another size
    (heads); no nonlinearity between (low-rank factors, adapters of LoRA); a result that does not join the residual
    stream (poolers, squeeze-and-excite); projections over positions (token mixing); experts that a router chooses; an
    intermediate size many times smaller than the hidden size (adapters) or under a softmax (classes fed back); an
    intermediate value that is used elsewhere too; weights that something else uses.

    It takes an ATen graph whose `get_attr` targets are parameter names (`moeify.tracing.trace` makes them).
    """

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Search the graph once."""
        others = graph_module.meta.get(FINDINGS, {})  # copies of the graph module may share this dictionary
        graph_module.meta[FINDINGS] = {**others, FindFFN.__name__: _search(graph_module)}
        return PassResult(graph_module, modified=False)


def findings(graph_module: fx.GraphModule) -> Inspection:
    """Return what `FindFFN` found in a graph.

    Raises:
        RefusedError: it was not run, or the graph was changed since.
    """
    found = graph_module.meta.get(FINDINGS, {}).get(FindFFN.__name__)
    if not isinstance(found, Inspection):
        raise RefusedError("the graph was not searched for FFNs, or changed since: run FindFFN first")
    nodes = {node for ffn in found.ffns for call in ffn.calls for node in call.inside}
    if not nodes.issubset(graph_module.graph.nodes):
        raise RefusedError("the graph was changed since FindFFN searched it: run FindFFN again")
    return found


def find_ffns_in(graph_module: fx.GraphModule) -> Inspection:
    """Run `FindFFN` and return what it found."""
    return findings(FindFFN()(graph_module).graph_module)


def _search(graph_module: fx.GraphModule) -> Inspection:
    matcher = Matcher(graph_module)
    ffns: dict[object, FFN] = {}
    misses: list[tuple[bool, Refusal]] = []
    for candidate in matcher.projections.values():
        try:
            ffn = matcher.match(candidate)
        except NoMatch as miss:
            misses.append((miss.near, _refusal(candidate.weight, miss.reason, miss.node)))
            continue
        identity = _identity(ffn)
        known = ffns.get(identity)
        ffns[identity] = replace(known, calls=(*known.calls, *ffn.calls)) if known else ffn
    misses += [(True, refusal) for refusal in matcher.computed_weights()]
    found = _without_the_only_one(list(ffns.values()), matcher.outside)
    misses.sort(key=lambda miss: not miss[0])  # what a user may have in mind comes first
    refused = tuple(refusal for near, refusal in misses if near or not found.ffns)
    found = Inspection(found.ffns, refused + found.refused)
    return _without_shared_weights(found, matcher.projections.values())


def _identity(ffn: FFN) -> object:
    """Return what two calls of one FFN have in common: the parameters, and what is computed with them."""
    computed: object = (ffn.activation, ffn.gate_up_rows)
    if ffn.activation == CUSTOM:
        number = {node: index for index, node in enumerate(ffn.region.graph.nodes)}
        arguments = [fx.map_arg((node.args, node.kwargs), number.__getitem__) for node in number]
        computed = str([(op_name(node), given) for node, given in zip(number, arguments, strict=True)])
    return ffn.parameters, ffn.down.axis, computed


def _refusal(weight: str, reason: str, node: fx.Node) -> Refusal:
    return Refusal(weight.rsplit(".", 1)[0], reason, node.name, (flow.module_stack(node) or [""])[-1])


def _without_the_only_one(ffns: list[FFN], outside: set[fx.Node]) -> Inspection:
    """Refuse FFNs whose residual connection was not traced, unless several layers have one of the same form."""

    def form(ffn: FFN) -> tuple[str, str]:
        return re.sub(r"\d+", "#", ffn.down.weight), ffn.kind

    alike = Counter(form(ffn) for ffn in ffns)
    alone = [ffn for ffn in ffns if ffn.down.node in outside and alike[form(ffn)] == 1]
    reason = "no residual connection was seen around it, and it is the only one of its kind"
    refused = [_refusal(ffn.down.weight, reason, ffn.down.node) for ffn in alone]
    return Inspection(tuple(ffn for ffn in ffns if ffn not in alone), tuple(refused))


def _without_shared_weights(found: Inspection, projections: Iterable[Projection]) -> Inspection:
    """Refuse FFNs one of whose weights is also used outside them: converting them would tear the tie apart."""
    uses = Counter(p.weight for p in projections)
    kept, refused = [], list(found.refused)
    for ffn in found.ffns:
        inside = Counter(p.weight for p in (*ffn.ups, ffn.down))
        shared = [name for name, count in inside.items() if uses[name] > count * len(ffn.calls)]
        tied = [name for name, count in inside.items() if count > 1]
        if tied:
            reason = f"two of its projections share the weight {tied[0]}: the experts would hold it twice"
            refused.append(_refusal(ffn.down.weight, reason, ffn.down.node))
        elif shared:
            refused.append(_refusal(ffn.down.weight, f"its weight {shared[0]} is also used elsewhere", ffn.down.node))
        else:
            kept.append(ffn)
    return Inspection(tuple(kept), tuple(refused))
