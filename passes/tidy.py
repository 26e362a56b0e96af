"""Drop what nothing reads any more: parameters of replaced layers, and the modules that held them."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from moeify.passes import dataflow as flow


def drop_unused(graph_module: fx.GraphModule, keep: Collection[str]) -> None:
    """Delete parameters and buffers that no node reads, then modules that are empty.

    Args:
        graph_module: Changed in place; its graph too, where nodes go that only prepare unused parameters.
        keep: Paths of modules that are left alone.
    """
    graph = graph_module.graph
    static: dict[fx.Node, bool] = {}
    for node in reversed(list(graph.nodes)):
        prepares = node.op == "get_attr" or (node.all_input_nodes and not flow.writes(node))
        if prepares and not node.users and node.op != "output" and flow.is_static(node, static):
            graph.erase_node(node)
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    called = {str(node.target) for node in graph.find_nodes(op="call_module")} | set(keep)
    called |= {path for path, _ in graph_module.named_modules() if path in read}  # blocks that an operator runs
    for path, module in list(graph_module.named_modules()):
        if any(path == name or path.startswith(f"{name}.") for name in called):
            continue
        for held in (module._parameters, module._buffers):
            for name in [n for n in held if _join(path, n) not in read]:
                del held[name]
    _drop_empty(graph_module, "", read | called)


def _drop_empty(module: nn.Module, path: str, read: Collection[str]) -> None:
    for name, child in list(module.named_children()):
        inside = _join(path, name)
        if inside in read:
            continue
        _drop_empty(child, inside, read)
        if not (child._parameters or child._buffers or child._modules):
            delattr(module, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
