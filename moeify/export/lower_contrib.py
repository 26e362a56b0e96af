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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tape as ir_tape
from torch import Tensor

from moeify.errors import RefusedError
from moeify.export.constants import ConstantReader
from moeify.export.quantize import Quantized, quantize
from moeify.export.translate import DOMAIN, EXPERTS, GROUPED_LINEAR
from moeify.kernels.activations import QUICK_GELU_SCALE

MICROSOFT = "com.microsoft"
_QUANTIZED = ".quantized"
_NOT_CHOSEN = -1e4  # as a logit; finite, so that a token that chose no expert gives zeros and not NaN, and fits float16
_GATED = {"silu": 1.0, "quick_gelu": QUICK_GELU_SCALE}  # the scale of gate · sigmoid(scale · gate) · up
_PLAIN = {"silu": "silu", "relu": "relu", "gelu_tanh": "gelu"}  # the operator's gelu is the tanh approximation
_CUDA_WIDTHS = 8  # CUDA loads 16 bytes at a time: ONNX Runtime's docs/contrib_ops/cuda/moe_qmoe.md, section 4.2
_CUDA_QUANTIZED_WIDTHS = 64  # rows of a tile of its packed weights, section 6.1


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


def lower_contrib(model: ir.Model, how: Contrib, *, only: list[ir.Node] | None = None) -> None:
    """Replace opaque nodes of `model`, in place.

    Args:
        model: From `to_onnx`.
        how: MoE or QMoE.
        only: The nodes to replace; None replaces all, or refuses.

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
    for node in nodes:
        _lower(model, node, how, constants)
    if nodes:
        model.opset_imports[MICROSOFT] = 1
    constants.remove_unused()


def round_activations(model: ir.Model) -> None:
    """Let every QMoE round activations to 8 bits inside the experts: its CPU kernel is several times faster so."""
    for node in model.graph:
        if node.op_type == "QMoE":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)


def rounded_weights(model: ir.Model) -> dict[str, Callable[[], Tensor]]:
    """Return, for each weight that `lower_contrib` rounded, what makes the values that the operator computes with."""
    constants = ConstantReader(model.graph)
    rounded: dict[str, Callable[[], Tensor]] = {}
    for node in model.graph:
        if node.op_type != "QMoE":
            continue
        gated = node.attributes["swiglu_fusion"].as_int() == 1
        block = node.attributes.get("block_size")
        for first, alternate in ((2, gated), (5, False)):
            packed, scales = node.inputs[first], node.inputs[first + 1]
            assert packed is not None and scales is not None
            parts = Quantized(
                constants.tensor(packed),
                constants.tensor(scales),
                node.attributes["expert_weight_bits"].as_int(),
                None if block is None else block.as_int(),
            )
            rounded[str(packed.name).removesuffix(_QUANTIZED)] = partial(_as_stacked, parts, alternate)
    return rounded


def _as_stacked(parts: Quantized, alternate: bool) -> Tensor:
    weights = parts.dequantized()
    return torch.cat((weights[:, ::2], weights[:, 1::2]), dim=1) if alternate else weights


def _place(node: ir.Node) -> str:
    """The module that a node comes from, and its class, as the exporter noted them; else the node's own name."""
    notes = [node.metadata_props.get(f"pkg.torch.onnx.{key}") for key in ("name_scopes", "class_hierarchy")]
    if None in notes:
        return str(node.name)
    module, kind = (ast.literal_eval(str(note))[-2] for note in notes)
    return f"{module.removeprefix('model.')} ({kind.rpartition('.')[-1]})"


def _lower(model: ir.Model, node: ir.Node, how: Contrib, constants: ConstantReader) -> None:
    x, ids, weights, up, down, *biases = node.inputs
    assert x is not None and ids is not None and weights is not None and up is not None and down is not None
    assert x.dtype is not None and ids.shape is not None and up.shape is not None
    tape = ir_tape.Tape()
    logits, total = _routing(tape, ids, weights, int(up.shape[0]), x.dtype)  # type: ignore[arg-type]
    activation, gated = node.attributes["activation"].as_string(), bool(node.attributes["gated"].as_int())
    attributes: dict[str, Any] = {
        "k": int(ids.shape[1]),  # type: ignore[arg-type]
        "normalize_routing_weights": 1,
        "activation_type": "swiglu" if gated else _PLAIN[activation],
        "swiglu_fusion": int(gated),
    }
    if gated:
        attributes |= {"activation_alpha": _GATED[activation], "activation_beta": 0.0}
    up_bias, down_bias = [*biases, None, None][:2]
    bias_1 = None if up_bias is None else _added(constants, up_bias, "bias_1", gated)
    if how.bits is None:
        name, operands = "MoE", [_added(constants, up, "fc1", gated), bias_1, down, down_bias]
    else:
        name, attributes = "QMoE", attributes | _quantized_attributes(how)
        first, second = (_quantized(constants, w, how, interleave) for w, interleave in ((up, gated), (down, False)))
        operands = [*first, bias_1, *second, down_bias]
    while operands[-1] is None:
        operands.pop()
    y = tape.op(name, [x, logits, *operands], attributes, domain=MICROSOFT)
    old = node.outputs[0]
    out = tape.op("Mul", [y, total], output=ir.Value(name=old.name, shape=old.shape, type=old.type))
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [out])


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


def _added(constants: ConstantReader, stacked: ir.Value, suffix: str, gated: bool) -> ir.Value:
    """Add the weight as the operator takes it: gate and up rows alternate."""
    tensor = constants.tensor(stacked)
    if not gated:
        return stacked
    return constants.add_lazy(f"{stacked.name}.{suffix}", lambda: interleaved(tensor), tensor)


def interleaved(stacked: Tensor) -> Tensor:
    """Return (E, 2I, …) with rows gate 0, up 0, gate 1, up 1, … of one with gate rows, then up rows."""
    gate, up = stacked.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def _quantized(
    constants: ConstantReader, stacked: ir.Value, how: Contrib, interleave: bool
) -> tuple[ir.Value, ir.Value]:
    tensor = constants.tensor(stacked).detach()
    parts: Quantized = quantize(interleaved(tensor) if interleave else tensor, how.bits or 8, how.block)
    return constants.add(f"{stacked.name}{_QUANTIZED}", parts.packed), constants.add(
        f"{stacked.name}.scales", parts.scales
    )


def _quantized_attributes(how: Contrib) -> dict[str, Any]:
    attributes: dict[str, Any] = {"expert_weight_bits": how.bits}
    if how.block:
        attributes["block_size"] = how.block
    if how.cuda:  # else CUDA takes the bytes for packed ones, and gives noise; versions before 1.28 do not know it
        attributes["weights_prepacked"] = 0
    return attributes
