"""The graph of a whole stack of blocks from the graph of its first ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter

from torch import fx, nn

from moeify.tracing.blocks import KEPT, Stack


class Uneven(Exception):  # it is no error: the model is then traced whole
    """The graphs of a stack's traced blocks do not follow each other in the same way."""


def unroll(short: fx.GraphModule, model: nn.Module, stack: Stack) -> fx.GraphModule:
    """Return the graph of a model from that of the model with a shortened stack, by repeating the last traced block.

    Args:
        short: The graph with the first `KEPT` blocks of the stack.
        model: The whole model, which holds the parameters of all blocks.
        stack: What `equal_stacks` found.

    Raises:
        Uneven: The graphs of the traced blocks differ.
    """
    graph = _Unrolled(short.graph, stack).graph
    graph.set_codegen(short.graph._codegen)  # the names of the inputs, and the form of the outputs
    graph.lint()
    attributes = {}
    for node in graph.nodes:
        if node.op in {"get_attr", "call_module"}:
            holder = model if _is_inside(str(node.target), stack.path) else short
            attributes[str(node.target)] = attrgetter(str(node.target))(holder)
    return fx.GraphModule(attributes, graph)


class _Unrolled:
    """A copy of a graph in which the last traced block of a stack is repeated.

    Attributes:
        graph: The copy.
        chains: By node of the last traced block: its copies for the block before, for its own, and for each after.
        newer: By node of the block before: the same node of the last.
        copies: All other nodes in the copy.
    """

    def __init__(self, short: fx.Graph, stack: Stack) -> None:
        self.graph, self.stack = fx.Graph(), stack
        first, before, last = (list(_nodes_of(short, f"{stack.path}.{name}")) for name in stack.names[:KEPT])
        if [_form(node) for node in before] != [_form(node) for node in last]:
            raise Uneven
        if not set(first).isdisjoint(operand for node in last for operand in node.all_input_nodes):
            raise Uneven
        self.chains: dict[fx.Node, list[fx.Node]] = {node: [] for node in last}
        self.newer = dict(zip(before, last, strict=True))
        self.copies: dict[fx.Node, fx.Node] = {}
        body = [node for node in last if node.op != "get_attr"]
        ends = {nodes[-1]: nodes for nodes in (*_runs_of_parameters(last), body) if nodes}
        for node in short.nodes:
            self._copy(node)
            for number in range(KEPT, len(stack.names) if node in ends else 0):
                for repeated in ends[node]:
                    self.chains[repeated].append(self._copied(repeated, number))

    def _copy(self, node: fx.Node) -> None:
        """Copy a node of the short graph; what stands outside the stack takes what the last block gives."""
        of_last = self.newer.get(node, node)
        if of_last in self.chains:
            self.chains[of_last].append(self._copied(node, KEPT - 1))
        else:
            self.copies[node] = self._copied(node, len(self.stack.names) - 1)

    def _copied(self, node: fx.Node, number: int) -> fx.Node:
        """Copy a node as one that stands in block `number`, if it is of the last traced block."""

        def moved(operand: fx.Node) -> fx.Node:
            if operand in self.copies:
                return self.copies[operand]
            chain = self.chains[self.newer.get(operand, operand)]
            place = number - 1 - (operand in self.newer)
            if place >= len(chain):
                raise Uneven  # something before the stack reads what a block gives
            return chain[place]

        copy = self.graph.node_copy(node, moved)
        copy.meta = dict(node.meta)
        if number >= KEPT and node in self.chains:
            self._rename(copy, self.stack.names[number])
        return copy

    def _rename(self, copy: fx.Node, name: str) -> None:
        """Give a node that was copied from the last traced block the names of another block."""
        old, new = f"{self.stack.path}.{self.stack.names[KEPT - 1]}", f"{self.stack.path}.{name}"

        def renamed(path: str) -> str:
            return new + path[len(old) :] if _is_inside(path, old) else path

        if isinstance(copy.target, str):
            copy.target = renamed(copy.target)
        modules = copy.meta.get("nn_module_stack", {})
        copy.meta["nn_module_stack"] = {renamed(key): (renamed(path), kind) for key, (path, kind) in modules.items()}


def _nodes_of(graph: fx.Graph, path: str) -> Iterator[fx.Node]:
    """Yield a block's nodes: its parameters, and what it computes."""
    for node in graph.nodes:
        paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        if node.op == "get_attr":
            paths = [str(node.target)]
        if any(_is_inside(inside, path) for inside in paths):
            yield node


def _runs_of_parameters(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield the parameters, and then the buffers: each kind stands together in a graph."""
    run: list[fx.Node] = []
    for node in nodes:
        if node.op != "get_attr":
            continue
        if run and node.prev is not run[-1]:
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def _is_inside(path: str, outer: str) -> bool:
    return path == outer or path.startswith((f"{outer}.", f"{outer}@"))


def _form(node: fx.Node) -> tuple[str, object, int]:
    return node.op, None if node.op == "get_attr" else node.target, len(node.all_input_nodes)
