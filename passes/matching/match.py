"""Whether an FFN ends in a projection: the walk back from it, and the checks of what the walk found."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from torch import fx, nn

from moeify.passes.ffn import FFN, Call, Refusal
from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.activation import name_activation
from moeify.passes.matching.axes import reads_features
from moeify.passes.matching.cut import Cut, as_cut
from moeify.passes.matching.operators import TRANSPARENT, Trait, has, op_name
from moeify.passes.matching.projection import Projection, find_projections
from moeify.passes.matching.reasons import other_size, stopped_at
from moeify.passes.matching.region import capture
from moeify.passes.matching.residual import End, ResidualStreams

# An intermediate size this many times smaller than the hidden size is an adapter or a gate, never an FFN. (Shared
# experts, which are small too, have a gate projection.)
BOTTLENECK = {"mlp": 4, "glu": 16}


class NoMatch(Exception):  # it is no error: most projections end no FFN
    """A projection that ends no FFN.

    Args:
        reason: Why not.
        node: Where the match stopped.
        near: Whether it looks like an FFN, so that a user wants to know.
    """

    def __init__(self, reason: str, node: fx.Node, *, near: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.node, self.near = reason, node, near


class Matcher:
    """Looks for FFNs in one graph.

    Attributes:
        projections: All projections of the graph, by their nodes.
        outside: Down projections whose residual connection lies outside the traced part.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.static: dict[fx.Node, bool] = {}
        self.projections = find_projections(graph_module.graph)
        self.streams = ResidualStreams(self.projections, self.static)
        self.outside: set[fx.Node] = set()

    def match(self, down: Projection) -> FFN:
        """Return the FFN that ends in `down`.

        Raises:
            NoMatch: none does.
        """
        call = self.walk_back(down)
        self.check_size(call)
        self.check_activation(call)
        self.check_bottleneck(call)
        self.check_axis(call)
        self.check_private(call)
        shared_expert = self.check_residual(call)
        return self.describe(call, shared_expert)

    def walk_back(self, down: Projection) -> Call:
        """Collect what is computed position-wise before `down`, back to the projections that it is computed from."""
        ups: dict[fx.Node, Projection] = {}
        nodes: dict[fx.Node, None] = {}
        cuts: list[Cut] = []
        pending = [down.source]
        while pending:
            node = pending.pop()
            if node in nodes or node in ups or flow.is_static(node, self.static):
                continue
            if node in self.projections and self.projections[node].axis == down.axis:
                ups[node] = self.projections[node]
                self.check_one_source(ups, nodes)
            elif flow.is_position_wise(node, down.axis):
                nodes[node] = None
                pending.extend(node.all_input_nodes)
            elif cut := as_cut(node, down.axis):
                cuts.append(cut)
                nodes |= dict.fromkeys(cut.nodes)
                pending.append(cut.source)
            else:
                raise NoMatch(stopped_at(node, self.static), node, near=bool(ups) and not self.crosses_sum(nodes))
        if not ups:
            raise NoMatch("nothing is projected before it", down.node, near=False)
        return Call(tuple(ups[node] for node in sorted(ups)), down, tuple(sorted(nodes)), tuple(cuts))

    def check_one_source(self, ups: dict[fx.Node, Projection], nodes: Iterable[fx.Node]) -> None:
        """Refuse projections that read different activations."""
        if len({flow.same_activation(up.source) for up in ups.values()}) > 1:
            names = " and ".join(ups[n].weight.removesuffix(".weight") for n in sorted(ups))
            reason = f"the projections before it read different activations: {names}"
            if any(self.reads_the_same_through_another(up, ups.values()) for up in ups.values()):
                reason += " (an adapter? merge it first)"
            raise NoMatch(reason, list(ups)[-1], near=not self.crosses_sum(nodes))

    def reads_the_same_through_another(self, up: Projection, others: Iterable[Projection]) -> bool:
        """Whether `up` reads a narrow projection of what another one reads, as LoRA does."""
        narrow = self.projections.get(flow.same_activation(up.source))
        sources = [flow.same_activation(other.source) for other in others]
        return narrow is not None and flow.same_activation(narrow.source) in sources

    def crosses_sum(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the walk went through a sum of two activations: it followed the residual stream, not an FFN."""
        return any(op_name(node) == "add" and self.varying_inputs(node) > 1 for node in nodes)

    def varying_inputs(self, node: fx.Node) -> int:
        """Count the inputs of a node that depend on the model's inputs."""
        return sum(not flow.is_static(n, self.static) for n in node.all_input_nodes)

    def check_size(self, call: Call) -> None:
        """Refuse a projection that does not lead back to the hidden size."""
        down, hidden = call.down, call.ups[0].in_features
        if down.out_features != hidden:
            raise NoMatch(other_size(down.node, hidden, down.out_features, self.streams.products), down.node)

    def check_activation(self, call: Call) -> None:
        """Refuse what no activation of an FFN does: nothing, a softmax, a choice that is not among the features."""
        down = call.down
        if all(self.is_linear(node) for node in call.nodes):
            raise NoMatch("no nonlinearity between the projections: a low-rank factor", down.node)
        for node in call.nodes:
            if "softmax" in op_name(node):
                raise NoMatch(
                    "a softmax over its intermediate values: classes fed back, or attention to a memory", node
                )
        for node in call.nodes:
            if has(node, Trait.CHOICE) and flow.size(node.all_input_nodes[0], down.axis) != down.in_features:
                raise NoMatch(f"`{node.name}` chooses, but not among its intermediate values: a router", node)

    def is_linear(self, node: fx.Node) -> bool:
        """Whether an operator is a sum, a selection, or a product with at most one factor that depends on the input."""
        scales = has(node, Trait.SCALE) and self.varying_inputs(node) <= 1
        return scales or has(node, TRANSPARENT | Trait.LINEAR)

    def check_bottleneck(self, call: Call) -> None:
        """Refuse an intermediate size that is many times smaller than the hidden size."""
        size, hidden = call.down.in_features, call.down.out_features
        if size * BOTTLENECK[call.kind] <= hidden:
            reason = f"its intermediate size ({size}) is a bottleneck beside the hidden size {hidden}: an adapter"
            raise NoMatch(reason, call.down.node)

    def check_axis(self, call: Call) -> None:
        """Refuse projections over positions."""
        if not reads_features(call.source, call.down.axis, self.projections):
            raise NoMatch("it projects over positions, not over features: token mixing", call.ups[0].node)

    def check_private(self, call: Call) -> None:
        """Refuse an FFN of which a value between the projections is used outside it."""
        inside = set(call.inside)
        for node in call.inside:
            outside = [user for user in flow.data_users(node) if user not in inside]
            if outside and node is not call.down.node:
                user, reason = outside[0], f"its intermediate value `{node.name}` is also used by `{outside[0].name}`"
                if user in self.projections:
                    beside = self.projections[user].weight.removesuffix(".weight")
                    reason = f"{beside} projects its intermediate value too (an adapter? merge it first)"
                raise NoMatch(reason, user)

    def check_residual(self, call: Call) -> bool:
        """Refuse what does not join the residual stream; return whether it joins together with routed experts."""
        down = call.down.node
        end, beside_experts = self.streams.end_of(down, call.source)
        match end:
            case End.ROUTED:
                raise NoMatch("a router chooses its tokens: an expert of an MoE that the model already has", down)
            case End.ELSEWHERE:
                raise NoMatch("its result does not join the residual stream: a head, pooler or gate", down)
            case End.BOUNDARY:
                self.outside.add(down)
        return beside_experts

    def describe(self, call: Call, shared_expert: bool) -> FFN:
        """Name a match: its owner, its activation, and which rows are gate and up projection."""
        down, up_nodes = call.down, [up.node for up in call.ups]
        region = capture(self.graph_module, up_nodes, down.source, down.axis, call.cuts)
        activation, rows, rounded = name_activation(region, [up.out_features for up in call.ups], down.in_features)
        owner = flow.innermost_module([*up_nodes, *call.nodes, down.node])
        sizes = down.out_features, down.in_features
        return FFN(owner, call.kind, activation, *sizes, rows, region, (call,), shared_expert, rounded)

    def computed_weights(self) -> list[Refusal]:
        """Refuse products with a weight that is computed (a parametrization, a rescaling): nothing could replace it."""
        computed = []
        for node in self.graph_module.graph.nodes:
            if node in self.streams.products or not has(node, Trait.PRODUCT) or has(node, Trait.STACKED):
                continue
            weight = flow.last_matrix(node)
            if flow.is_static(weight, self.static) and self.is_learned(weight):
                where = (flow.module_stack(node) or [""])[-1]
                computed.append(Refusal(where, stopped_at(node, self.static), node.name, where))
        return computed

    def is_learned(self, weight: fx.Node) -> bool:
        """Whether a static value is made of a parameter, as opposed to constants of the code."""
        held = (n for n in flow.ancestors(weight) if n.op == "get_attr")
        return any(isinstance(attrgetter(str(n.target))(self.graph_module), nn.Parameter) for n in held)
