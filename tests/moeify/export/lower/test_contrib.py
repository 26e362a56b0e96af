from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from moeify.errors import RefusedError
from moeify.export.lower.contrib import interleaved, lower_contrib, set_attributes
from moeify.export.lower.weights import quantize
from moeify.export.targets import TARGETS, Operator
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify.export.lower.layer_graph import EXPERTS, Layer, graph_of, routing, run

EXPRESSIBLE = [("silu", True), ("quick_gelu", True), ("silu", False), ("relu", False), ("gelu_tanh", False)]
CUDA_INT8 = Operator(8, multiple=64, attributes={"weights_prepacked": 0})


@pytest.mark.parametrize(("activation", "gated"), EXPRESSIBLE)
@pytest.mark.parametrize("bias", [True, False])
def test_moe_is_the_layer(activation: str, gated: bool, bias: bool) -> None:
    layer = Layer(activation, gated, bias)
    model = layer.graph()
    lower_contrib(model, Operator())
    x, ids, weights = routing(layer, 13)
    ids[3, 0], ids[5], ids[7, 1] = EXPERTS, EXPERTS, -1  # dropped choices, and a token without any expert
    expected = layer.reference(x, ids, weights)
    assert relative_difference(run(model, x, ids, weights), expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("gelu", True), ("relu", True), ("tanh", False)])
def test_what_the_operator_would_compute_otherwise_is_refused(activation: str, gated: bool) -> None:
    with pytest.raises(RefusedError, match=rf"^layer0 cannot become com.microsoft::MoE: .* no (gated )?{activation}"):
        lower_contrib(Layer(activation, gated).graph(), Operator())


def test_a_refusal_comes_before_the_first_change() -> None:
    model = graph_of(Layer(), Layer("tanh"))
    before = ir.serde.serialize_model(model).SerializeToString()
    with pytest.raises(RefusedError, match=r"^layer1 cannot become"):
        lower_contrib(model, Operator())
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_a_number_of_choices_that_is_not_constant_is_refused() -> None:
    model = Layer().graph()
    model.graph.inputs[1].shape = ir.Shape(["T", "K"])
    with pytest.raises(RefusedError, match="the number of experts per token is not a constant"):
        lower_contrib(model, Operator())


@pytest.mark.parametrize("operator", [Operator(8), Operator(4, 32), Operator(8, 32), CUDA_INT8])
@pytest.mark.parametrize("gated", [True, False])
def test_qmoe_computes_with_the_rounded_weights(operator: Operator, gated: bool) -> None:
    layer = Layer(gated=gated, bias=True, hidden=64, intermediate=192)
    model, inputs = layer.graph(), routing(layer, 9)
    exact = layer.reference(*inputs)
    rounded = lower_contrib(model, operator)
    bits = operator.bits or 8
    up = quantize(interleaved(layer.up) if gated else layer.up, bits, operator.block).dequantized()
    layer.up = torch.cat((up[:, ::2], up[:, 1::2]), 1) if gated else up
    layer.down = quantize(layer.down, bits, operator.block).dequantized()
    result = run(model, *inputs)
    rounds_activations = operator == Operator(8, 32)  # since onnxruntime 1.31
    tolerance = 2e-2 if rounds_activations else TOLERANCE["float32"]
    assert relative_difference(result, layer.reference(*inputs)) <= tolerance
    assert relative_difference(result, exact) <= (2e-2 if bits == 8 else 0.3)
    assert {name: make().tolist() for name, make in rounded.items()} == {
        "layer0.up": layer.up.tolist(), "layer0.down": layer.down.tolist()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "multiple"), [(Operator(4, 32, multiple=32), 32), (Operator(multiple=8), 8), (CUDA_INT8, 64)]
)
def test_sizes_that_the_kernel_does_not_take_are_refused(operator: Operator, multiple: int) -> None:
    with pytest.raises(RefusedError, match=rf"sizes? that are multiples of {multiple}, not \[7, 11\]"):
        lower_contrib(Layer().graph(), operator)


def test_a_layer_with_too_few_experts_is_left_and_so_is_one_that_cannot_be_expressed() -> None:
    model = graph_of(Layer(), Layer(experts=6), Layer("tanh", experts=6))
    assert lower_contrib(model, Operator(min_experts=6)) == {}
    left = [node.name for node in model.graph if node.op_type == "Experts"]
    assert left == ["layer0", "layer2"] and sum(node.op_type == "MoE" for node in model.graph) == 1


def test_what_gives_up_exactness_is_set_when_asked_for() -> None:
    operator = TARGETS["cpu"].forms["int4"].operator
    assert operator is not None
    model = Layer(hidden=32, intermediate=64).graph()
    lower_contrib(model, operator)
    (node,) = [node for node in model.graph if node.op_type == "QMoE"]
    assert "accuracy_level" not in node.attributes
    set_attributes(model, operator)
    assert node.attributes["accuracy_level"].as_int() == 4


@pytest.mark.parametrize("operator", [Operator(), Operator(8)])
def test_two_layers_may_share_their_weights(operator: Operator) -> None:
    """As those of ALBERT do."""
    layer = Layer()
    model = graph_of(layer, layer)
    first, second = model.graph
    for number in (3, 4):
        second.replace_input_with(number, first.inputs[number])
    lower_contrib(model, operator)
    names = [node.inputs[2].name for node in model.graph if node.op_type == operator.name and node.inputs[2]]
    assert len(names) == 2 and len(set(names)) == 1
