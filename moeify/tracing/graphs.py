"""Making one graph of several: the graphs of a model's parts, and the blocks that torch.export keeps apart.

Everything keeps the name that it has in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, cast

from torch import fx, nn
from torch.fx.node import Argument


class TracedPart(NamedTuple):
    """A graph, and the path of the module that it was traced from ("" for the whole model)."""

    path: str
    graph_module: fx.GraphModule


def join_path(*names: str) -> str:
    """Return the path of a module in a module; "" is the root."""
    return ".".join(filter(None, names))


def union(parts: Sequence[TracedPart], ties: Mapping[str, str]) -> fx.GraphModule:
    """Put graphs side by side in one.

    Args:
        parts: The graphs; they may share parameters.
        ties: For each parameter that has several names, the first of them by the others.

    Returns:
        One graph whose outputs are those of the parts, with `get_attr` targets and module stacks named from the root.
    """
    graph = fx.Graph()
    attributes: dict[str, object] = {}
    outputs: list[Argument] = []
    for number, (path, part) in enumerate(parts):
        copies: dict[fx.Node, fx.Node] = {}
        for node in part.graph.nodes:
            if node.op == "output":
                outputs.append(fx.map_arg(node.args[0], copies.__getitem__))
                continue
            copy = graph.node_copy(node, copies.__getitem__)
            copy.meta = dict(node.meta)
            copies[node] = copy
            if node.op == "placeholder":
                copy.target = f"part{number}_{node.target}"
            elif node.op in {"get_attr", "call_module"}:
                name = join_path(path, str(node.target))
                copy.target = ties.get(name, name)
                attributes[copy.target] = attrgetter(str(node.target))(part)
            _name_from_the_root(copy, path)
    graph.output(tuple(outputs))
    graph.lint()
    return fx.GraphModule(attributes, graph)


def _name_from_the_root(node: fx.Node, path: str) -> None:
    stack = node.meta.get("nn_module_stack")
    if path and stack:
        outer = {"": ("", "")}
        inner = {f"{path}.{key}": (join_path(path, inside), kind) for key, (inside, kind) in stack.items()}
        node.meta["nn_module_stack"] = outer | inner


def name_by_first_path(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Name modules that a model holds under several paths by the first of them, as their parameters are named."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        known = first.setdefault(id(module), path)
        if known != path:
            aliases[path] = known
    for node in graph_module.graph.nodes if aliases else ():
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths = {key: (path.partition("@"), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = {
                key: (aliases.get(path, path) + at + call, kind) for key, ((path, at, call), kind) in paths.items()
            }


def inline_blocks(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Put the bodies of `with torch.no_grad()` and `with autocast` blocks where they are called, for analysis."""
    graph = graph_module.graph
    if not any(_body_position(node) is not None for node in graph.nodes):
        return graph_module  # most models: compiling a graph again takes long
    while calls := [node for node in graph.nodes if _body_position(node) is not None]:
        for call in calls:
            position = _body_position(call) or 0
            body_node = call.args[position]
            assert isinstance(body_node, fx.Node)
            prefix = str(body_node.target)
            body = attrgetter(prefix)(graph_module)
            values = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[position + 1 :], strict=True))
            with graph.inserting_before(call):
                results = _copy_body(graph, body, prefix, values)
            for user in list(call.users):
                user.replace_all_uses_with(results[cast("int", user.args[1])])
                graph.erase_node(user)
            graph.erase_node(call)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _body_position(node: fx.Node) -> int | None:
    """Return which argument of a call is the body of a block, or None if the call is no block."""
    if node.op != "call_function":
        return None
    return {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(getattr(node.target, "__name__", ""))


def _copy_body(
    graph: fx.Graph, body: fx.GraphModule, prefix: str, values: dict[fx.Node, Argument]
) -> Sequence[fx.Node]:
    """Copy the nodes of a body into a graph, and return its outputs."""
    for node in body.graph.nodes:
        if node.op == "output":
            return cast("Sequence[fx.Node]", fx.map_arg(node.args[0], values.__getitem__))
        if node.op != "placeholder":
            copy = graph.node_copy(node, values.__getitem__)
            values[node] = copy
            if node.op in {"get_attr", "call_module"}:
                copy.target = f"{prefix}.{node.target}"
    return ()
