"""What ONNX does not define in half precision, or no runtime computes in bfloat16, is computed in float32.

Before:  values, ids = TopK(x, k)                                    (x bfloat16)
After:   values, ids = Cast(TopK(Cast(x, float32), k), bfloat16)     (ids as they are)
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from moeify.export.capture.interface import OPSET
from moeify.export.lower.tape import Tape

# What ONNX defines in bfloat16 and no provider of onnxruntime-gpu 1.31 has a kernel for (benchmarks/gpu/onnx/place.py
# asks it). In float16 what CUDA lacks is computed on the CPU.
WITHOUT_BFLOAT16 = frozenset({
    "ArgMax", "ArgMin", "BatchNormalization", "Ceil", "CenterCropPad", "Col2Im", "CumSum", "DFT", "DepthToSpace",
    "Equal", "Floor", "Greater", "GreaterOrEqual", "Hardmax", "LRN", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "LogSoftmax", "Mean", "MeanVarianceNormalization", "MelWeightMatrix", "NonZero", "PRelu", "Pad", "QuantizeLinear",
    "Reciprocal", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd", "Resize",
    "STFT", "SpaceToDepth",
})  # fmt: skip
_TYPES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def widen_undefined(model: ir.Model) -> None:
    """Let every standard operator of `model` compute in a dtype that it has kernels for; in place."""
    for node in list(model.graph):
        if node.domain == "" and any(_undefined(node)):
            _widen(model.graph, node)


def _undefined(node: ir.Node) -> list[bool]:
    """Say for each input whether the operator does not take its half precision."""
    if node.op_type in WITHOUT_BFLOAT16:
        return [value is not None and value.dtype == ir.DataType.BFLOAT16 for value in node.inputs]
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    kinds = [formal.type_str for formal in schema.inputs]
    kinds += kinds[-1:] * (len(node.inputs) - len(kinds))  # the last one may stand for several
    return [
        value is not None and value.dtype in _TYPES and _TYPES[value.dtype] not in allowed.get(kind, [kind])
        for value, kind in zip(node.inputs, kinds, strict=False)
    ]


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    tape = Tape()
    inputs = [
        tape("Cast", value, to=ir.DataType.FLOAT) if value is not None and wrong else value
        for value, wrong in zip(node.inputs, _undefined(node), strict=False)
    ]
    old, wide, new = list(node.outputs), list[ir.Value](), list[ir.Value]()
    attributes = list(node.attributes.values())
    for value in old:
        half = value.dtype in _TYPES
        kind = ir.TensorType(ir.DataType.FLOAT) if half else value.type
        wide.append(ir.Value(name=f"{value.name}.float32" if half else value.name, shape=value.shape, type=kind))
    widened = ir.Node("", node.op_type, inputs, attributes, outputs=wide, name=node.name)
    back = Tape()
    for value, computed in zip(old, wide, strict=True):
        assert value.dtype is not None
        out = ir.Value(name=value.name, shape=value.shape, type=value.type)
        half = value.dtype in _TYPES
        new.append(back.op("Cast", [computed], {"to": value.dtype}, output=out) if half else computed)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [*tape.nodes, widened, *back.nodes], old, new)
