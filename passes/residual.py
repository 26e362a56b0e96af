"""Whether what a projection writes joins the residual stream that the FFN read, and as what.

The stream is followed through everything that is not learnt mixing: norms, modulation, scalings, moves of rows. So the
residual connection is seen also where a gate, a norm, hyper-connections, a window partition or a depthwise convolution
stand between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

from torch import fx

from moeify.passes import dataflow as flow
from moeify.passes.projection import Projection

_NEAR, _FAR = 96, 600  # nodes that a search may visit; blocks have tens
_SUMS = {"add", "sub", "rsub"}
_FORWARD = flow.TRANSPARENT | flow.MOVES | flow.NORMS | {"mul", "div", "neg", "sum", "mean", "addcmul", "lerp"}
_ROUTING = {"topk", "argmax", "sort", "argsort", "one_hot", "multinomial"}
# What was not traced may hold a router: where it chooses or weighs rows, it counts as one.
_MAY_ROUTE = _ROUTING | {flow.UNKNOWN}
_READS = {"index", "index_select", "gather"}
_WEIGHS = {"mul", "index_put", "index_add", "scatter", "scatter_add", "where"}


class End(Enum):
    """Where the result of a projection goes."""

    JOINS = "it is added to the stream that it was made from"
    BOUNDARY = "it leaves the traced part unchanged: whoever called this part may add it"
    ROUTED = "a router chooses the rows that it is computed for"
    ELSEWHERE = "it never meets the stream again"


@dataclass(frozen=True)
class Outcome:
    """How a result ends, and whether routed experts are added to it on the way (it is a shared expert)."""

    end: End
    beside_experts: bool = False


@dataclass
class Streams:
    """Follows residual streams through one graph."""

    projections: dict[fx.Node, Projection]
    static: dict[fx.Node, bool] = field(default_factory=dict)
    _behind: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)

    def follow(self, result: fx.Node, source: fx.Node) -> Outcome:
        """Say where `result` goes, which was computed from `source`."""
        stream = set(self.behind(source))
        if self.is_picked_by_router(source):
            return Outcome(End.ROUTED)
        seen: dict[fx.Node, None] = {result: None}
        encodings: set[fx.Node] = set()  # of what was seen: results multiplied by values for each position
        pending = deque([result])
        beside = boundary = False
        while pending and len(seen) < _NEAR:
            node = pending.popleft()
            for user in flow.data_users(node):
                others = [n for n in user.all_input_nodes if n not in seen and not flow.is_static(n, self.static)]
                # (A norm's factor is made from the result itself, which may hold routed experts by now.)
                if flow.op_name(user) in _WEIGHS and self.any_routed(others, stream | seen.keys(), _MAY_ROUTE):
                    return Outcome(End.ROUTED)
                if node in encodings and self.is_only_projected(user):
                    continue
                if flow.op_name(user) in _SUMS and any(self.meets(n, stream) for n in others):
                    return Outcome(End.JOINS, beside or self.any_routed(others, stream))
                if flow.op_name(user) in _SUMS:
                    beside = beside or self.any_routed(others, stream)
                boundary = boundary or user.op == "output"
                if user not in seen and self.passes_on(user, others, stream):
                    if node in encodings or _scales_positions(user, seen):
                        encodings.add(user)
                    seen[user] = None
                    pending.append(user)
        handed_in = all(node.op == "placeholder" or flow.is_row_wise(node) for node in stream)
        return Outcome(End.BOUNDARY if boundary and handed_in else End.ELSEWHERE)

    def passes_on(self, user: fx.Node, others: Iterable[fx.Node], stream: Collection[fx.Node]) -> bool:
        """Whether `user` hands a result on, as opposed to using it up (a gate on the stream itself, an attention)."""
        name = flow.op_name(user)
        if user in self.projections or name not in _FORWARD | _SUMS | {"index_add"}:
            return False
        return name != "mul" or not any(flow.same_activation(n) in stream for n in others)

    def is_only_projected(self, total: fx.Node) -> bool:
        """Whether only projections read a sum: queries and keys with a position encoding, no residual stream."""
        readers, products = flow.data_users(total), {p.product for p in self.projections.values()}
        return flow.op_name(total) in _SUMS and len(readers) > 1 and products.issuperset(readers)

    def meets(self, summand: fx.Node, stream: Collection[fx.Node]) -> bool:
        """Whether a summand is the stream, or was made from it without learnt mixing."""
        return any(node in stream for node in self.behind(summand))

    def behind(self, source: fx.Node) -> tuple[fx.Node, ...]:
        """Return `source` and what it was made from without learnt mixing, nearest first."""
        if source not in self._behind:
            found: dict[fx.Node, None] = {}
            pending = deque([source])
            while pending and len(found) < _NEAR:
                node = pending.popleft()
                if node in found or flow.is_static(node, self.static):
                    continue
                found[node] = None
                if node not in self.projections and flow.op_name(node) not in flow.MIXES:
                    pending.extend(node.all_input_nodes)
            self._behind[source] = tuple(found)
        return self._behind[source]

    def is_picked_by_router(self, source: fx.Node) -> bool:
        """Whether `source` holds the rows that a router picked from the stream."""
        for node in self.behind(source):
            if flow.op_name(node) in _SUMS:
                return False  # beyond it lies the stream, which other MoE layers may have written
            if flow.op_name(node) in _READS and self.any_routed(node.all_input_nodes[1:], (), _MAY_ROUTE):
                return True
        return False

    def any_routed(
        self, nodes: Iterable[fx.Node], stream: Collection[fx.Node], signs: Collection[str] = frozenset(_ROUTING)
    ) -> bool:
        """Whether a choice of experts stands behind one of `nodes`, this side of the stream."""
        seen: set[fx.Node] = set()
        pending = deque(nodes)
        while pending and len(seen) < _FAR:
            node = pending.popleft()
            if node in seen or node in stream:
                continue
            seen.add(node)
            if flow.op_name(node) in signs:
                return True
            pending.extend(node.all_input_nodes)
        return False


def _scales_positions(node: fx.Node, seen: Collection[fx.Node]) -> bool:
    """Whether a node multiplies by values that differ by position and feature, as position encodings do."""
    factors = (flow.shape(n) for n in node.all_input_nodes if n not in seen)
    return flow.op_name(node) == "mul" and any(dims[-1:] > (1,) and max(dims[-2:-1], default=1) > 1 for dims in factors)
