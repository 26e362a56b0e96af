"""Lower opaque expert nodes to ONNX Runtime's own operators, `com.microsoft::MoE` and `QMoE`.

Before:  y = moeify::Experts(x, expert_ids, weights, up, down) {activation='silu', gated=1}
After:   gates = scatter of weights into (T, E); y = MoE(x, log(gates), up', '', down) · Σ gates

The operator takes logits, keeps the k largest and normalizes their softmax. With log(gate) at the chosen experts and a
large negative number elsewhere, the weights that it computes are gate / Σ gates, whatever router made them.
`normalize_routing_weights=1` always: without it ONNX Runtime up to 1.31 may overwrite the input on the CPU.

Shape legend: T tokens, K choices per token, E experts, H hidden size, I intermediate size, J rows of the up
projections.
"""

from __future__ import annotations

import ast
import math

import onnx_ir as ir
import torch
from torch import Tensor

from moeify.errors import RefusedError
from moeify.export.capture.opaque import EXPERTS
from moeify.export.lower.experts import Experts, opaque_nodes
from moeify.export.lower.quantize import Rounded, quantize
from moeify.export.lower.tape import Attribute, Tape
from moeify.export.lower.weights import Weights, base_name, stored_axes
from moeify.export.targets import Operator
from moeify.kernels.activations import QUICK_GELU_SCALE

MICROSOFT = "com.microsoft"
_NOT_CHOSEN = -1e4  # as a logit; finite, so that a token that chose no expert gives zeros and not NaN, and fits float16
_GATED = {"silu": 1.0, "quick_gelu": QUICK_GELU_SCALE}  # the scale of gate · sigmoid(scale · gate) · up
_PLAIN = {"silu": "silu", "relu": "relu", "gelu_tanh": "gelu"}  # the operator's gelu is the tanh approximation


def lower_contrib(model: ir.Model, operator: Operator) -> Rounded:
    """Replace opaque nodes of `model`, in place: all of them, or those that `operator.min_experts` says.

    Returns:
        For each weight that was rounded, what makes the values that the operator computes with.

    Raises:
        RefusedError: a node cannot be expressed; the message names it and says why.
    """
    nodes = opaque_nodes(model)
    reasons = {node: why_not(node, operator) for node in nodes}
    if operator.min_experts:
        able = [node for node in nodes if reasons[node] is None]
        nodes = [node for node in able if Experts.read(node).count >= operator.min_experts]
    for node in nodes:
        if reasons[node] is not None:
            raise RefusedError(
                f"{_place(node)} cannot become com.microsoft::{operator.name}: {reasons[node]}; the portable target, "
                "without quantize, takes any model"
            )
    weights = Weights(model.graph)
    rounded: Rounded = {}
    for node in nodes:
        rounded |= _Layer(node, operator, weights).lower(model.graph)
    if nodes:
        model.opset_imports[MICROSOFT] = 1
    weights.remove_unused()
    return rounded


def why_not(node: ir.Node, operator: Operator) -> str | None:
    """Say why an opaque node cannot become MoE or QMoE; None if it can."""
    if node.op_type != EXPERTS:
        return "its experts compute something between the products that moeify has no name for"
    layer = Experts.read(node)
    known = _GATED if layer.gated else _PLAIN
    if layer.activation not in known:
        gated = "gated " * layer.gated
        return f"the operator has no {gated}{layer.activation}: it has {', '.join(gated + name for name in known)}"
    if layer.choices is None:
        return "the number of experts per token is not a constant"
    assert layer.down.shape is not None
    sizes = [size for size in layer.down.shape[1:] if isinstance(size, int)]
    if any(size % operator.multiple for size in sizes):
        who = f"{operator.bits}-bit weights" if operator.bits else "its kernels"
        return f"{who} need a hidden and an intermediate size that are multiples of {operator.multiple}, not {sizes}"
    return None


def set_attributes(model: ir.Model, operator: Operator) -> None:
    """Give every node of an operator the attributes that it gets after the proof."""
    for node in model.graph:
        if node.domain == MICROSOFT and node.op_type == operator.name:
            for name, value in operator.late_attributes.items():
                node.attributes[name] = ir.AttrInt64(name, value)


def interleaved(stacked: Tensor) -> Tensor:
    """Return (E, 2I, …) with rows gate 0, up 0, gate 1, up 1, … of one with gate rows, then up rows."""
    gate, up = stacked.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _place(node: ir.Node) -> str:
    """The module that a node comes from, and its class, as the exporter noted them; else the node's own name."""
    notes = [node.metadata_props.get(f"pkg.torch.onnx.{key}") for key in ("name_scopes", "class_hierarchy")]
    if None in notes:
        return str(node.name)
    module, kind = (ast.literal_eval(str(note))[-2] for note in notes)
    return f"{module.removeprefix('model.')} ({kind.rpartition('.')[-1]})"


class _Layer:
    """The lowering of one node."""

    def __init__(self, node: ir.Node, operator: Operator, weights: Weights) -> None:
        self.node, self.operator, self.weights = node, operator, weights
        self.experts = Experts.read(node)
        # The operator takes gate and up rows that alternate.
        self.alternate = self.experts.gated and not (self.experts.clamped and self.experts.clamped.alternating)
        self.rounded: Rounded = {}

    def lower(self, graph: ir.Graph) -> Rounded:
        """Replace the node; returns what was rounded."""
        tape, layer, operator = Tape(), self.experts, self.operator
        logits, total = _routing(tape, layer)
        up_bias = None if layer.up_bias is None else self._as_taken(layer.up_bias, self.alternate)
        if operator.bits is None:
            stored = [self._as_taken(layer.up, self.alternate), up_bias, self._as_taken(layer.down, False)]
        else:
            up, down = self._quantized(layer.up, self.alternate), self._quantized(layer.down, False)
            stored = [*up, up_bias, *down]
        operands = [*stored, layer.down_bias]
        while operands[-1] is None:
            operands.pop()
        y = tape(operator.name, layer.x, logits, *operands, domain=MICROSOFT, **self._attributes())
        old = self.node.outputs[0]
        out = tape.op("Mul", [y, total], output=ir.Value(name=old.name, shape=old.shape, type=old.type))
        ir.convenience.replace_nodes_and_values(graph, self.node, [self.node], tape.nodes, [old], [out])
        return self.rounded

    def _attributes(self) -> dict[str, Attribute]:
        operator = self.operator
        attributes: dict[str, Attribute] = {
            "k": self.experts.choices or 0,
            "normalize_routing_weights": 1,
            **_activation(self.experts),
        }
        if operator.bits:
            attributes["expert_weight_bits"] = operator.bits
        if operator.block:
            attributes["block_size"] = operator.block
        return {**attributes, **operator.attributes}

    def _as_taken(self, stacked: ir.Value, alternate: bool) -> ir.Value:
        """Return a weight as the operator takes it; a new one where that is not how it is stored."""
        if not alternate and stacked.producer() is None:
            return stacked
        tensor = self.weights.tensor(stacked)
        make = (lambda: interleaved(tensor)) if alternate else tensor.contiguous
        return self.weights.add_lazy(f"{base_name(stacked)}.moe", make, tensor)

    def _quantized(self, stacked: ir.Value, alternate: bool) -> tuple[ir.Value, ir.Value]:
        """Return a weight in few bits, and its scales."""
        assert self.operator.bits is not None
        tensor, name, axes = self.weights.tensor(stacked).detach(), base_name(stacked), stored_axes(stacked)
        parts = quantize(interleaved(tensor) if alternate else tensor, self.operator.bits, self.operator.block)

        def rounded() -> Tensor:
            weights = parts.dequantized()
            apart = torch.cat((weights[:, ::2], weights[:, 1::2]), dim=1) if alternate else weights
            return apart.permute(axes)

        self.rounded[name] = rounded
        return self.weights.add(f"{name}.quantized", parts.packed), self.weights.add(f"{name}.scales", parts.scales)


def _activation(layer: Experts) -> dict[str, Attribute]:
    """The attributes that say what stands between the projections."""
    if not layer.gated:
        return {"activation_type": _PLAIN[layer.activation], "swiglu_fusion": 0}
    gate = layer.clamped
    alpha, beta, limit = (gate.alpha, gate.beta, gate.limit) if gate else (_GATED[layer.activation], 0.0, math.inf)
    swiglu: dict[str, Attribute] = {
        "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": alpha, "activation_beta": beta
    }  # fmt: skip
    return swiglu if math.isinf(limit) else {**swiglu, "swiglu_limit": limit}


def _routing(tape: Tape, layer: Experts) -> tuple[ir.Value, ir.Value]:
    """Return the logits (T, E) that make the operator use the given weights, and the sum of these (T, 1)."""
    ids, experts, float32 = layer.expert_ids, layer.count, ir.DataType.FLOAT
    end = tape.ints(experts)
    inside = tape("And", tape("GreaterOrEqual", ids, tape.ints(0)), tape("Less", ids, end))
    places = tape("Where", inside, ids, end)
    shape = tape("Concat", tape("Shape", ids, start=0, end=1), tape.ints([experts + 1]), axis=0)
    weights = tape("Cast", layer.weights, to=float32)
    scattered = tape("ScatterElements", tape.zeros(shape, float32), places, weights, axis=1, reduction="add")
    gates = tape("Slice", scattered, tape.ints([0]), tape.ints([experts]), tape.ints([1]))
    total = tape("ReduceSum", gates, tape.ints([1]), keepdims=1)
    logits = tape("Max", tape("Log", gates), tape.number(_NOT_CHOSEN, float32))
    return tape("Cast", logits, to=layer.dtype), tape("Cast", total, to=layer.dtype)
