from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moeify.export.lower_standard import lower_standard
from onnx import helper

from moeify.export import standard
from moeify.kernels import reference
from moeify.kernels.activations import ACTIVATIONS
from moeify.measure import TOLERANCE
from tests.moeify.export.layer_graph import CHOICES, EXPERTS, Layer, graph_of, relative, routing, run, session_of


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_a_gate(activation: str, gated: bool) -> None:
    layer = Layer(activation, gated, bias=True)
    model = layer.graph()
    lower_standard(model)
    inputs = routing(layer, 13)
    assert relative(run(model, *inputs), layer.reference(*inputs)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("experts", [1, 2, 17])
def test_any_number_of_experts(experts: int) -> None:
    layer = Layer(experts=experts)
    model = layer.graph()
    lower_standard(model)
    x, ids, weights = routing(Layer(experts=max(experts, 2)), 6)
    ids = ids.clamp(max=experts - 1)  # the same expert twice, where there is one only
    assert relative(run(model, x, ids, weights), layer.reference(x, ids, weights)) <= TOLERANCE["float32"]


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.lists(st.integers(-2, EXPERTS + 1), min_size=CHOICES, max_size=CHOICES), max_size=9))
def test_any_routing_also_places_that_are_no_expert(ids: list[list[int]]) -> None:
    layer = Layer(bias=True)
    model = layer.graph()
    lower_standard(model)
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(-1, CHOICES)
    x, _, weights = routing(layer, len(ids))
    result, expected = run(model, x, ids_TK, weights), layer.reference(x, ids_TK, weights)
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_layers_of_one_kind_share_a_function() -> None:
    model = graph_of(Layer(), Layer(), Layer("relu"))
    lower_standard(model)
    assert sorted(name for _, name, _ in model.functions) == ["SparseMoE", "SparseMoE2"]
    assert [node.op_type for node in model.graph] == ["SparseMoE", "SparseMoE", "SparseMoE2"]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def test_the_weights_lie_in_the_file_once() -> None:
    model = Layer().graph()
    lower_standard(model)
    assert sorted(model.graph.initializers) == sorted(
        f"layer0.{part}.{e}" for part in ("up", "down") for e in range(EXPERTS)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_gives_zeros_past_the_last_offset(bias: bool) -> None:
    function = standard.grouped_linear(EXPERTS, bias, onnx.TensorProto.FLOAT, "GroupedLinear")
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
    assert relative(y, expected) <= TOLERANCE["float32"]
    assert not y[10:].any()
