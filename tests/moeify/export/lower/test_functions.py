from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.lower.experts import LayerKind
from moeify.export.lower.functions import grouped_linear, sparse_moe
from moeify.kernels import reference
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify.export.lower.layer_graph import EXPERTS, Layer, session_of

FLOAT = ir.DataType.FLOAT


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_gives_zeros_past_the_last_offset(bias: bool) -> None:
    function = ir.serde.serialize_function(grouped_linear((EXPERTS, bias, ir.DataType.FLOAT), "GroupedLinear"))
    layer = Layer(gated=False, bias=True)
    value = helper.make_tensor_value_info
    names = list(function.input)
    arrays = {f"w_{e}": layer.up[e].numpy() for e in range(EXPERTS)}
    if bias and layer.up_bias is not None:
        arrays |= {f"b_{e}": layer.up_bias[e].numpy() for e in range(EXPERTS)}
    graph = helper.make_graph(
        [helper.make_node("GroupedLinear", names, ["y"], domain="moeify")],
        "layer",
        [value("x", 1, ["S", layer.hidden]), value("offsets", 6, [EXPERTS + 1])],
        [value("y", 1, ["S", layer.intermediate])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moeify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    onnx.checker.check_model(model, full_check=True)
    x, offsets = torch.randn(12, layer.hidden), torch.tensor([0, 3, 3, 4, 9, 10], dtype=torch.int32)
    y = torch.from_numpy(session_of(model).run(None, {"x": x.numpy(), "offsets": offsets.numpy()})[0])
    biases = layer.up_bias.double() if bias and layer.up_bias is not None else None
    expected = reference.grouped_linear(x.double(), layer.up.double(), biases, offsets)
    assert relative_difference(y, expected) <= TOLERANCE["float32"]
    assert not y[10:].any()


def test_the_inputs_of_a_layer_are_its_activations_and_then_each_weight_of_each_expert() -> None:
    kind = LayerKind(2, "silu", True, None, ("up", "down", "down_bias"), FLOAT)
    function = sparse_moe(kind, "SparseMoE")
    assert [value.name for value in function.inputs] == [
        "x", "expert_ids", "weights", "up_0", "up_1", "down_0", "down_1", "down_bias_0", "down_bias_1"
    ]  # fmt: skip
    assert [value.name for value in function.outputs] == ["y"]
    assert function.opset_imports == {"": 20}


@pytest.mark.parametrize("complete", [True, False])
def test_only_choices_that_may_be_no_expert_are_searched_for(complete: bool) -> None:
    kind = LayerKind(2, "relu", False, None, ("up", "down"), FLOAT, complete)
    used = {node.op_type for node in sparse_moe(kind, "SparseMoE")}
    assert ("Where" in used) is not complete


@pytest.mark.parametrize("alternating", [True, False])
def test_a_clamped_gate_is_the_formula(alternating: bool) -> None:
    gate = ClampedGate(1.7, 0.5, 2.0, alternating)
    layer = Layer(experts=1)
    kind = LayerKind(1, "silu", True, gate, ("up", "down"), FLOAT)
    function = ir.serde.serialize_function(sparse_moe(kind, "SparseMoE"))
    value, arrays = helper.make_tensor_value_info, {"up_0": layer.up[0], "down_0": layer.down[0]}
    graph = helper.make_graph(
        [helper.make_node("SparseMoE", list(function.input), ["y"], domain="moeify")],
        "layer",
        [value("x", 1, ["T", layer.hidden]), value("expert_ids", 7, ["T", 1]), value("weights", 1, ["T", 1])],
        [value("y", 1, ["T", layer.hidden])],
        [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moeify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    onnx.checker.check_model(model, full_check=True)
    x, ids, weights = torch.randn(6, layer.hidden) * 3, torch.zeros(6, 1, dtype=torch.long), torch.rand(6, 1)
    feed = {"x": x.numpy(), "expert_ids": ids.numpy(), "weights": weights.numpy()}
    z = x.double() @ layer.up[0].double().t()
    halves = (z[:, ::2], z[:, 1::2]) if alternating else z.chunk(2, dim=-1)
    assert (halves[0] > 2).any() and (halves[1].abs() > 2).any()
    expected = gate(*halves) @ layer.down[0].double().t() * weights
    y = torch.from_numpy(session_of(model).run(None, feed)[0])
    assert relative_difference(y, expected) <= TOLERANCE["float32"]
