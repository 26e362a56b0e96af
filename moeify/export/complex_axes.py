"""Complex numbers, as rotary embeddings are written with, where torch.onnx has no translation for them.

Before:  z = unsqueeze(c, dim)                                     (c complex)
After:   z = view_as_complex(unsqueeze(view_as_real(c), dim))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_ATEN: Any = torch.ops.aten


def unsqueeze_real_parts(graph_module: fx.GraphModule) -> None:
    """Let every new axis of a complex tensor be one of its real and imaginary parts; in place."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_ATEN.unsqueeze.default):
        value: torch.Tensor = node.meta["val"]
        if not value.is_complex():
            continue
        with graph.inserting_before(node):
            parts = _call(graph, _ATEN.view_as_real.default, node.args[0])
            wider = _call(graph, _ATEN.unsqueeze.default, parts, node.args[1] % value.dim())
            node.replace_all_uses_with(_call(graph, _ATEN.view_as_complex.default, wider))
        graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return node
