"""`moeify::SparseMoE` and `moeify::GroupedLinear` as ONNX functions: bodies of standard operators, truly sparse.

Tokens are sorted by expert and split; every expert multiplies its own rows only, and an expert without rows costs
nothing. Weights come as one input per expert, as `torch.nn.Linear` holds them: a runtime can map them from the file
and pack them, where slices of one stacked tensor would be copied first.

Names of values carry their shapes: T tokens, K choices per token, S = T·K rows sorted by expert, E experts, H hidden,
I intermediate, J rows of the first weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moeify.export.clamped_gate import ClampedGate
from moeify.kernels.activations import QUICK_GELU_SCALE

DOMAIN = "moeify"
OPSET = 20  # the first with Gelu
_TO_THE_END = 2**63 - 1


@dataclass(frozen=True)
class Kind:
    """What two layers must share to be calls of one function.

    Attributes:
        experts: E.
        activation: A name in `ACTIVATIONS`.
        gated: act(gate) * up.
        up_bias: Whether the first projections have biases.
        down_bias: Whether the projections back have.
        dtype: onnx.TensorProto.DataType of x and of the weights.
        clamped: What stands between the products instead, if it is no activation by name.
        complete: Whether every place is known to have an expert, which spares the search for others.
    """

    experts: int
    activation: str
    gated: bool
    up_bias: bool
    down_bias: bool
    dtype: int
    clamped: ClampedGate | None = None
    complete: bool = False


class Body:
    """Collects the nodes of a function; calling it adds a node and returns the names of its outputs."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns one name, or a tuple of names where `outputs` is above 1."""
        names = tuple(f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(outputs))
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def ints(self, values: Any) -> str:
        """Add an int64 constant."""
        return self.constant(np.array(values, np.int64))

    def constant(self, array: np.ndarray, dtype: int | None = None) -> str:
        """Add a constant, in an ONNX dtype that numpy may not have."""
        tensor = numpy_helper.from_array(array)
        if dtype is not None:
            tensor = helper.make_tensor("", dtype, array.shape, array.ravel().tolist())
        name: str = self("Constant", value=tensor)
        return name

    def result(self, value: str, name: str) -> None:
        """Name the output of the function."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))


def activate(body: Body, name: str, x: str, dtype: int) -> str:
    """Add an activation that the kernels know by name.

    Raises:
        KeyError: there is no such activation.
    """

    def scaled_sigmoid(scale: float) -> str:
        inner = x if scale == 1 else body("Mul", x, body.constant(np.array(scale), dtype))
        product: str = body("Mul", x, body("Sigmoid", inner))
        return product

    def relu2() -> str:
        positive = body("Relu", x)
        square: str = body("Mul", positive, positive)
        return square

    formulas: dict[str, Callable[[], str]] = {
        "silu": lambda: scaled_sigmoid(1.0),
        "quick_gelu": lambda: scaled_sigmoid(QUICK_GELU_SCALE),
        "gelu": lambda: body("Gelu", x),
        "gelu_tanh": lambda: body("Gelu", x, approximate="tanh"),
        "relu": lambda: body("Relu", x),
        "relu2": relu2,
        "sigmoid": lambda: body("Sigmoid", x),
        "tanh": lambda: body("Tanh", x),
    }
    return formulas[name]()


def sparse_moe(kind: Kind, name: str) -> onnx.FunctionProto:
    """Build the function of a layer: Σ_k weights[t, k] · expert ids[t, k] applied to x[t].

    Its inputs are x (T, H); expert_ids (T, K) int64, where a place outside [0, E) counts nothing; weights (T, K); then,
    each E times, up (J, H), down (H, I), and up_bias (J,) and down_bias (H,) where the kind has them.

    Args:
        kind: What the layer computes.
        name: Of the function, in the domain "moeify".
    """
    body = Body()
    parameters = {part: [f"{part}_{e}" for e in range(kind.experts)] for part in parameter_names(kind)}
    flat_S = body("Reshape", "expert_ids" if kind.complete else _in_range(body, kind.experts), body.ints([-1]))
    order_S, inverse_S = _sort(body, flat_S)
    rest: tuple[str, ...] = ()
    if kind.complete:
        counts_E = _counts(body, flat_S, kind.experts)
    else:
        counts_E, dropped = body(
            "Split", _counts(body, flat_S, kind.experts + 1), body.ints([kind.experts, 1]), outputs=2, axis=0
        )
        order_S = body("Slice", order_S, body.ints([0]), body("ReduceSum", counts_E, keepdims=1))
        rest = (_zeros(body, dropped, "x", kind.dtype),)
    choices = body("Shape", "expert_ids", start=1, end=2)
    x_SH = body("Gather", "x", body("Div", order_S, choices), axis=0)
    z_SJ = _grouped(body, x_SH, counts_E, parameters["up"], parameters.get("up_bias"))
    a_SI = _activation(body, kind, z_SJ)
    y_SH = _grouped(body, a_SI, counts_E, parameters["down"], parameters.get("down_bias"), *rest)
    _combine(body, y_SH, inverse_S, choices, kind.dtype)
    inputs = ["x", "expert_ids", "weights", *(name for names in parameters.values() for name in names)]
    return _function(name, inputs, body)


def parameter_names(kind: Kind) -> tuple[str, ...]:
    """Return the parameters that follow the activations in a call, each E times, in order."""
    biases = (("up_bias", kind.up_bias), ("down_bias", kind.down_bias))
    return ("up", "down", *(name for name, present in biases if present))


def grouped_linear(experts: int, bias: bool, dtype: int, name: str) -> onnx.FunctionProto:
    """Build the function that applies one linear layer per expert to sorted rows.

    Its inputs are x (S, H); offsets (E + 1,) int32; then, each E times, w (N, H), and b (N,) if there is a bias. Rows
    past the last offset give zeros.
    """
    body = Body()
    weights, biases = [f"w_{e}" for e in range(experts)], [f"b_{e}" for e in range(experts)] if bias else None
    offsets = body("Cast", "offsets", to=onnx.TensorProto.INT64)
    starts_E = body("Slice", offsets, body.ints([0]), body.ints([-1]))
    ends_E = body("Slice", offsets, body.ints([1]), body.ints([experts + 1]))
    counts_E = body("Sub", ends_E, starts_E)
    live = body("ReduceSum", counts_E, keepdims=1)
    x_SH = body("Slice", "x", body.ints([0]), live)
    y_SN = _grouped(body, x_SH, counts_E, weights, biases)
    rows = body("Sub", body("Shape", "x", start=0, end=1), live)
    body.result(body("Concat", y_SN, _zeros(body, rows, y_SN, dtype), axis=0), "y")
    return _function(name, ["x", "offsets", *weights, *(biases or ())], body)


def _in_range(body: Body, experts: int) -> str:
    """The expert ids, E where there is no such expert."""
    end = body.ints(experts)
    inside = body("And", body("GreaterOrEqual", "expert_ids", body.ints(0)), body("Less", "expert_ids", end))
    ids: str = body("Where", inside, "expert_ids", end)
    return ids


def _sort(body: Body, flat_S: str) -> tuple[str, str]:
    """Sort the places by expert: the place at each sorted row, and the inverse of that."""
    places = body("Shape", flat_S)
    _, order_S = body("TopK", flat_S, places, outputs=2, axis=0, largest=0, sorted=1)
    _, inverse_S = body("TopK", order_S, places, outputs=2, axis=0, largest=0, sorted=1)
    return order_S, inverse_S


def _counts(body: Body, flat_S: str, ids: int) -> str:
    """Count the rows with each of the ids 0, 1, …, ids - 1."""
    each = body("Equal", flat_S, body.ints([[e] for e in range(ids)]))
    counts: str = body("ReduceSum", body("Cast", each, to=onnx.TensorProto.INT64), body.ints([1]), keepdims=0)
    return counts


def _grouped(
    body: Body, x_SH: str, counts_E: str, weights: Sequence[str], biases: Sequence[str] | None, *more: str
) -> str:
    """Give each expert its rows; `more` rows follow theirs."""
    if len(weights) == 1:
        parts: tuple[str, ...] = (x_SH,)
    else:
        parts = body("Split", x_SH, counts_E, outputs=len(weights), axis=0)
    rest = [()] * len(weights) if biases is None else [(bias,) for bias in biases]
    products = [body("Gemm", part, w, *b, transB=1) for part, w, b in zip(parts, weights, rest, strict=True)]
    joined: str = body("Concat", *products, *more, axis=0)
    return joined


def _activation(body: Body, kind: Kind, z_SJ: str) -> str:
    if kind.clamped is not None:
        return _clamped(body, kind.clamped, z_SJ, kind.dtype)
    if not kind.gated:
        return activate(body, kind.activation, z_SJ, kind.dtype)
    gate_SI, up_SI = body("Split", z_SJ, outputs=2, axis=-1, num_outputs=2)
    product: str = body("Mul", activate(body, kind.activation, gate_SI, kind.dtype), up_SI)
    return product


def _clamped(body: Body, gate: ClampedGate, z_SJ: str, dtype: int) -> str:
    if gate.alternating:
        end, axis, step = body.ints([_TO_THE_END]), body.ints([-1]), body.ints([2])
        gate_SI, up_SI = (body("Slice", z_SJ, body.ints([start]), end, axis, step) for start in (0, 1))
    else:
        gate_SI, up_SI = body("Split", z_SJ, outputs=2, axis=-1, num_outputs=2)

    def number(value: float) -> str:
        return body.constant(np.array(value), dtype)

    if math.isfinite(gate.limit):
        gate_SI = body("Min", gate_SI, number(gate.limit))
        up_SI = body("Clip", up_SI, number(-gate.limit), number(gate.limit))
    factor = body("Mul", gate_SI, body("Sigmoid", body("Mul", gate_SI, number(gate.alpha))))
    product: str = body("Mul", factor, body("Add", up_SI, number(gate.beta)))
    return product


def _combine(body: Body, y_SH: str, inverse_S: str, choices: str, dtype: int) -> None:
    """Bring the rows back to their tokens and sum them, weighted."""
    shape = body("Concat", body.ints([-1]), choices, axis=0)
    y_TKH = body("Gather", y_SH, body("Reshape", inverse_S, shape), axis=0)
    weights_TK1 = body("Unsqueeze", body("Cast", "weights", to=dtype), body.ints([2]))
    body.result(body("ReduceSum", body("Mul", y_TKH, weights_TK1), body.ints([1]), keepdims=0), "y")


def _zeros(body: Body, rows: str, like: str, dtype: int) -> str:
    shape = body("Concat", rows, body("Shape", like, start=1, end=2), axis=0)
    zeros: str = body("ConstantOfShape", shape, value=helper.make_tensor("", dtype, [1], [0]))
    return zeros


def _function(name: str, inputs: Sequence[str], body: Body) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, inputs, ["y"], body.nodes, opsets)
