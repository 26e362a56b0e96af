"""Lower opaque expert nodes to ONNX Runtime's own operators, `com.microsoft::MoE` and `QMoE`.

Before:  y = moeify::Experts(x, expert_ids, weights, up, down) {activation='silu', gated=1}
After:   gates = scatter of weights into (T, E); y = MoE(x, log(gates), up', '', down) · Σ gates

The operator takes logits, keeps the k largest and normalises their softmax. With log(gate) at the chosen experts and a
large negative number elsewhere, the weights that it computes are gate / Σ gates, whatever router made them.
`normalize_routing_weights=1` always: without it ONNX Runtime up to 1.31 may overwrite the input on the CPU.

Shape legend: T tokens, K choices per token, E experts, H hidden, I intermediate, J rows of the first weight.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tape as ir_tape
from torch import Tensor

from moeify.errors import RefusedError
from moeify.export.clamped_gate import gate_of
from moeify.export.constants import ConstantReader, base_name, stored_axes
from moeify.export.quantize import Quantized, quantize
from moeify.export.translate import DOMAIN, EXPERTS, GROUPED_LINEAR
from moeify.kernels.activations import QUICK_GELU_SCALE

MICROSOFT = "com.microsoft"
_NOT_CHOSEN = -1e4  # as a logit; finite, so that a token that chose no expert gives zeros and not NaN, and fits float16
_GATED = {"silu": 1.0, "quick_gelu": QUICK_GELU_SCALE}  # the scale of gate · sigmoid(scale · gate) · up
_PLAIN = {"silu": "silu", "relu": "relu", "gelu_tanh": "gelu"}  # the operator's gelu is the tanh approximation
_CUDA_WIDTHS = 8  # CUDA loads 16 bytes at a time: ONNX Runtime's docs/contrib_ops/cuda/moe_qmoe.md, section 4.2
_CUDA_QUANTIZED_WIDTHS = 64  # rows of a tile of its packed weights, section 6.1

Rounded = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Contrib:
    """How expert nodes are written.

    Attributes:
        bits: 8 or 4 for QMoE, None for MoE.
        block: Values that share a scale; None for one scale per row.
        cuda: Whether the CUDA kernels are to run them.
    """

    bits: int | None = None
    block: int | None = None
    cuda: bool = False

    @property
    def widths(self) -> int:
        """What hidden and intermediate sizes must be multiples of."""
        aligned = (_CUDA_QUANTIZED_WIDTHS if self.bits else _CUDA_WIDTHS) if self.cuda else 1
        return max(aligned, self.block or 1)


def why_not(node: ir.Node, how: Contrib) -> str | None:
    """Say why an opaque node cannot become MoE or QMoE; None if it can."""
    if node.op_type == GROUPED_LINEAR:
        return "its experts compute something between the products that moeify has no name for"
    activation, gated = node.attributes["activation"].as_string(), bool(node.attributes["gated"].as_int())
    known = _GATED if gated else _PLAIN
    if activation not in known:
        form = "gated " * gated + activation
        return f"the operator has no {form}: it has {', '.join('gated ' * gated + name for name in known)}"
    choices = node.inputs[1]
    assert choices is not None
    if choices.shape is None or not isinstance(choices.shape[1], int):
        return "the number of experts per token is not a constant"
    down = node.inputs[4]
    assert down is not None and down.shape is not None
    widths = [int(size) for size in down.shape[1:] if isinstance(size, int)]
    if any(width % how.widths for width in widths):
        who = f"{how.bits}-bit weights{' on CUDA' * how.cuda}" if how.bits else "CUDA kernels"
        return f"{who} need widths that are multiples of {how.widths}, not {widths}"
    return None


def lower_contrib(model: ir.Model, how: Contrib, *, only: list[ir.Node] | None = None) -> Rounded:
    """Replace opaque nodes of `model`, in place.

    Args:
        model: From `to_onnx`.
        how: MoE or QMoE.
        only: The nodes to replace; None replaces all, or refuses.

    Returns:
        For each weight that was rounded, what makes the values that the operator computes with.

    Raises:
        RefusedError: a node cannot be expressed; the message names it and says why.
    """
    opaque = [n for n in model.graph if n.domain == DOMAIN and n.op_type in {EXPERTS, GROUPED_LINEAR}]
    nodes = opaque if only is None else only
    for node in nodes:
        reason = why_not(node, how)
        if reason is not None:
            operator = "QMoE" if how.bits else "MoE"
            raise RefusedError(
                f"{_place(node)} cannot become com.microsoft::{operator}: {reason}; the portable target, without "
                "quantize, takes any model"
            )
    constants = ConstantReader(model.graph)
    rounded: Rounded = {}
    for node in nodes:
        rounded |= _lower(model, node, how, constants)
    if nodes:
        model.opset_imports[MICROSOFT] = 1
    constants.remove_unused()
    return rounded


def round_activations(model: ir.Model) -> None:
    """Let every QMoE round activations to 8 bits inside the experts: its CPU kernel is several times faster so."""
    for node in model.graph:
        if node.op_type == "QMoE":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)


def _place(node: ir.Node) -> str:
    """The module that a node comes from, and its class, as the exporter noted them; else the node's own name."""
    notes = [node.metadata_props.get(f"pkg.torch.onnx.{key}") for key in ("name_scopes", "class_hierarchy")]
    if None in notes:
        return str(node.name)
    module, kind = (ast.literal_eval(str(note))[-2] for note in notes)
    return f"{module.removeprefix('model.')} ({kind.rpartition('.')[-1]})"


def _lower(model: ir.Model, node: ir.Node, how: Contrib, constants: ConstantReader) -> Rounded:
    x, ids, weights, up, down, *biases = node.inputs
    assert x is not None and ids is not None and weights is not None and up is not None and down is not None
    assert x.dtype is not None and ids.shape is not None and up.shape is not None
    tape = ir_tape.Tape()
    logits, total = _routing(tape, ids, weights, int(up.shape[0]), x.dtype)  # type: ignore[arg-type]
    attributes = {"k": int(ids.shape[1]), "normalize_routing_weights": 1, **_activation(node)}  # type: ignore[arg-type]
    gate = gate_of(node)
    alternate = bool(node.attributes["gated"].as_int()) and not (gate and gate.alternating)
    up_bias, down_bias = [*biases, None, None][:2]
    bias_1 = None if up_bias is None else _added(constants, up_bias, alternate)
    rounded: Rounded = {}
    if how.bits is None:
        name, operands = "MoE", [_added(constants, up, alternate), bias_1, _added(constants, down, False), down_bias]
    else:
        name, attributes = "QMoE", attributes | _quantized_attributes(how)
        first, rounded_up = _quantized(constants, up, how, alternate)
        second, rounded_down = _quantized(constants, down, how, False)
        operands, rounded = [*first, bias_1, *second, down_bias], rounded_up | rounded_down
    while operands[-1] is None:
        operands.pop()
    y = tape.op(name, [x, logits, *operands], attributes, domain=MICROSOFT)
    old = node.outputs[0]
    out = tape.op("Mul", [y, total], output=ir.Value(name=old.name, shape=old.shape, type=old.type))
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [out])
    return rounded


def _activation(node: ir.Node) -> dict[str, Any]:
    """The attributes that say what stands between the products."""
    activation, gate = node.attributes["activation"].as_string(), gate_of(node)
    if not node.attributes["gated"].as_int():
        return {"activation_type": _PLAIN[activation], "swiglu_fusion": 0}
    alpha, beta, limit = (_GATED[activation], 0.0, math.inf) if gate is None else (gate.alpha, gate.beta, gate.limit)
    swiglu = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": alpha, "activation_beta": beta}
    return swiglu if math.isinf(limit) else {**swiglu, "swiglu_limit": limit}


def _routing(
    tape: ir_tape.Tape, ids: ir.Value, weights: ir.Value, experts: int, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Return the logits (T, E) that make the operator use the given weights, and the sum of these (T, 1)."""
    end = _constant(tape, experts)
    inside = tape.op("And", [tape.op("GreaterOrEqual", [ids, _constant(tape, 0)]), tape.op("Less", [ids, end])])
    places = tape.op("Where", [inside, ids, end])
    tokens = tape.op("Shape", [ids], {"start": 0, "end": 1})
    shape = tape.op("Concat", [tokens, _constant(tape, [experts + 1])], {"axis": 0})
    zeros = tape.op("ConstantOfShape", [shape], {"value": ir.tensor([0.0], dtype=ir.DataType.FLOAT)})
    scattered = tape.op(
        "ScatterElements",
        [zeros, places, tape.op("Cast", [weights], {"to": ir.DataType.FLOAT})],
        {"axis": 1, "reduction": "add"},
    )
    gates = tape.op("Slice", [scattered, _constant(tape, [0]), _constant(tape, [experts]), _constant(tape, [1])])
    total = tape.op("ReduceSum", [gates, _constant(tape, [1])], {"keepdims": 1})
    floor = tape.op("Constant", [], {"value": ir.tensor(_NOT_CHOSEN, dtype=ir.DataType.FLOAT)})
    logits = tape.op("Max", [tape.op("Log", [gates]), floor])
    return tape.op("Cast", [logits], {"to": dtype}), tape.op("Cast", [total], {"to": dtype})


def _constant(tape: ir_tape.Tape, value: Any) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(value, dtype=ir.DataType.INT64)})


def _added(constants: ConstantReader, stacked: ir.Value, alternate: bool) -> ir.Value:
    """Add a weight as the operator takes it, where that is not how it is stored: gate and up rows alternate."""
    if not alternate and stacked.producer() is None:
        return stacked
    tensor = constants.tensor(stacked)
    make = (lambda: interleaved(tensor)) if alternate else tensor.contiguous
    return constants.add_lazy(f"{base_name(stacked)}.moe", make, tensor)


def interleaved(stacked: Tensor) -> Tensor:
    """Return (E, 2I, …) with rows gate 0, up 0, gate 1, up 1, … of one with gate rows, then up rows."""
    gate, up = stacked.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _quantized(
    constants: ConstantReader, stacked: ir.Value, how: Contrib, alternate: bool
) -> tuple[tuple[ir.Value, ir.Value], Rounded]:
    tensor, name, axes = constants.tensor(stacked).detach(), base_name(stacked), stored_axes(stacked)
    parts: Quantized = quantize(interleaved(tensor) if alternate else tensor, how.bits or 8, how.block)

    def rounded() -> Tensor:
        weights = parts.dequantized()
        apart = torch.cat((weights[:, ::2], weights[:, 1::2]), dim=1) if alternate else weights
        return apart.permute(axes)

    packed = constants.add(f"{name}.quantized", parts.packed)
    return (packed, constants.add(f"{name}.scales", parts.scales)), {name: rounded}


def _quantized_attributes(how: Contrib) -> dict[str, Any]:
    attributes: dict[str, Any] = {"expert_weight_bits": how.bits}
    if how.block:
        attributes["block_size"] = how.block
    if how.cuda:  # else CUDA takes the bytes for packed ones, and gives noise; versions before 1.28 do not know it
        attributes["weights_prepacked"] = 0
    return attributes
