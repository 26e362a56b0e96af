"""`moeify::SparseMoE` and `moeify::GroupedLinear` as ONNX functions: bodies of standard operators, truly sparse.

Choices are sorted by expert and split; every expert multiplies its own rows only, and an expert without rows costs
nothing. Weights come as one input per expert, as `torch.nn.Linear` holds them: a runtime can map them from the file
and pack them, where slices of one stacked tensor would be copied first.

Shape suffixes: T tokens, K choices per token, S = T·K choices sorted by expert, E experts, H hidden size,
I intermediate size, J rows of the up projections (I, or 2I with a gate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.capture.interface import DOMAIN, OPSET
from moeify.export.lower.experts import LayerKind
from moeify.export.lower.tape import Tape
from moeify.kernels.activations import QUICK_GELU_SCALE

_TO_THE_END = 2**63 - 1
_ONE_OPERATOR = {"gelu": "Gelu", "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def sparse_moe(kind: LayerKind, name: str) -> ir.Function:
    """Build the function of a layer: Σ_k weights[t, k] · expert ids[t, k] applied to x[t].

    Its inputs are x (T, H); expert_ids (T, K) int64, where an id outside [0, E) counts nothing; weights (T, K); then
    the parameters of the kind, each E times: up (J, H), down (H, I), up_bias (J,), down_bias (H,).
    """
    tape = Tape()
    x, ids_TK, weights_TK = _values("x", "expert_ids", "weights")
    each = {part: _values(*(f"{part}_{e}" for e in range(kind.experts))) for part in kind.parameters}
    flat_S = tape("Reshape", ids_TK if kind.complete else in_range(tape, ids_TK, kind.experts), tape.ints([-1]))
    order_S, inverse_S = _sort(tape, flat_S)
    dropped = []
    if kind.complete:
        counts_E = _counts(tape, flat_S, kind.experts)
    else:
        counts = _counts(tape, flat_S, kind.experts + 1)
        counts_E, others = tape.several(2, "Split", counts, tape.ints([kind.experts, 1]), axis=0)
        order_S = tape("Slice", order_S, tape.ints([0]), tape("ReduceSum", counts_E, keepdims=1))
        dropped = [_zero_rows(tape, others, x, kind.dtype)]
    choices = tape("Shape", ids_TK, start=1, end=2)
    x_SH = tape("Gather", x, tape("Div", order_S, choices), axis=0)
    z_SJ = _grouped(tape, x_SH, counts_E, each["up"], each.get("up_bias"))
    a_SI = _activation(tape, kind, z_SJ)
    y_SH = _grouped(tape, a_SI, counts_E, each["down"], each.get("down_bias"), *dropped)
    y_TKH = tape("Gather", y_SH, tape("Reshape", inverse_S, _pair(tape, tape.ints([-1]), choices)), axis=0)
    weights_TK1 = tape("Unsqueeze", tape("Cast", weights_TK, to=kind.dtype), tape.ints([2]))
    y = tape("ReduceSum", tape("Mul", y_TKH, weights_TK1), tape.ints([1]), keepdims=0)
    return _function(name, tape, [x, ids_TK, weights_TK, *(value for values in each.values() for value in values)], y)


def grouped_linear(kind: tuple[int, bool, ir.DataType], name: str) -> ir.Function:
    """Build the function that applies one linear layer per expert to sorted rows.

    Its inputs are x (S, H); offsets (E + 1,) int32; then, each E times, w (N, H), and b (N,) if there is a bias. Rows
    past the last offset give zeros.

    Args:
        kind: E, whether there is a bias, and the dtype.
        name: Of the function.
    """
    experts, bias, dtype = kind
    tape = Tape()
    x, offsets = _values("x", "offsets")
    weights, biases = _values(*(f"w_{e}" for e in range(experts))), _values(*(f"b_{e}" for e in range(experts) if bias))
    bounds = tape("Cast", offsets, to=ir.DataType.INT64)
    starts_E = tape("Slice", bounds, tape.ints([0]), tape.ints([-1]))
    ends_E = tape("Slice", bounds, tape.ints([1]), tape.ints([experts + 1]))
    counts_E = tape("Sub", ends_E, starts_E)
    live = tape("ReduceSum", counts_E, keepdims=1)
    y_SN = _grouped(tape, tape("Slice", x, tape.ints([0]), live), counts_E, weights, biases)
    rest = tape("Sub", tape("Shape", x, start=0, end=1), live)
    y = tape("Concat", y_SN, _zero_rows(tape, rest, y_SN, dtype), axis=0)
    return _function(name, tape, [x, offsets, *weights, *biases], y)


def activate(tape: Tape, name: str, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Add an activation that the kernels know by name."""
    match name:
        case "silu":
            return tape("Mul", x, tape("Sigmoid", x))
        case "quick_gelu":
            return tape("Mul", x, tape("Sigmoid", tape("Mul", x, tape.number(QUICK_GELU_SCALE, dtype))))
        case "gelu_tanh":
            return tape("Gelu", x, approximate="tanh")
        case "relu2":
            positive = tape("Relu", x)
            return tape("Mul", positive, positive)
        case _:
            return tape(_ONE_OPERATOR[name], x)


def in_range(tape: Tape, ids: ir.Value, experts: int) -> ir.Value:
    """Add the expert ids, with E where there is no such expert."""
    end = tape.ints(experts)
    inside = tape("And", tape("GreaterOrEqual", ids, tape.ints(0)), tape("Less", ids, end))
    return tape("Where", inside, ids, end)


def _sort(tape: Tape, flat_S: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Sort the choices by expert: the choice at each sorted row, and the inverse of that."""
    length = tape("Shape", flat_S)
    _, order_S = tape.several(2, "TopK", flat_S, length, axis=0, largest=0, sorted=1)
    _, inverse_S = tape.several(2, "TopK", order_S, length, axis=0, largest=0, sorted=1)
    return order_S, inverse_S


def _counts(tape: Tape, flat_S: ir.Value, ids: int) -> ir.Value:
    """Count the choices of each of the ids 0, 1, …, ids - 1."""
    equal = tape("Equal", flat_S, tape.ints([[e] for e in range(ids)]))
    return tape("ReduceSum", tape("Cast", equal, to=ir.DataType.INT64), tape.ints([1]), keepdims=0)


def _grouped(
    tape: Tape, x_SH: ir.Value, counts_E: ir.Value, weights: Sequence[ir.Value], biases: Sequence[ir.Value] | None,
    *more: ir.Value,
) -> ir.Value:  # fmt: skip
    """Give each expert its rows; `more` rows follow theirs."""
    parts = [x_SH] if len(weights) == 1 else tape.several(len(weights), "Split", x_SH, counts_E, axis=0)
    rest = [[bias] for bias in biases] if biases else [[]] * len(weights)
    products = [tape("Gemm", part, w, *b, transB=1) for part, w, b in zip(parts, weights, rest, strict=True)]
    return tape("Concat", *products, *more, axis=0)


def _activation(tape: Tape, kind: LayerKind, z_SJ: ir.Value) -> ir.Value:
    if not kind.gated:
        return activate(tape, kind.activation, z_SJ, kind.dtype)
    if kind.clamped is not None and kind.clamped.alternating:
        end, axis, step = tape.ints([_TO_THE_END]), tape.ints([-1]), tape.ints([2])
        gate_SI, up_SI = (tape("Slice", z_SJ, tape.ints([start]), end, axis, step) for start in (0, 1))
    else:
        gate_SI, up_SI = tape.several(2, "Split", z_SJ, axis=-1, num_outputs=2)
    if kind.clamped is None:
        return tape("Mul", activate(tape, kind.activation, gate_SI, kind.dtype), up_SI)
    return _clamped(tape, kind.clamped, gate_SI, up_SI, kind.dtype)


def _clamped(tape: Tape, gate: ClampedGate, gate_SI: ir.Value, up_SI: ir.Value, dtype: ir.DataType) -> ir.Value:
    if math.isfinite(gate.limit):
        gate_SI = tape("Min", gate_SI, tape.number(gate.limit, dtype))
        up_SI = tape("Clip", up_SI, tape.number(-gate.limit, dtype), tape.number(gate.limit, dtype))
    factor = tape("Mul", gate_SI, tape("Sigmoid", tape("Mul", gate_SI, tape.number(gate.alpha, dtype))))
    return tape("Mul", factor, tape("Add", up_SI, tape.number(gate.beta, dtype)))


def _zero_rows(tape: Tape, rows: ir.Value, like: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Rows of zeros as wide as those of `like`."""
    return tape.zeros(_pair(tape, rows, tape("Shape", like, start=1, end=2)), dtype)


def _pair(tape: Tape, first: ir.Value, second: ir.Value) -> ir.Value:
    return tape("Concat", first, second, axis=0)


def _values(*names: str) -> list[ir.Value]:
    return [ir.Value(name=name) for name in names]


def _function(name: str, tape: Tape, inputs: Sequence[ir.Value], y: ir.Value) -> ir.Function:
    y.name = "y"
    graph = ir.Graph(inputs, [y], nodes=tape.nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[])
