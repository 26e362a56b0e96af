from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.errors import RefusedError
from moeify.export.lower.standard import lower_standard
from moeify.kernels.activations import ACTIVATIONS
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify.export.lower.layer_graph import CHOICES, EXPERTS, Layer, graph_of, routing, run


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_a_gate(activation: str, gated: bool) -> None:
    layer = Layer(activation, gated, bias=True)
    model = layer.graph()
    lower_standard(model)
    inputs = routing(layer, 13)
    assert relative_difference(run(model, *inputs), layer.reference(*inputs)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("experts", [1, 2, 17])
def test_any_number_of_experts(experts: int) -> None:
    layer = Layer(experts=experts)
    model = layer.graph()
    lower_standard(model)
    x, ids, weights = routing(Layer(experts=max(experts, 2)), 6)
    ids = ids.clamp(max=experts - 1)  # the same expert twice, where there is one only
    assert relative_difference(run(model, x, ids, weights), layer.reference(x, ids, weights)) <= TOLERANCE["float32"]


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


def test_a_number_of_experts_that_is_not_constant_is_refused() -> None:
    model = Layer().graph()
    model.graph.initializers["layer0.up"].shape = ir.Shape(["E", 22, 7])
    with pytest.raises(RefusedError, match=r"^the number of experts of layer0.up is not a constant"):
        lower_standard(model)
