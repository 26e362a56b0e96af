from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from benchmarks.gpu.onnx.rules import copies
from moeify.export.lower.sizes import settle_sizes
from tests.moeify.export.lower.layer_graph import session_of


def graph(*last: Any, kind: int = TensorProto.INT64) -> ir.Model:
    """x (P, S) -> y, with `past` and `length`, its sizes, as scalars, and `range`, the numbers below the length."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Shape", ["x"], ["past_1"], start=0, end=1), node("Squeeze", ["past_1"], ["past"]),
        node("Shape", ["x"], ["length_1"], start=1, end=2), node("Squeeze", ["length_1"], ["length"]),
        node("Range", ["zero", "length", "one"], ["range"]), *last,
    ]  # fmt: skip
    constants = [helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in (("zero", 0), ("one", 1))]
    inputs = [info("x", TensorProto.FLOAT, ["P", "S"])]
    made = helper.make_graph(nodes, "sizes", inputs, [info("y", kind, ["Y"])], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def run(proto: Any, past: int, length: int) -> list[float]:
    y: list[float] = session_of(proto).run(None, {"x": np.ones((past, length), np.float32)})[0].tolist()
    return y


@pytest.mark.parametrize("order", [["range", "past"], ["past", "range"]])
def test_positions_begin_at_the_past(order: list[str]) -> None:
    model = graph(helper.make_node("Add", order, ["y"]))
    assert copies(ir.serde.serialize_model(model).graph) == ["Add(past)"]
    settle_sizes(model)
    proto: Any = ir.serde.serialize_model(model)
    (maker,) = [node for node in proto.graph.node if "y" in node.output]
    assert maker.op_type == "Range" and copies(proto.graph) == []
    onnx.checker.check_model(proto, full_check=True)
    assert run(proto, 5, 1) == [5] and run(proto, 0, 3) == [0, 1, 2]


def test_any_other_number_goes_to_the_device_by_itself() -> None:
    cast = helper.make_node("Cast", ["past"], ["divisor"], to=TensorProto.FLOAT)
    mean = helper.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0)
    axes = helper.make_node("Unsqueeze", ["zero", "zero"], ["axes"])
    model = graph(axes, cast, mean, helper.make_node("Div", ["sum", "divisor"], ["y"]), kind=TensorProto.FLOAT)
    settle_sizes(model)
    proto: Any = ir.serde.serialize_model(model)
    assert copies(proto.graph) == []
    onnx.checker.check_model(proto, full_check=True)
    assert run(proto, 4, 2) == [1, 1]


def test_what_is_sizes_only_and_what_is_none_stay() -> None:
    end = helper.make_node("Add", ["past", "length"], ["end"])
    model = graph(end, helper.make_node("Range", ["past", "end", "one"], ["y"]))
    before = [node.op_type for node in model.graph]
    settle_sizes(model)
    assert [node.op_type for node in model.graph] == before
