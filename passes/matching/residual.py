"""Whether the result of a projection joins the residual stream that the FFN read, and how.

The stream is followed through everything that does not mix features by learned weights: norms, modulation, scalings,
moves of positions, products that sum over another dimension than the features. So the residual connection is also seen
where a gate, a norm, hyper-connections, a window partition or a depthwise convolution stand between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from enum import Enum

from torch import fx

from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.axes import axis_after, axis_before, sums_over
from moeify.passes.matching.operators import TRANSPARENT, Trait, has, op_name
from moeify.passes.matching.projection import Projection

_NEAR, _FAR = 96, 600  # nodes that a search may visit; blocks have tens
_PASSES_ON = TRANSPARENT | Trait.MOVE | Trait.NORM | Trait.FORWARD
# What was not traced may hold a router: where it chooses positions or gives weights, it counts as one.
_MAY_ROUTE = Trait.ROUTING | Trait.UNKNOWN


class End(Enum):
    """Where the result of a projection goes."""

    JOINS = "it is added to the stream that it was made from"
    BOUNDARY = "it leaves the traced part unchanged: whoever called this part may add it"
    ROUTED = "a router chooses the positions that it is computed for"
    ELSEWHERE = "it never meets the stream again"


class ResidualStreams:
    """The residual streams of one graph.

    Args:
        projections: All projections of the graph, by their nodes.
        static: What is known of which nodes depend on the inputs.
    """

    def __init__(self, projections: Mapping[fx.Node, Projection], static: dict[fx.Node, bool]) -> None:
        self.projections, self.static = projections, static
        self.products = frozenset(p.product for p in projections.values())
        self._behind: dict[tuple[fx.Node, int | None], tuple[fx.Node, ...]] = {}

    def end_of(self, result: fx.Node, source: fx.Node) -> tuple[End, bool]:
        """Return where `result` goes, which was computed from `source`.

        Returns:
            Where it ends, and whether routed experts are added to it on the way (it is a shared expert).
        """
        axis = self.projections[result].axis
        if self.is_picked_by_router(source, axis):
            return End.ROUTED, False
        return _Search(self, frozenset(self.behind(source, axis)), result, axis).run()

    def behind(self, source: fx.Node, axis: int | None) -> tuple[fx.Node, ...]:
        """Return `source`, whose features are in dimension `axis`, and what it was made from without learned mixing.

        The nearest come first.
        """
        if (source, axis) not in self._behind:
            found: dict[fx.Node, None] = {}
            pending: deque[tuple[fx.Node, int | None]] = deque([(source, axis)])
            while pending and len(found) < _NEAR:
                node, features = pending.popleft()
                if node in found or flow.is_static(node, self.static):
                    continue
                found[node] = None
                if not self.mixes(node, features):
                    pending.extend((n, axis_before(node, n, features)) for n in node.all_input_nodes)
            self._behind[source, axis] = tuple(found)
        return self._behind[source, axis]

    def mixes(self, node: fx.Node, features: int | None) -> bool:
        """Whether a node mixes features by learned weights, of which the result has those in a dimension `features`."""
        if node not in self.projections and not has(node, Trait.MIX):
            return False
        return features in {None, -1} or not has(node, Trait.PRODUCT)  # a product writes its last dimension

    def is_picked_by_router(self, source: fx.Node, axis: int) -> bool:
        """Whether `source` holds the positions that a router picked from the stream."""
        for node in self.behind(source, axis):
            if has(node, Trait.SUM):
                return False  # before it lies the stream, which other MoE layers may have written
            if has(node, Trait.PICK) and follows_choice(node.all_input_nodes[1:], (), _MAY_ROUTE):
                return True
        return False

    def is_only_projected(self, total: fx.Node) -> bool:
        """Whether only projections read a sum: queries and keys with a position encoding, no residual stream."""
        readers = flow.data_users(total)
        return has(total, Trait.SUM) and len(readers) > 1 and self.products.issuperset(readers)


def follows_choice(nodes: Iterable[fx.Node], stream: Collection[fx.Node], signs: Trait = Trait.ROUTING) -> bool:
    """Whether an operator with the traits `signs`, a choice of experts, lies between the stream and one of `nodes`."""
    seen: set[fx.Node] = set()
    pending = deque(nodes)
    while pending and len(seen) < _FAR:
        node = pending.popleft()
        if node in seen or node in stream:
            continue
        seen.add(node)
        if has(node, signs):
            return True
        pending.extend(node.all_input_nodes)
    return False


class _Search:
    """Follows one result forward, nearest users first, until it is clear where it ends.

    `stream` is what the FFN read, with everything behind it; `axis` is where the result has its features.
    """

    def __init__(self, streams: ResidualStreams, stream: frozenset[fx.Node], result: fx.Node, axis: int) -> None:
        self.streams, self.stream = streams, stream
        self.features: dict[fx.Node, int | None] = {result: axis}  # where they are in what was seen
        self.stacks: dict[fx.Node, int] = {}  # of what was seen: where the result and the stream lie side by side
        self.seen: dict[fx.Node, None] = {result: None}
        self.pending = deque([result])
        self.encodings: set[fx.Node] = set()  # of what was seen: results multiplied by values for each position
        self.beside_experts = self.leaves = False

    def run(self) -> tuple[End, bool]:
        """Return where the result ends, and whether routed experts are added to it."""
        while self.pending and len(self.seen) < _NEAR:
            node = self.pending.popleft()
            for user in flow.data_users(node):
                if end := self.step(node, user):
                    return end, self.beside_experts
        handed_in = all(node.op == "placeholder" or flow.is_position_wise(node) for node in self.stream)
        return (End.BOUNDARY if self.leaves and handed_in else End.ELSEWHERE), self.beside_experts

    def step(self, node: fx.Node, user: fx.Node) -> End | None:
        """Look at one user of a node that holds the result; return where the result ends as soon as it is known."""
        others = [n for n in user.all_input_nodes if n not in self.seen and not flow.is_static(n, self.streams.static)]
        features = axis_after(node, user, self.features[node])
        if self.is_weighed_by_router(user, others, features):
            return End.ROUTED
        if node in self.stacks and sums_over(node, user, self.stacks[node]):
            return End.JOINS
        if node in self.encodings and self.streams.is_only_projected(user):
            return None
        factors = [n for n in _factors(node, user) if n in others]
        used_up = any(flow.same_activation(n) in self.stream for n in factors)  # a gate on the stream itself
        if has(user, Trait.SUM):
            self.beside_experts = self.beside_experts or follows_choice(others, self.stream)
            if not used_up and any(self.is_stream(user, n, features) for n in others if n not in factors):
                return End.JOINS
        self.leaves = self.leaves or user.op == "output"
        if user not in self.seen and not used_up and self.passes_on(user, features):
            self.features[user] = features
            self.note_stack(node, user, others)
            if node in self.encodings or _scales_positions(user, self.seen):
                self.encodings.add(user)
            self.seen[user] = None
            self.pending.append(user)
        return None

    def is_weighed_by_router(self, user: fx.Node, others: Iterable[fx.Node], features: int | None) -> bool:
        """Whether a user applies a router's weights or choice to the result.

        (What was seen counts as the stream: a norm's factor is made from the result, which may hold routed experts.)
        """
        weighs = has(user, Trait.WEIGH) or (has(user, Trait.PRODUCT) and features is not None)
        return weighs and follows_choice(others, self.stream | self.seen.keys(), _MAY_ROUTE)

    def is_stream(self, total: fx.Node, part: fx.Node, features: int | None) -> bool:
        """Whether a part of a total is the stream, or was made from it without learned mixing."""
        return any(node in self.stream for node in self.streams.behind(part, axis_before(total, part, features)))

    def passes_on(self, user: fx.Node, features: int | None) -> bool:
        """Whether `user` passes the result on, and does not use it up (an attention)."""
        if has(user, Trait.PRODUCT):
            return features is not None
        return user not in self.streams.projections and has(user, _PASSES_ON)

    def note_stack(self, node: fx.Node, user: fx.Node, others: Iterable[fx.Node]) -> None:
        """Note where the result lies beside the stream: the sum over that dimension adds it to the stream."""
        axis = axis_after(node, user, self.stacks[node]) if node in self.stacks else None
        if op_name(user) == "stack" and any(self.is_stream(user, n, self.features[user]) for n in others):
            dim = flow.arguments(user)["dim"]
            assert isinstance(dim, int)
            axis = dim - len(flow.shape(user)) * (dim >= 0)
        if axis is not None:
            self.stacks[user] = axis


def _factors(node: fx.Node, user: fx.Node) -> list[fx.Node]:
    """Return what `user` multiplies `node` by."""
    given = [n for n in user.args if isinstance(n, fx.Node)]
    if has(user, Trait.PRODUCT):
        return user.all_input_nodes
    match op_name(user):
        case "mul":
            return given
        case "addcmul":  # a + b * c
            return given[1:] if node in given[1:] else []
        case "lerp":  # a + weight * (b - a)
            return given[:2] if node in given[2:] else given[2:]
    return []


def _scales_positions(node: fx.Node, seen: Collection[fx.Node]) -> bool:
    """Whether a node multiplies by values that differ by position and feature, as position encodings do."""
    factors = (flow.shape(n) for n in node.all_input_nodes if n not in seen)
    return op_name(node) == "mul" and any(dims[-1:] > (1,) and max(dims[-2:-1], default=1) > 1 for dims in factors)
