from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from moeify.errors import RefusedError
from moeify.export.lower.weights import quantize, stored, unstacked


def graph_with(value: ir.Value) -> ir.Graph:
    return ir.Graph([], [], nodes=[], initializers=[value])


def transposed(value: ir.Value, *perms: list[int]) -> ir.Value:
    for perm in perms:
        value = ir.node("Transpose", [value], {"perm": perm}).outputs[0]
    return value


def test_a_folded_constant_may_be_in_bfloat16() -> None:
    """Weights that the model transposes are folded to arrays, of a type that torch does not read."""
    weight = torch.randn(3, 5).bfloat16()
    array = ir.tensor(weight.float().numpy(), name="w").numpy().astype(ir.DataType.BFLOAT16.numpy())
    value = ir.Value(name="w", const_value=ir.tensor(array, name="w"))
    assert torch.equal(stored(value).tensor, weight)


def test_a_weight_is_read_through_transposes_and_can_be_put_back() -> None:
    weight = torch.randn(2, 3, 5)
    value = ir.Value(name="w", const_value=ir.tensor(weight.numpy(), name="w"))
    found = stored(transposed(value, [1, 2, 0], [0, 2, 1]))
    assert found.name == "w"
    assert torch.equal(found.tensor, weight.permute(1, 2, 0).permute(0, 2, 1))
    assert torch.equal(found.tensor.permute(found.axes), weight)


def test_a_weight_that_depends_on_the_inputs_is_refused() -> None:
    with pytest.raises(RefusedError, match="the expert weights w are computed by the model"):
        stored(ir.Value(name="w"))


def test_each_expert_gets_its_own_initializer_and_only_once() -> None:
    weight = torch.randn(3, 5, 2)
    value = ir.Value(name="w", const_value=ir.tensor(weight.numpy(), name="w"))
    graph = graph_with(value)
    parts = unstacked(graph, value)
    assert [part.name for part in parts] == ["w.0", "w.1", "w.2"]
    assert all(torch.equal(stored(part).tensor, weight[e]) for e, part in enumerate(parts))
    assert unstacked(graph, value) == parts and len(graph.initializers) == 4


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
