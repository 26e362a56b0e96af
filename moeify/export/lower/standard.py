"""Lower the opaque nodes of a graph to calls of model-local functions in standard ONNX.

Before:  y = moeify::Experts(x, expert_ids, weights, up, down) {activation='silu', gated=1}
After:   y = moeify::SparseMoE(x, expert_ids, weights, up.0, …, up.7, down.0, …, down.7)

The stacked weights become one initializer per expert, views of the same memory. Layers of one kind share a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from moeify.export.capture.interface import DOMAIN, EXPERTS
from moeify.export.lower.experts import count_of, dtype_of, opaque_nodes, read_experts
from moeify.export.lower.functions import grouped_linear, sparse_moe
from moeify.export.lower.weights import unstacked

Values = Iterable[ir.Value | None]


def lower_standard(model: ir.Model) -> None:
    """Replace every opaque node of `model`, in place.

    Raises:
        RefusedError: the weights of a layer are not constants of the graph.
    """
    names: dict[object, str] = {}
    for node in opaque_nodes(model):
        base, kind, build, inputs, stacked = _read(node)
        if (base, kind) not in names:
            others = sum(1 for name in names.values() if name.startswith(base))
            function = build(f"{base}{others + 1}" if others else base)  # the first of its base has the plain name
            model.functions[function.identifier()] = function
            names[base, kind] = function.name
        parameters = [part for value in stacked if value is not None for part in unstacked(model.graph, value)]
        old = node.outputs[0]
        y = ir.Value(name=old.name, shape=old.shape, type=old.type)
        call = ir.Node(DOMAIN, names[base, kind], [*inputs, *parameters], outputs=[y], name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], [old], [y])
    if names:
        model.opset_imports[DOMAIN] = 1
    else:
        model.opset_imports.pop(DOMAIN, None)
    RemoveUnusedNodesPass()(model)


def _read(node: ir.Node) -> tuple[str, object, Callable[[str], ir.Function], Values, Values]:
    """The name and kind of a node's function, what builds it, the inputs of its call, and its stacked weights."""
    if node.op_type == EXPERTS:
        layer = read_experts(node)
        build = partial(sparse_moe, layer.kind)
        return "SparseMoE", layer.kind, build, [layer.x, layer.ids, layer.weights], layer.stacked.values()
    x, w, b, offsets = node.inputs
    assert x is not None and w is not None
    kind = (count_of(w), b is not None, dtype_of(x))
    return "GroupedLinear", kind, partial(grouped_linear, kind), [x, offsets], [w, b]
