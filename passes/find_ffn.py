"""Find the dense FFN blocks of a traced model by dataflow, and say of everything that looks like one why it is not.

An FFN, to us: one or more projections that read the same activation, a row-wise region that contains a nonlinearity,
one projection back to the width it came from, and a result that joins the residual stream. See `FindFFN`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx

from moeify.passes import dataflow as flow
from moeify.passes.activation import Halves, capture, recognise
from moeify.passes.dataflow import Projection

_BOTTLENECK = 4  # a hidden layer this many times narrower than the model is an adapter or a gate, never an FFN
_RESIDUAL_HOPS = 64


@dataclass(frozen=True)
class FFN:
    """A dense FFN in a traced graph.

    Attributes:
        name: Path of the innermost module that contains all of it.
        kind: "glu" (gate and up projections) or "mlp".
        activation: Canonical name, or "custom".
        hidden: Width read and written.
        intermediate: Width between the projections.
        ups: The projections that read the input.
        down: The projection back.
        halves: Which projection rows are gate and up; None for a custom activation.
        region: The row-wise computation between them as a graph of its own: `region(*ups) → input of down`.
        nodes: The region's nodes in the model's graph.
        neuron_wise: Each neuron of the region depends on that neuron alone (no norm inside): the FFN may be split.
        calls: How often the model applies it (above 1 when layers share it).
    """

    name: str
    kind: str
    activation: str
    hidden: int
    intermediate: int
    ups: tuple[Projection, ...]
    down: Projection
    halves: Halves | None
    region: fx.GraphModule = field(repr=False, compare=False)
    nodes: tuple[fx.Node, ...] = field(repr=False)
    neuron_wise: bool = True
    calls: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its weights and biases, and of the parameters inside the region."""
        projections = (*self.ups, self.down)
        names = [name for p in projections for name in (p.weight, p.bias) if name]
        names += [str(node.target) for node in self.region.graph.nodes if node.op == "get_attr"]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Refusal:
    """Something that looks like an FFN and is not: the projection that would lead back, and why not."""

    name: str
    reason: str
    node: str


@dataclass(frozen=True)
class Inspection:
    """What `FindFFN` found, in the order of execution.

    Attributes:
        ffns: The FFNs.
        refused: What looks like one and is not. When there is no FFN at all: every projection that was looked at.
    """

    ffns: tuple[FFN, ...]
    refused: tuple[Refusal, ...]


class _NoMatch(Exception):  # noqa: N818 -- not an error: the ordinary outcome for most projections
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
    stream (poolers, squeeze-and-excite); a hidden layer at least 4 times narrower than the model (adapters); an
    intermediate value that is used elsewhere too; weights that something else uses.
    """

    def __call__(self, graph_module: fx.GraphModule) -> Inspection:
        """Analyse an ATen graph whose `get_attr` targets are parameter names (`moeify.trace.trace` makes one)."""
        projections = [p for node in graph_module.graph.nodes if (p := flow.as_projection(node))]
        finder = _Finder(graph_module, {p.node: p for p in projections})
        ffns: dict[tuple[str, ...], FFN] = {}
        misses: list[tuple[bool, Refusal]] = []
        for candidate in projections:
            try:
                ffn = finder.match(candidate)
            except _NoMatch as miss:
                name = candidate.weight.rsplit(".", 1)[0]
                misses.append((miss.near, Refusal(name, miss.reason, miss.node.name)))
                continue
            known = ffns.get(ffn.parameters)
            ffns[ffn.parameters] = replace(known, calls=known.calls + 1) if known else ffn
        refused = tuple(refusal for near, refusal in misses if near or not ffns)
        return _without_shared_weights(Inspection(tuple(ffns.values()), refused), projections)


@dataclass
class _Finder:
    graph_module: fx.GraphModule
    projections: dict[fx.Node, Projection]
    static: dict[fx.Node, bool] = field(default_factory=dict)

    def match(self, down: Projection) -> FFN:
        """Return the FFN that ends in `down`, or raise `_NoMatch`."""
        ups, nodes = self.walk_back(down)
        hidden = ups[0].in_features
        if down.out_features != hidden:
            raise _NoMatch(f"it projects back to width {down.out_features}, not {hidden}: a head", down.node)
        linear = all(flow.op_name(n) in flow.LINEAR or self.scales_by_constant(n) for n in nodes)
        if linear:
            raise _NoMatch("no nonlinearity between the projections: a low-rank factor", down.node)
        if down.in_features * _BOTTLENECK <= hidden:
            raise _NoMatch(f"its hidden layer ({down.in_features}) is a bottleneck of {hidden}: an adapter", down.node)
        self.check_private([u.node for u in ups] + nodes, down)
        if not self.joins_residual(down.node, ups[0].source):
            raise _NoMatch("its result does not join the residual stream: a head, pooler or gate", down.node)
        return self.describe(ups, nodes, down)

    def walk_back(self, down: Projection) -> tuple[list[Projection], list[fx.Node]]:
        """Collect the row-wise region behind `down` and the projections at its edge."""
        ups: dict[fx.Node, Projection] = {}
        nodes: dict[fx.Node, None] = {}
        pending = [down.source]
        while pending:
            node = pending.pop()
            if node in nodes or node in ups or flow.is_static(node, self.static):
                continue
            if node in self.projections:
                ups[node] = self.projections[node]
                sources = {flow.same_activation(p.source) for p in ups.values()}
                if len(sources) > 1:
                    reason = "the projections behind it read different activations"
                    raise _NoMatch(reason, node, near=not self.crosses_sum(nodes))
            elif flow.is_row_wise(node):
                nodes[node] = None
                pending.extend(node.all_input_nodes)
            else:
                what = flow.op_name(node) or str(node.target)
                reason = f"behind it stands `{what}`, which is not position-wise"
                raise _NoMatch(reason, node, near=bool(ups) and not self.crosses_sum(nodes))
        if not ups:
            raise _NoMatch("nothing is projected before it", down.node, near=False)
        order = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}
        return sorted(ups.values(), key=lambda p: order[p.node]), sorted(nodes, key=order.__getitem__)

    def crosses_sum(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the walk went through a sum of two activations: it followed the residual stream, not an FFN."""
        sums = (n for n in nodes if flow.op_name(n) == "add")
        return any(sum(not flow.is_static(a, self.static) for a in n.all_input_nodes) > 1 for n in sums)

    def scales_by_constant(self, node: fx.Node) -> bool:
        """Whether a product or quotient has at most one factor that depends on the input."""
        varying = [a for a in node.all_input_nodes if not flow.is_static(a, self.static)]
        return flow.op_name(node) in {"mul", "div"} and len(varying) <= 1

    def check_private(self, inner: list[fx.Node], down: Projection) -> None:
        """Refuse when a value between the projections is used outside them."""
        inside = {*inner, down.node}
        for node in inner:
            for user in flow.data_users(node):
                if user not in inside:
                    reason = f"its intermediate value `{node.name}` is also used by `{user.name}`"
                    raise _NoMatch(reason, user)

    def joins_residual(self, result: fx.Node, source: fx.Node) -> bool:
        """Whether `result`, through row-wise operators, is added to the stream that `source` was made from."""
        stream = self.stream_behind(source)
        seen: dict[fx.Node, None] = {result: None}
        pending = [result]
        while pending and len(seen) < _RESIDUAL_HOPS:
            node = pending.pop(0)
            for user in flow.data_users(node):
                others = [a for a in user.all_input_nodes if a not in seen]
                if flow.op_name(user) == "add" and any(flow.same_activation(a) in stream for a in others):
                    return True
                if user not in seen and user not in self.projections and flow.is_row_wise(user):
                    seen[user] = None
                    pending.append(user)
        return False

    def stream_behind(self, source: fx.Node) -> set[fx.Node]:
        """Return `source` and what it was made from by a norm, back to the sums that carry the residual stream."""
        found: set[fx.Node] = set()
        pending = [source]
        while pending and len(found) < _RESIDUAL_HOPS:
            node = pending.pop(0)
            if node in found or flow.is_static(node, self.static):
                continue
            found.add(node)
            at_sum = flow.op_name(node) == "add" and flow.width(node) == flow.width(source)
            if not at_sum and node not in self.projections and flow.is_row_wise(node):
                pending.extend(node.all_input_nodes)
        return found | {flow.same_activation(node) for node in found}

    def describe(self, ups: list[Projection], nodes: list[fx.Node], down: Projection) -> FFN:
        """Name a match: its owner, its activation, and which projection is the gate."""
        region = capture(self.graph_module, [u.node for u in ups], down.source)
        recognised = recognise(region, [u.out_features for u in ups], down.in_features)
        gated = sum(u.out_features for u in ups) > down.in_features
        return FFN(
            name=_owner([u.node for u in ups] + [*nodes, down.node]),
            kind="glu" if gated else "mlp",
            activation=recognised.activation,
            hidden=down.out_features,
            intermediate=down.in_features,
            ups=tuple(ups),
            down=down,
            halves=recognised.halves,
            region=region,
            nodes=tuple(nodes),
            neuron_wise=not any(flow.op_name(n) in flow.REDUCES for n in nodes),
        )


def _owner(nodes: list[fx.Node]) -> str:
    """Return the path of the innermost module around all nodes."""
    stacks = [flow.module_stack(node) for node in nodes]
    common = ""
    for paths in zip(*stacks, strict=False):
        if len(set(paths)) > 1:
            break
        common = paths[0]
    return common


def _without_shared_weights(found: Inspection, projections: list[Projection]) -> Inspection:
    """Refuse FFNs one of whose weights is also used outside them: converting them would tear the tie apart."""
    uses = Counter(p.weight for p in projections)
    kept, refused = [], list(found.refused)
    for ffn in found.ffns:
        inside = Counter(p.weight for p in (*ffn.ups, ffn.down))
        shared = [name for name, count in inside.items() if uses[name] > count * ffn.calls]
        if shared:
            refused.append(Refusal(ffn.name, f"its weight {shared[0]} is also used elsewhere", ffn.down.node.name))
        else:
            kept.append(ffn)
    return Inspection(tuple(kept), tuple(refused))
