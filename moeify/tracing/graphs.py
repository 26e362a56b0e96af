"""Several graphs become one: parts of a model beside each other, and blocks that torch.export set apart put back.

Everything keeps the name that the whole model gives to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import fx, nn

Part = tuple[str, fx.GraphModule]


def union(parts: Sequence[Part], ties: Mapping[str, str]) -> fx.GraphModule:
    """Put graphs beside each other.

    Args:
        parts: Each with the path of the module that it was traced from ("" for the whole model).
        ties: The one name of each parameter that has several, by its other names: parts may share a parameter.

    Returns:
        One graph whose outputs are the parts' outputs, `get_attr` targets and module stacks named from the root.
    """
    graph = fx.Graph()
    attributes: dict[str, Any] = {}
    outputs: list[Any] = []
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
                name = _join(path, str(node.target))
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
        inner = {f"{path}.{key}": (_join(path, inside), kind) for key, (inside, kind) in stack.items()}
        node.meta["nn_module_stack"] = outer | inner


def _join(path: str, inside: str) -> str:
    return ".".join(part for part in (path, inside) if part)


def name_by_first_path(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Let nodes of a module that a model holds under several paths all name the first, as its parameters do."""
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
    if not any(_block_position(node) is not None for node in graph.nodes):
        return graph_module  # most models: compiling a graph anew takes long
    while calls := [node for node in graph.nodes if _block_position(node) is not None]:
        for call in calls:
            position = _block_position(call) or 0
            body_node = call.args[position]
            assert isinstance(body_node, fx.Node)
            prefix = str(body_node.target)
            body = attrgetter(prefix)(graph_module)
            values = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[position + 1 :], strict=True))
            with graph.inserting_before(call):
                results = _copy_body(graph, body, prefix, values)
            for user in list(call.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(call)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _block_position(node: fx.Node) -> int | None:
    """Where a call keeps the body of a block, None when it is no block."""
    if node.op != "call_function":
        return None
    return {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(getattr(node.target, "__name__", ""))


def _copy_body(graph: fx.Graph, body: fx.GraphModule, prefix: str, values: dict[fx.Node, Any]) -> Any:
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if node.op != "placeholder":
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in {"get_attr", "call_module"}:
                values[node].target = f"{prefix}.{node.target}"
    return ()
