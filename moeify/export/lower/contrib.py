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
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from moeify.errors import RefusedError
from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.capture.interface import EXPERTS
from moeify.export.lower.experts import Experts, LayerKind, opaque_nodes, read_experts
from moeify.export.lower.functions import in_range
from moeify.export.lower.tape import Attribute, Tape
from moeify.export.lower.weights import Rounded, add, add_lazy, quantize, stored
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
    if operator.min_experts:
        able = [node for node in nodes if why_not(node, operator) is None]
        nodes = [node for node in able if read_experts(node).kind.experts >= operator.min_experts]
    for node in nodes:
        reason = why_not(node, operator)
        if reason is not None:
            raise RefusedError(
                f"{_place(node)} cannot become com.microsoft::{operator.name}: {reason}; the portable target, without "
                "quantize, takes any model"
            )
    rounded: Rounded = {}
    for node in nodes:
        _lower(model.graph, node, operator, rounded)
    if nodes:
        model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)
    return rounded


def why_not(node: ir.Node, operator: Operator) -> str | None:
    """Say why an opaque node cannot become MoE or QMoE; None if it can."""
    if node.op_type != EXPERTS:
        return "its experts compute something between the projections that moeify has no name for"
    layer = read_experts(node)
    activation, gated = layer.kind.activation, "gated " * layer.kind.gated
    known = _GATED if gated else _PLAIN
    if activation not in known:
        return f"the operator has no {gated}{activation}: it has {', '.join(gated + name for name in known)}"
    if _choices(layer) is None:
        return "the number of experts per token is not a constant"
    sizes = [size for size in (layer.stacked["down"].shape or ())[1:] if isinstance(size, int)]
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


def _choices(layer: Experts) -> int | None:
    """The number of experts per token, None if it is no constant."""
    choices = None if layer.ids.shape is None else layer.ids.shape[1]
    return choices if isinstance(choices, int) else None


def _lower(graph: ir.Graph, node: ir.Node, operator: Operator, rounded: Rounded) -> None:
    """Replace a node; adds to `rounded`."""
    tape, layer = Tape(), read_experts(node)
    logits, total = _routing(tape, layer)
    alternate = layer.kind.gated and not (layer.kind.clamped and layer.kind.clamped.alternating)
    operands: list[ir.Value | None] = [layer.x, logits]
    for part, rows_alternate in (("up", alternate), ("down", False)):
        weight, bias = layer.stacked[part], layer.stacked.get(f"{part}_bias")
        if operator.bits is None:
            operands.append(_as_taken(graph, weight, rows_alternate))
        else:
            operands += _quantized(graph, weight, operator, rows_alternate, rounded)
        operands.append(None if bias is None else _as_taken(graph, bias, rows_alternate))
    if operands[-1] is None:
        operands.pop()
    attributes = {"k": _choices(layer) or 0, "normalize_routing_weights": 1, **_activation(layer.kind)}
    y = tape(operator.name, *operands, domain=MICROSOFT, **attributes, **operator.all_attributes)
    old = node.outputs[0]
    out = tape.op("Mul", [y, total], output=ir.Value(name=old.name, shape=old.shape, type=old.type))
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [out])


def _as_taken(graph: ir.Graph, stacked: ir.Value, alternate: bool) -> ir.Value:
    """Return a weight as the operator takes it, a new one where that is not what is stored."""
    if not alternate and stacked.producer() is None:
        return stacked
    weight = stored(stacked)
    make = partial(interleaved, weight.tensor) if alternate else weight.tensor.contiguous
    return add_lazy(graph, f"{weight.name}.moe", make, weight.tensor)


def _quantized(
    graph: ir.Graph, stacked: ir.Value, operator: Operator, alternate: bool, rounded: Rounded
) -> list[ir.Value]:
    """Return a weight in few bits and its scales; adds to `rounded`."""
    weight = stored(stacked)
    parts = quantize(interleaved(weight.tensor) if alternate else weight.tensor, operator.bits or 8, operator.block)

    def values() -> Tensor:
        used = parts.dequantized()
        apart = torch.cat((used[:, ::2], used[:, 1::2]), dim=1) if alternate else used
        return apart.permute(weight.axes)

    rounded[weight.name] = values
    names = f"{weight.name}.quantized", f"{weight.name}.scales"
    return [
        add(graph, name, TorchTensor(tensor, name=name))
        for name, tensor in zip(names, (parts.packed, parts.scales), strict=True)
    ]


def _activation(kind: LayerKind) -> dict[str, Attribute]:
    """The attributes that say what stands between the projections."""
    if not kind.gated:
        return {"activation_type": _PLAIN[kind.activation], "swiglu_fusion": 0}
    gate = kind.clamped or ClampedGate(_GATED[kind.activation], 0.0, math.inf, alternating=False)
    attributes: dict[str, Attribute] = {"activation_type": "swiglu", "swiglu_fusion": 1}
    attributes |= {"activation_alpha": gate.alpha, "activation_beta": gate.beta}
    return attributes if math.isinf(gate.limit) else {**attributes, "swiglu_limit": gate.limit}


def _routing(tape: Tape, layer: Experts) -> tuple[ir.Value, ir.Value]:
    """Return the logits (T, E) that make the operator use the given weights, and the sum of these (T, 1)."""
    experts, dtype, float32 = layer.kind.experts, layer.kind.dtype, ir.DataType.FLOAT
    ids = in_range(tape, layer.ids, experts)
    shape = tape("Concat", tape("Shape", layer.ids, start=0, end=1), tape.ints([experts + 1]), axis=0)
    weights = tape("Cast", layer.weights, to=float32)
    scattered = tape("ScatterElements", tape.zeros(shape, float32), ids, weights, axis=1, reduction="add")
    gates = tape("Slice", scattered, tape.ints([0]), tape.ints([experts]), tape.ints([1]))
    total = tape("ReduceSum", gates, tape.ints([1]), keepdims=1)
    logits = tape("Max", tape("Log", gates), tape.number(_NOT_CHOSEN, float32))
    return tape("Cast", logits, to=dtype), tape("Cast", total, to=dtype)
