"""torch.onnx translations of moeify's operators: opaque nodes, which the lowering for a target replaces.

`moeify::Experts` and `moeify::GroupedLinear` keep the inputs of the torch operators. They exist between
`torch.onnx.export` and the lowering only; no file holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import onnx_opset, values

from moeify.kernels import operators  # noqa: F401 (defines torch.ops.moeify)

op: Any = onnx_opset.opset20
DOMAIN = "moeify"
EXPERTS = "Experts"
GROUPED_LINEAR = "GroupedLinear"
_FLOATS = [f"tensor({name})" for name in ("float", "float16", "bfloat16", "double")]
_INTEGERS = ["tensor(int64)", "tensor(int32)"]
_KINDS = {"T": _FLOATS, "W": _FLOATS, "I": _INTEGERS}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the table that `torch.onnx.export(custom_translation_table=…)` takes."""
    experts = _operator(EXPERTS, "x:T expert_ids:I weights:W up:T down:T up_bias:T? down_bias:T?",
                        activation=OpSchema.AttrType.STRING, gated=OpSchema.AttrType.INT)  # fmt: skip
    grouped_linear = _operator(GROUPED_LINEAR, "x:T w:T b:T? offsets:I")

    def translate_experts(
        x: Any, ids: Any, weights: Any, up: Any, down: Any, up_bias: Any, down_bias: Any,
        activation: str, gated: bool, implementation: str,
    ) -> Any:  # fmt: skip
        return experts(x, ids, weights, up, down, up_bias, down_bias, activation=activation, gated=int(gated))

    def translate_grouped_linear(x: Any, w: Any, b: Any, offsets: Any, implementation: str) -> Any:
        return grouped_linear(x, w, b, offsets)

    ops: Any = torch.ops
    return {
        ops.moeify.experts.default: translate_experts,
        ops.moeify.grouped_linear.default: translate_grouped_linear,
        ops.aten.searchsorted.Tensor: _searchsorted,
        ops.aten.sort.stable: _sort_stable,
    }


def _sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Sort by TopK, which puts the lower index first where values are equal."""
    length = op.Shape(x, start=dim, end=dim + 1 or None)
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def _searchsorted(
    sorted_sequence: Any,
    values_: Any,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    """Count the elements before each value, in one dimension, as the routing layout does."""
    compare = op.LessOrEqual if right or side == "right" else op.Less
    before = compare(op.Unsqueeze(sorted_sequence, [0]), op.Unsqueeze(values_, [1]))
    return op.ReduceSum(op.Cast(before, to=6 if out_int32 else 7), [1], keepdims=0)


def _operator(name: str, inputs: str, **attributes: Any) -> values.Op:
    """Describe a node: inputs as `name:type`, a `?` after the type of those that may be absent."""
    option = OpSchema.FormalParameterOption

    def formal(text: str) -> Any:
        word, kind = text.split(":")
        optional = kind.endswith("?")
        return OpSchema.FormalParameter(
            word, kind.rstrip("?"), param_option=option.Optional if optional else option.Single
        )

    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[formal(text) for text in inputs.split()],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[(kind, allowed, "") for kind, allowed in _KINDS.items() if f":{kind}" in inputs],
        attributes=[OpSchema.Attribute(key, kind, required=True) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)
