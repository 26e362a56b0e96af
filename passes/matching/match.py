"""Whether an FFN ends in a projection: the walk back from it, and the checks of what the walk found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from torch import fx, nn

from moeify.passes.ffn import FFN, Call, Refusal
from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.activation import capture, recognize
from moeify.passes.matching.axes import reads_features
from moeify.passes.matching.cut import Cut, as_cut
from moeify.passes.matching.operators import TRANSPARENT, Trait, has, op_name
from moeify.passes.matching.projection import Projection, find_projections
from moeify.passes.matching.reasons import other_size, stopped_at
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


@dataclass
class Candidate:
    """What lies behind a projection that may be the down projection of an FFN.

    Attributes:
        down: That projection.
        ups: The projections that the walk back ended at, in the graph's order.
        nodes: What is computed between, in the graph's order.
        cuts: Which of those nodes hold a slice of the features.
    """

    down: Projection
    ups: tuple[Projection, ...]
    nodes: tuple[fx.Node, ...]
    cuts: dict[fx.Node, Cut]

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.ups[0].in_features

    @property
    def kind(self) -> str:
        """Return "glu" where more is projected up than down."""
        return "glu" if sum(up.out_features for up in self.ups) > self.down.in_features else "mlp"


@dataclass
class Matcher:
    """Looks for FFNs in one graph.

    Attributes:
        graph_module: The traced model.
        projections: All its projections, by their nodes.
        outside: Down projections whose residual connection lies outside the traced part.
    """

    graph_module: fx.GraphModule
    projections: dict[fx.Node, Projection] = field(init=False)
    outside: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.projections = find_projections(self.graph_module.graph)
        self.order = {node: i for i, node in enumerate(self.graph_module.graph.nodes)}
        self.static: dict[fx.Node, bool] = {}
        self.streams = ResidualStreams(self.projections, self.static)

    def match(self, down: Projection) -> FFN:
        """Return the FFN that ends in `down`.

        Raises:
            NoMatch: none does.
        """
        found = self.walk_back(down)
        self.check_size(found)
        self.check_activation(found)
        self.check_bottleneck(found)
        self.check_axis(found)
        self.check_private(found)
        shared_expert = self.check_residual(found)
        return self.describe(found, shared_expert)

    def walk_back(self, down: Projection) -> Candidate:
        """Collect what is computed position-wise behind `down`, and the projections at its edge."""
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
            elif flow.is_position_wise(node, down.axis):
                nodes[node] = None
                pending.extend(node.all_input_nodes)
            elif cut := as_cut(node, down.axis):
                cuts[node] = cut
                nodes |= dict.fromkeys(cut.nodes)
                pending.append(cut.source)
            else:
                raise NoMatch(stopped_at(node, self.static), node, near=bool(ups) and not self.crosses_sum(nodes))
        if not ups:
            raise NoMatch("nothing is projected before it", down.node, near=False)
        ordered = sorted(ups.values(), key=lambda up: self.order[up.node])
        return Candidate(down, tuple(ordered), tuple(sorted(nodes, key=self.order.__getitem__)), cuts)

    def check_one_source(self, ups: dict[fx.Node, Projection], nodes: Iterable[fx.Node]) -> None:
        """Refuse projections that read different activations."""
        *_, last = ups
        if len({flow.same_activation(p.source) for p in ups.values()}) > 1:
            names = " and ".join(ups[n].weight.removesuffix(".weight") for n in sorted(ups, key=self.order.__getitem__))
            reason = f"the projections before it read different activations: {names}"
            if any(self.reads_the_same_through_another(p, ups.values()) for p in ups.values()):
                reason += " (an adapter? merge it first)"
            raise NoMatch(reason, last, near=not self.crosses_sum(nodes))

    def reads_the_same_through_another(self, up: Projection, others: Iterable[Projection]) -> bool:
        """Whether `up` reads a narrow projection of what another one reads, as LoRA does."""
        narrow = self.projections.get(flow.same_activation(up.source))
        if narrow is None:
            return False
        source = flow.same_activation(narrow.source)
        return any(flow.same_activation(other.source) is source for other in others)

    def crosses_sum(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether the walk went through a sum of two activations: it followed the residual stream, not an FFN."""
        sums = (n for n in nodes if op_name(n) == "add")
        return any(len(self.varying_inputs(n)) > 1 for n in sums)

    def varying_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs of a node that depend on the model's inputs."""
        return [n for n in node.all_input_nodes if not flow.is_static(n, self.static)]

    def check_size(self, found: Candidate) -> None:
        """Refuse a projection that does not lead back to the hidden size."""
        down, hidden = found.down, found.hidden
        if down.out_features != hidden:
            raise NoMatch(other_size(down.node, hidden, down.out_features, self.streams.products), down.node)

    def check_activation(self, found: Candidate) -> None:
        """Refuse what no activation of an FFN does: nothing, a softmax, a choice that is not among the features."""
        down = found.down
        if all(self.is_linear(node) for node in found.nodes):
            raise NoMatch("no nonlinearity between the projections: a low-rank factor", down.node)
        for node in found.nodes:
            if "softmax" in op_name(node):
                raise NoMatch(
                    "a softmax over its intermediate values: classes fed back, or attention to a memory", node
                )
        for node in found.nodes:
            if has(node, Trait.CHOICE) and flow.size(node.all_input_nodes[0], down.axis) != down.in_features:
                raise NoMatch(f"`{node.name}` chooses, but not among its intermediate values: a router", node)

    def is_linear(self, node: fx.Node) -> bool:
        """Whether an operator is a sum, a selection, or a product with at most one factor that depends on the input."""
        scales = has(node, Trait.SCALE) and len(self.varying_inputs(node)) <= 1
        return scales or has(node, TRANSPARENT | Trait.LINEAR)

    def check_bottleneck(self, found: Candidate) -> None:
        """Refuse an intermediate size that is many times smaller than the hidden size."""
        size, hidden = found.down.in_features, found.hidden
        if size * BOTTLENECK[found.kind] <= hidden:
            raise NoMatch(
                f"its intermediate size ({size}) is a bottleneck beside the hidden size {hidden}: an adapter",
                found.down.node,
            )

    def check_axis(self, found: Candidate) -> None:
        """Refuse projections over positions."""
        up = found.ups[0]
        if not reads_features(up.source, found.down.axis, self.projections):
            raise NoMatch("it projects over positions, not over features: token mixing", up.node)

    def check_private(self, found: Candidate) -> None:
        """Refuse an FFN of which a value between the projections is used outside it."""
        inner = [n for up in found.ups for n in (up.product, up.node)] + list(found.nodes)
        inside = {*inner, found.down.product}
        for node in inner:
            for user in flow.data_users(node):
                if user in inside:
                    continue
                reason = f"its intermediate value `{node.name}` is also used by `{user.name}`"
                if user in self.projections:
                    beside = self.projections[user].weight.removesuffix(".weight")
                    reason = f"{beside} projects its intermediate value too (an adapter? merge it first)"
                raise NoMatch(reason, user)

    def check_residual(self, found: Candidate) -> bool:
        """Refuse what does not join the residual stream; return whether it joins together with routed experts."""
        down = found.down.node
        outcome = self.streams.outcome(down, found.ups[0].source)
        match outcome.end:
            case End.ROUTED:
                raise NoMatch("a router chooses its tokens: an expert of an MoE that the model already has", down)
            case End.ELSEWHERE:
                raise NoMatch("its result does not join the residual stream: a head, pooler or gate", down)
            case End.BOUNDARY:
                self.outside.add(down)
        return outcome.beside_experts

    def describe(self, found: Candidate, shared_expert: bool) -> FFN:
        """Name a match: its owner, its activation, and which rows are gate and up projection."""
        down, up_nodes = found.down, [up.node for up in found.ups]
        region = capture(self.graph_module, up_nodes, down.source, down.axis, found.cuts)
        activation, rows = recognize(region, [up.out_features for up in found.ups], down.in_features)
        return FFN(
            name=flow.innermost_module([*up_nodes, *found.nodes, down.node]),
            kind=found.kind,
            activation=activation,
            hidden=down.out_features,
            intermediate=down.in_features,
            gate_up_rows=rows,
            region=region,
            calls=(Call(found.ups, down, found.nodes),),
            shared_expert=shared_expert,
        )

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
