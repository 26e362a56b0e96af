"""Lower the opaque nodes of an exported graph to calls of model-local functions in standard ONNX.

Before:  y = moeify::Experts(x, expert_ids, weights, up, down) {activation='silu', gated=1}
After:   y = moeify::SparseMoE(x, expert_ids, weights, up.0, …, up.7, down.0, …, down.7)

The stacked weights become one initializer per expert, views of the same memory. Layers of one kind share a function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export import standard
from moeify.export.clamped_gate import gate_of
from moeify.export.constants import ConstantReader
from moeify.export.translate import DOMAIN, EXPERTS, GROUPED_LINEAR


def lower_standard(model: ir.Model) -> None:
    """Replace every opaque node of `model`, in place.

    Raises:
        RefusedError: the weights of a layer are not constants of the graph.
    """
    lowering = _Lowering(model)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == EXPERTS:
            lowering.experts(node)
        elif node.domain == DOMAIN and node.op_type == GROUPED_LINEAR:
            lowering.grouped_linear(node)
    if lowering.names:
        model.opset_imports[DOMAIN] = 1
    else:
        model.opset_imports.pop(DOMAIN, None)
    lowering.constants.remove_unused()


class _Lowering:
    """One run over a model: the functions made so far."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.constants = ConstantReader(model.graph)
        self.names: dict[tuple[Any, ...], str] = {}

    def experts(self, node: ir.Node) -> None:
        x, ids, weights, *stacked = node.inputs
        stacked += [None] * (4 - len(stacked))
        up, _, up_bias, down_bias = stacked
        assert x is not None and up is not None
        kind = standard.Kind(
            experts=_count(up),
            activation=node.attributes["activation"].as_string(),
            gated=bool(node.attributes["gated"].as_int()),
            up_bias=up_bias is not None,
            down_bias=down_bias is not None,
            dtype=_dtype(x),
            clamped=gate_of(node),
            complete=_complete(ids, _count(up)),
        )
        name = self._function("SparseMoE", (kind,), standard.sparse_moe)
        self._call(node, name, [x, ids, weights], stacked)

    def grouped_linear(self, node: ir.Node) -> None:
        x, w, b, offsets = node.inputs
        assert x is not None and w is not None
        name = self._function("GroupedLinear", (_count(w), b is not None, _dtype(x)), standard.grouped_linear)
        self._call(node, name, [x, offsets], [w, b])

    def _function(self, base: str, key: tuple[Any, ...], build: Any) -> str:
        """Return the name of the function for a key; the first of its kind has the plain name."""
        known = self.names.get((base, *key))
        if known is not None:
            return known
        others = sum(1 for other in self.names if other[0] == base)
        name = base if not others else f"{base}{others + 1}"
        function = ir.serde.deserialize_function(build(*key, name))
        self.model.functions[function.identifier()] = function
        self.names[(base, *key)] = name
        return name

    def _call(
        self, node: ir.Node, name: str, inputs: list[ir.Value | None], stacked: Iterable[ir.Value | None]
    ) -> None:
        parameters = [part for value in stacked if value is not None for part in self.constants.unstack(value)]
        output = ir.Value(name=node.outputs[0].name, shape=node.outputs[0].shape, type=node.outputs[0].type)
        call = ir.Node(DOMAIN, name, [*inputs, *parameters], outputs=[output], name=node.name)
        ir.convenience.replace_nodes_and_values(self.model.graph, node, [node], [call], node.outputs, call.outputs)


def _complete(ids: ir.Value | None, experts: int) -> bool:
    """Whether expert ids are the places of the largest of as many numbers as there are experts."""
    node = None if ids is None else ids.producer()
    if node is None or node.op_type != "TopK" or node.inputs[0] is None:
        return False
    shape = node.inputs[0].shape
    return shape is not None and shape[-1] == experts


def _count(stacked: ir.Value) -> int:
    if stacked.shape is None or not isinstance(stacked.shape[0], int):
        raise RefusedError(f"the number of experts of {stacked.name} is not a constant: export a model with fixed ones")
    return stacked.shape[0]


def _dtype(x: ir.Value) -> int:
    assert x.dtype is not None
    return int(x.dtype)
