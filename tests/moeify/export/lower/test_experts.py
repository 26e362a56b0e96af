from __future__ import annotations

import onnx_ir as ir
import pytest

from moeify.errors import RefusedError
from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.lower.experts import count_of, opaque_nodes, read_experts
from tests.moeify.export.lower.layer_graph import EXPERTS, Layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_node_says_what_the_layer_is(bias: bool) -> None:
    (node,) = opaque_nodes(Layer("relu", gated=False, bias=bias).graph())
    layer = read_experts(node)
    kind = layer.kind
    assert (kind.experts, kind.activation, kind.gated, kind.clamped) == (EXPERTS, "relu", False, None)
    assert kind.dtype == ir.DataType.FLOAT and not kind.complete
    assert kind.parameters == (("up", "down", "up_bias", "down_bias") if bias else ("up", "down"))
    assert [value.name for value in layer.stacked.values()] == [f"layer0.{name}" for name in kind.parameters]


def test_a_bias_of_the_down_projection_alone_keeps_its_name() -> None:
    (node,) = opaque_nodes(Layer(bias=True).graph())
    node.replace_input_with(5, None)
    assert read_experts(node).kind.parameters == ("up", "down", "down_bias")


def test_a_clamped_gate_is_read_back() -> None:
    (node,) = opaque_nodes(Layer().graph())
    for name, value in (("alpha", 1.5), ("beta", 0.5), ("limit", 7.0)):
        node.attributes[name] = ir.AttrFloat32(name, value)
    node.attributes["alternating"] = ir.AttrInt64("alternating", 1)
    assert read_experts(node).kind.clamped == ClampedGate(1.5, 0.5, 7.0, True)


@pytest.mark.parametrize(("size", "complete"), [(EXPERTS, True), (EXPERTS + 1, False)])
def test_the_places_of_the_largest_of_as_many_numbers_are_all_experts(size: int, complete: bool) -> None:
    (node,) = opaque_nodes(Layer().graph())
    scores = ir.Value(name="scores", shape=ir.Shape(["T", size]))
    topk = ir.node("TopK", [scores, ir.Value(name="k")], num_outputs=2)
    node.replace_input_with(1, topk.outputs[1])
    assert read_experts(node).kind.complete is complete


def test_the_number_of_experts_must_be_a_constant() -> None:
    with pytest.raises(RefusedError, match="the number of experts of w is not a constant"):
        count_of(ir.Value(name="w", shape=ir.Shape(["E", 3])))
