"""Lower the opaque nodes of a graph to calls of model-local functions in standard ONNX.

Before:  y = moeify::Experts(x, expert_ids, weights, up, down) {activation='silu', gated=1}
After:   y = moeify::SparseMoE(x, expert_ids, weights, up.0, …, up.7, down.0, …, down.7)

The stacked weights become one initializer per expert, views of the same memory. Layers of one kind share a function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import onnx_ir as ir

from moeify.export.capture.opaque import DOMAIN, EXPERTS
from moeify.export.lower import functions
from moeify.export.lower.experts import Experts, dtype_of, experts_of, opaque_nodes
from moeify.export.lower.weights import Weights


def lower_standard(model: ir.Model) -> None:
    """Replace every opaque node of `model`, in place.

    Raises:
        RefusedError: the weights of a layer are not constants of the graph.
    """
    lowering = _Lowering(model)
    for node in opaque_nodes(model):
        if node.op_type == EXPERTS:
            lowering.experts(node)
        else:
            lowering.grouped_linear(node)
    if lowering.names:
        model.opset_imports[DOMAIN] = 1
    else:
        model.opset_imports.pop(DOMAIN, None)
    lowering.weights.remove_unused()


class _Lowering:
    """One run over a model: the functions made so far."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.weights = Weights(model.graph)
        self.names: dict[tuple[str, Hashable], str] = {}

    def experts(self, node: ir.Node) -> None:
        layer = Experts.read(node)
        kind = functions.LayerKind(
            experts=layer.count,
            activation=layer.activation,
            gated=layer.gated,
            up_bias=layer.up_bias is not None,
            down_bias=layer.down_bias is not None,
            dtype=layer.dtype,
            clamped=layer.clamped,
            complete=_complete(layer),
        )
        name = self._function("SparseMoE", kind, lambda name: functions.sparse_moe(kind, name))
        stacked = [layer.up, layer.down, layer.up_bias, layer.down_bias]
        self._call(node, name, [layer.x, layer.expert_ids, layer.weights], stacked)

    def grouped_linear(self, node: ir.Node) -> None:
        x, w, b, offsets = node.inputs
        assert x is not None and w is not None
        kind = (experts_of(w), b is not None, dtype_of(x))
        name = self._function("GroupedLinear", kind, lambda name: functions.grouped_linear(*kind, name))
        self._call(node, name, [x, offsets], [w, b])

    def _function(self, base: str, kind: Hashable, build: Callable[[str], ir.Function]) -> str:
        """Return the name of the function for a kind; the first of its base has the plain name."""
        if (base, kind) not in self.names:
            others = sum(1 for other, _ in self.names if other == base)
            function = build(f"{base}{others + 1}" if others else base)
            self.model.functions[function.identifier()] = function
            self.names[base, kind] = function.name
        return self.names[base, kind]

    def _call(
        self, node: ir.Node, name: str, inputs: Sequence[ir.Value | None], stacked: Sequence[ir.Value | None]
    ) -> None:
        parameters = [part for value in stacked if value is not None for part in self.weights.unstack(value)]
        output = ir.Value(name=node.outputs[0].name, shape=node.outputs[0].shape, type=node.outputs[0].type)
        call = ir.Node(DOMAIN, name, [*inputs, *parameters], outputs=[output], name=node.name)
        ir.convenience.replace_nodes_and_values(self.model.graph, node, [node], [call], node.outputs, call.outputs)


def _complete(layer: Experts) -> bool:
    """Whether expert ids are the places of the largest of as many numbers as there are experts."""
    node = layer.expert_ids.producer()
    if node is None or node.op_type != "TopK" or node.inputs[0] is None:
        return False
    shape = node.inputs[0].shape
    return shape is not None and shape[-1] == layer.count
