from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from moeify.export.lower.precision import widen_undefined
from tests.moeify.export.lower.layer_graph import session_of

HALF, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT
NOT_DEFINED = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError)


def graph(dtype: int, *nodes: Any, outputs: dict[str, int]) -> ir.Model:
    info = helper.make_tensor_value_info
    k = helper.make_tensor("k", TensorProto.INT64, [1], [2])
    made = helper.make_graph(list(nodes), "half", [info("x", dtype, [3, 5])],
                             [info(name, kind, None) for name, kind in outputs.items()], [k])  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def test_what_onnx_does_not_define_in_bfloat16_is_computed_in_float32() -> None:
    top = helper.make_node("TopK", ["x", "k"], ["values", "ids"])
    model = graph(HALF, top, outputs={"values": HALF, "ids": TensorProto.INT64})
    with pytest.raises(NOT_DEFINED, match="TopK"):
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    widen_undefined(model)
    proto: Any = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == ["Cast", "TopK", "Cast"]
    assert [output.type.tensor_type.elem_type for output in proto.graph.output] == [HALF, TensorProto.INT64]
    session_of(proto)


def test_what_has_no_kernel_in_bfloat16_too() -> None:
    model = graph(HALF, helper.make_node("Less", ["x", "x"], ["y"]), outputs={"y": TensorProto.BOOL})
    widen_undefined(model)
    proto: Any = ir.serde.serialize_model(model)
    assert [node.op_type for node in proto.graph.node] == ["Cast", "Cast", "Less"]
    onnx.checker.check_model(proto, full_check=True)
    session_of(proto)


@pytest.mark.parametrize(("dtype", "operator"), [(HALF, "Sigmoid"), (TensorProto.FLOAT16, "Less"), (FLOAT, "Sin")])
def test_everything_else_stays(dtype: int, operator: str) -> None:
    inputs = ["x", "x"] if operator == "Less" else ["x"]
    kind = TensorProto.BOOL if operator == "Less" else dtype
    model = graph(dtype, helper.make_node(operator, inputs, ["y"]), outputs={"y": kind})
    widen_undefined(model)
    assert [node.op_type for node in model.graph] == [operator]
