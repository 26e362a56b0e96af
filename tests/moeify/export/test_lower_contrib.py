from __future__ import annotations

import pytest
import torch
from moeify.export.lower_contrib import Contrib, interleaved, lower_contrib
from moeify.export.quantize import quantize

from moeify.errors import RefusedError
from moeify.export.lower import MANY_EXPERTS, lower
from moeify.export.report import Quantization
from moeify.measure import TOLERANCE
from tests.moeify.export.layer_graph import EXPERTS, Layer, relative, routing, run

EXPRESSIBLE = [("silu", True), ("quick_gelu", True), ("silu", False), ("relu", False), ("gelu_tanh", False)]


@pytest.mark.parametrize(("activation", "gated"), EXPRESSIBLE)
@pytest.mark.parametrize("bias", [True, False])
def test_moe_is_the_layer(activation: str, gated: bool, bias: bool) -> None:
    layer = Layer(activation, gated, bias)
    model = layer.graph()
    lower_contrib(model, Contrib())
    x, ids, weights = routing(layer, 13)
    ids[3, 0], ids[5], ids[7, 1] = EXPERTS, EXPERTS, -1  # dropped places, and a token without any expert
    assert relative(run(model, x, ids, weights), layer.reference(x, ids, weights)) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("gelu", True), ("relu", True), ("tanh", False)])
def test_what_the_operator_would_compute_otherwise_is_refused(activation: str, gated: bool) -> None:
    with pytest.raises(RefusedError, match=rf"^layer0 cannot become com.microsoft::MoE: .* no (gated )?{activation}"):
        lower_contrib(Layer(activation, gated).graph(), Contrib())


@pytest.mark.parametrize("how", [Contrib(8), Contrib(4, 32), Contrib(8, 32), Contrib(8, cuda=True)])
@pytest.mark.parametrize("gated", [True, False])
def test_qmoe_computes_with_the_rounded_weights(how: Contrib, gated: bool) -> None:
    layer = Layer(gated=gated, bias=True, hidden=64, intermediate=192)
    model = layer.graph()
    lower_contrib(model, how)
    inputs = routing(layer, 9)
    exact = layer.reference(*inputs)
    up = quantize(interleaved(layer.up) if gated else layer.up, how.bits or 8, how.block).dequantized()
    layer.up = torch.cat((up[:, ::2], up[:, 1::2]), 1) if gated else up
    layer.down = quantize(layer.down, how.bits or 8, how.block).dequantized()
    result = run(model, *inputs)
    rounds_activations = how == Contrib(8, 32)  # since onnxruntime 1.31
    assert relative(result, layer.reference(*inputs)) <= (2e-2 if rounds_activations else TOLERANCE["float32"])
    assert relative(result, exact) <= (2e-2 if how.bits == 8 else 0.3)


@pytest.mark.parametrize(
    ("how", "multiple"), [(Contrib(4, 32), 32), (Contrib(cuda=True), 8), (Contrib(8, cuda=True), 64)]
)
def test_widths_that_the_kernel_does_not_take_are_refused(how: Contrib, multiple: int) -> None:
    with pytest.raises(RefusedError, match=rf"widths that are multiples of {multiple}, not \[7, 11\]"):
        lower_contrib(Layer().graph(), how)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_cuda_is_told_that_the_bytes_are_not_packed_for_it(quantize: Quantization) -> None:
    model = Layer(hidden=64, intermediate=128).graph()
    lower(model, "cuda", quantize)
    (node,) = [node for node in model.graph if node.op_type == "QMoE"]
    assert node.attributes["weights_prepacked"].as_int() == 0


@pytest.mark.parametrize(("experts", "domain"), [(MANY_EXPERTS, "com.microsoft"), (MANY_EXPERTS - 1, "moeify")])
def test_the_cpu_target_takes_the_operator_for_many_experts(experts: int, domain: str) -> None:
    layer = Layer(experts=experts)
    model = layer.graph()
    lower(model, "cpu", None)
    assert domain in {node.domain for node in model.graph}
    inputs = routing(layer, 20)
    assert relative(run(model, *inputs), layer.reference(*inputs)) <= TOLERANCE["float32"]


def test_the_portable_target_holds_standard_operators_only() -> None:
    model = Layer(experts=MANY_EXPERTS).graph()
    lower(model, "portable", None)
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    assert {node.domain for node in nodes} == {"", "moeify"}
    assert not {node.domain for function in model.functions.values() for node in function} - {""}


def test_the_cuda_target_waits_for_no_size_that_only_the_device_knows() -> None:
    model = Layer(hidden=8, intermediate=16).graph()
    lower(model, "cuda", None)
    assert not {"NonZero", "Split", "If", "Loop", "GatherND"} & {node.op_type for node in model.graph}


def test_there_must_be_experts_to_quantize() -> None:
    model = Layer().graph()
    lower(model, "portable", None)
    with pytest.raises(RefusedError, match="no experts to quantize"):
        lower(model, "cpu", "int8")


def test_four_bits_pack_the_first_value_low() -> None:
    packed = quantize(torch.tensor([[[7.0, -8.0, 0.0, 1.0], [-7.0, 8.0, 0.0, -1.0]]]), 4, None)
    assert packed.packed.tolist() == [[[15 | 0 << 4, 8 | 9 << 4]] * 2]
    assert packed.scales.tolist() == [[1.0, -1.0]]
    assert packed.dequantized().tolist() == [[[7.0, -8.0, 0.0, 1.0], [-7.0, 8.0, 0.0, -1.0]]]


def test_rows_of_zeros_stay_zeros() -> None:
    for bits in (8, 4):
        assert not quantize(torch.zeros(2, 3, 64), bits, 32).dequantized().any()


def test_rounding_is_to_the_nearest_level() -> None:
    weights = torch.randn(2, 3, 64)
    rounded = quantize(weights, 8, 32)
    steps = rounded.scales.repeat_interleave(32, dim=-1)
    inside = weights / steps <= 127
    assert inside.float().mean() > 0.9
    assert ((rounded.dequantized() - weights).abs() <= steps.abs() * torch.where(inside, 0.5001, 1.0001)).all()
