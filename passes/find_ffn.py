"""Find the dense FFN blocks of a traced model by dataflow, and say of everything that looks like one why it is not.

An FFN, to us: one or more projections that read the same activation, a row-wise region that contains a nonlinearity,
one projection back to the width it came from, and a result that joins the residual stream. See `FindFFN`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter

from torch import fx, nn

from moeify.passes import dataflow as flow
from moeify.passes.activation import capture, recognise
from moeify.passes.axes import reads_features
from moeify.passes.cut import Cut, as_cut
from moeify.passes.ffn import FFN, Inspection, Refusal
from moeify.passes.projection import Projection, find_projections
from moeify.passes.reasons import other_width, stopped_at
from moeify.passes.residual import End, Streams

# A hidden layer this many times narrower than the model is an adapter or a gate, never an FFN. Shared experts, which
# are narrow too, are gated.
_BOTTLENECK = {"mlp": 4, "glu": 16}


__all__ = ["FFN", "FindFFN", "Inspection", "Refusal"]


class _NoMatch(Exception):  # no error: most projections do not match
    def __init__(self, reason: str, node: fx.Node, *, near: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.node, self.near = reason, node, near


@dataclass(frozen=True)
class FindFFN:
    """Find dense FFNs (an analysis: the graph is not changed).

    Before:
        %up   = linear(%x, mlp.up.weight)
        %act  = silu(%up)
        %down = linear(%act, mlp.down.weight)
        %out  = add(%x, %down)

    After: the same graph, and one `FFN(name="mlp", kind="mlp", activation="silu", …)`.

    Refuses: projections that read different activations (attention, cross-attention); a way back to another width
    (heads); no nonlinearity between (low-rank factors, adapters of LoRA); a result that does not join the residual
    stream (poolers, squeeze-and-excite); projections over positions (token mixing); experts that a router chooses; a
    hidden layer many times narrower than the model (adapters) or under a softmax (classes fed back); an intermediate
    value that is used elsewhere too; weights that something else uses.
    """

    def __call__(self, graph_module: fx.GraphModule) -> Inspection:
        """Analyse an ATen graph whose `get_attr` targets are parameter names (`moeify.tracing.trace` makes them)."""
        projections = find_projections(graph_module.graph)
        finder = _Finder(graph_module, projections)
        ffns: dict[tuple[str, ...], FFN] = {}
        misses: list[tuple[bool, Refusal]] = []
        for candidate in projections.values():
            try:
                ffn = finder.match(candidate)
            except _NoMatch as miss:
                misses.append((miss.near, _refusal(candidate.weight, miss.reason, miss.node)))
                continue
            known = ffns.get(ffn.parameters)
            ffns[ffn.parameters] = replace(known, calls=known.calls + 1) if known else ffn
        misses += [(True, refusal) for refusal in finder.computed_weights()]
        found = _without_strays(list(ffns.values()), finder.unseen)
        refused = tuple(refusal for near, refusal in misses if near or not found.ffns)
        found = Inspection(found.ffns, refused + found.refused)
        return _without_shared_weights(found, projections.values())


@dataclass
class _Finder:
    graph_module: fx.GraphModule
    projections: dict[fx.Node, Projection]
    static: dict[fx.Node, bool] = field(default_factory=dict)
    unseen: set[fx.Node] = field(default_factory=set)  # projections back whose residual lies outside the traced part

    def __post_init__(self) -> None:
        self.order = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}
        self.streams = Streams(self.projections, self.static)

    def match(self, down: Projection) -> FFN:
        """Return the FFN that ends in `down`, or raise `_NoMatch`."""
        ups, nodes, cuts = self.walk_back(down)
        hidden = ups[0].in_features
        if down.out_features != hidden:
            products = {p.product for p in self.projections.values()}
            raise _NoMatch(other_width(down.node, hidden, down.out_features, products), down.node)
        if all(flow.op_name(n) in flow.LINEAR or self.scales_by_constant(n) for n in nodes):
            raise _NoMatch("no nonlinearity between the projections: a low-rank factor", down.node)
        if classes := [n for n in nodes if "softmax" in flow.op_name(n)]:
            raise _NoMatch("a softmax over its hidden layer: classes fed back, or attention to a memory", classes[0])
        if chosen := [n for n in nodes if flow.op_name(n) in flow.CHOOSES and not self.among_neurons(n, down)]:
            raise _NoMatch(f"`{chosen[0].name}` chooses, and not among its neurons: a router", chosen[0])
        kind = "glu" if sum(u.out_features for u in ups) > down.in_features else "mlp"
        if down.in_features * _BOTTLENECK[kind] <= hidden:
            raise _NoMatch(f"its hidden layer ({down.in_features}) is a bottleneck of {hidden}: an adapter", down.node)
        if not reads_features(ups[0].source, down.axis, self.projections):
            raise _NoMatch("it projects over positions, not over features: token mixing", ups[0].node)
        self.check_private([n for u in ups for n in (u.product, u.node)] + nodes, down)
        shared_expert = self.check_residual(ups[0], down)
        region = capture(self.graph_module, [u.node for u in ups], down.source, down.axis, cuts)
        return self.describe(ups, nodes, down, kind, region, shared_expert)

    def computed_weights(self) -> list[Refusal]:
        """Refuse products with a weight that is computed (a parametrization, a rescaling): nothing could replace it."""
        products = {p.product for p in self.projections.values()}
        computed = []
        for node in self.graph_module.graph.nodes:
            if node in products or flow.op_name(node) not in {"linear", "mm", "matmul", "addmm"}:
                continue
            weight = flow.last_matrix(node)
            if flow.is_static(weight, self.static) and self.is_learnt(weight):
                where = (flow.module_stack(node) or [""])[-1]
                computed.append(Refusal(where, stopped_at(node, self.static), node.name, where))
        return computed

    def is_learnt(self, weight: fx.Node) -> bool:
        """Whether a value that no input reaches is made of a parameter, as opposed to constants of the code."""
        held = (n for n in flow.ancestors(weight) if n.op == "get_attr")
        return any(isinstance(attrgetter(str(n.target))(self.graph_module), nn.Parameter) for n in held)

    def walk_back(self, down: Projection) -> tuple[list[Projection], list[fx.Node], dict[fx.Node, Cut]]:
        """Collect the row-wise region behind `down`, the projections at its edge, and where the region cuts rows."""
        ups: dict[fx.Node, Projection] = {}
        nodes: dict[fx.Node, None] = {}
        cuts: dict[fx.Node, Cut] = {}
        pending = [down.source]
        while pending:
            node = pending.pop()
            if node in nodes or node in ups or flow.is_static(node, self.static):
                continue
            if node in self.projections and self.projections[node].axis == down.axis:
                ups[node] = self.projections[node]
                self.check_one_source(ups, nodes)
            elif flow.is_row_wise(node, down.axis):
                nodes[node] = None
                pending.extend(node.all_input_nodes)
            elif cut := as_cut(node, down.axis):
                cuts[node] = cut
                nodes |= dict.fromkeys(cut.nodes)
                pending.append(cut.source)
            else:
                raise _NoMatch(stopped_at(node, self.static), node, near=bool(ups) and not self.crosses_sum(nodes))
        if not ups:
            raise _NoMatch("nothing is projected before it", down.node, near=False)
        ordered = sorted(ups.values(), key=lambda p: self.order[p.node])
        return ordered, sorted(nodes, key=self.order.__getitem__), cuts

    def check_one_source(self, ups: dict[fx.Node, Projection], nodes: Iterable[fx.Node]) -> None:
        """Refuse when the projections read different activations."""
        *_, last = ups
        if len({flow.same_activation(p.source) for p in ups.values()}) > 1:
            names = " and ".join(ups[n].weight.removesuffix(".weight") for n in sorted(ups, key=self.order.__getitem__))
            reason = f"the projections behind it read different activations: {names}"
            if any(self.reads_the_same_through_another(p, ups.values()) for p in ups.values()):
                reason += " (an adapter? merge it first)"
            raise _NoMatch(reason, last, near=not self.crosses_sum(nodes))

    def reads_the_same_through_another(self, up: Projection, others: Iterable[Projection]) -> bool:
        """Whether `up` reads a narrow projection of what another one reads, as LoRA does."""
        narrow = self.projections.get(flow.same_activation(up.source))
        return narrow is not None and any(
            flow.same_activation(p.source) is flow.same_activation(narrow.source) for p in others
        )

    def crosses_sum(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the walk went through a sum of two activations: it followed the residual stream, not an FFN."""
        sums = (n for n in nodes if flow.op_name(n) == "add")
        return any(sum(not flow.is_static(a, self.static) for a in n.all_input_nodes) > 1 for n in sums)

    def scales_by_constant(self, node: fx.Node) -> bool:
        """Whether a product or quotient has at most one factor that depends on the input."""
        varying = [a for a in node.all_input_nodes if not flow.is_static(a, self.static)]
        return flow.op_name(node) in {"mul", "div"} and len(varying) <= 1

    def among_neurons(self, node: fx.Node, down: Projection) -> bool:
        """Whether a choice is made among the values that the projection back reads."""
        return flow.size(node.all_input_nodes[0], down.axis) == down.in_features

    def check_private(self, inner: list[fx.Node], down: Projection) -> None:
        """Refuse when a value between the projections is used outside them."""
        inside = {*inner, down.product}
        for node in inner:
            for user in flow.data_users(node):
                if user in inside:
                    continue
                reason = f"its intermediate value `{node.name}` is also used by `{user.name}`"
                if user in self.projections:
                    beside = self.projections[user].weight.removesuffix(".weight")
                    reason = f"{beside} projects its intermediate value too (an adapter? merge it first)"
                raise _NoMatch(reason, user)

    def check_residual(self, up: Projection, down: Projection) -> bool:
        """Refuse what does not join the residual stream; return whether it joins together with routed experts."""
        outcome = self.streams.follow(down.node, up.source)
        match outcome.end:
            case End.ROUTED:
                raise _NoMatch("a router chooses its rows: an expert of an MoE that the model already has", down.node)
            case End.ELSEWHERE:
                raise _NoMatch("its result does not join the residual stream: a head, pooler or gate", down.node)
            case End.BOUNDARY:
                self.unseen.add(down.node)
        return outcome.beside_experts

    def describe(
        self,
        ups: list[Projection],
        nodes: list[fx.Node],
        down: Projection,
        kind: str,
        region: fx.GraphModule,
        shared_expert: bool,
    ) -> FFN:
        """Name a match: its owner, its activation, and which projection is the gate."""
        recognised = recognise(region, [u.out_features for u in ups], down.in_features)
        return FFN(
            name=flow.innermost_module([u.node for u in ups] + [*nodes, down.node]),
            kind=kind,
            activation=recognised.activation,
            hidden=down.out_features,
            intermediate=down.in_features,
            ups=tuple(ups),
            down=down,
            halves=recognised.halves,
            region=region,
            nodes=tuple(nodes),
            neuron_wise=not any(flow.op_name(n) in flow.REDUCES for n in nodes),
            shared_expert=shared_expert,
        )


def _refusal(weight: str, reason: str, node: fx.Node) -> Refusal:
    return Refusal(weight.rsplit(".", 1)[0], reason, node.name, (flow.module_stack(node) or [""])[-1])


def _without_strays(ffns: list[FFN], unseen: set[fx.Node]) -> Inspection:
    """Refuse FFNs whose residual connection was not traced, unless the like stands in several layers."""

    def form(ffn: FFN) -> tuple[str, str]:
        return re.sub(r"\d+", "#", ffn.down.weight), ffn.kind

    alike = Counter(form(ffn) for ffn in ffns)
    strays = [ffn for ffn in ffns if ffn.down.node in unseen and alike[form(ffn)] == 1]
    reason = "no residual connection was seen around it, and it is the only one of its kind"
    refused = [_refusal(ffn.down.weight, reason, ffn.down.node) for ffn in strays]
    return Inspection(tuple(ffn for ffn in ffns if ffn not in strays), tuple(refused))


def _without_shared_weights(found: Inspection, projections: Iterable[Projection]) -> Inspection:
    """Refuse FFNs one of whose weights is also used outside them: converting them would tear the tie apart."""
    uses = Counter(p.weight for p in projections)
    kept, refused = [], list(found.refused)
    for ffn in found.ffns:
        inside = Counter(p.weight for p in (*ffn.ups, ffn.down))
        shared = [name for name, count in inside.items() if uses[name] > count * ffn.calls]
        tied = [name for name, count in inside.items() if count > 1]
        if tied:
            reason = f"two of its projections share the weight {tied[0]}: the experts would hold it twice"
            refused.append(_refusal(ffn.down.weight, reason, ffn.down.node))
        elif shared:
            refused.append(_refusal(ffn.down.weight, f"its weight {shared[0]} is also used elsewhere", ffn.down.node))
        else:
            kept.append(ffn)
    return Inspection(tuple(kept), tuple(refused))
