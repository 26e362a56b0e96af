from __future__ import annotations

from typing import Any

import pytest
import torch

from moeify.kernels import reference
from moeify.kernels.quantized import dequantize
from moeify.layers import Experts
from moeify.layers.quantized_experts import QuantizedExperts
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle


def build(form: str, *, gated: bool, bias: bool, hidden: int = 38, intermediate: int = 150) -> QuantizedExperts:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_experts": 3, "activation": "gelu", "gated": gated}
    stacked = Experts(hidden, intermediate, **sizes, up_rows=intermediate * (1 + gated), up_bias=bias, down_bias=bias)
    for parameter in stacked.parameters():
        torch.nn.init.normal_(parameter)
        parameter.data[1] *= 100  # a scale of one expert is none of another
    made = QuantizedExperts(stacked, form, "gelu")
    assert not list(stacked.parameters())
    return made


@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_each_expert_computes_with_its_own_numbers(form: str, gated: bool, bias: bool) -> None:
    experts = build(form, gated=gated, bias=bias)
    ids = torch.tensor([[0, 1], [2, 3], [-1, 2], [1, 0], [2, 2]])
    x, weights = torch.randn(5, 38), torch.rand(5, 2)
    up, down = experts.weights
    biases = [getattr(experts, f"{name}_bias") for name in (experts.up_name, "down_proj")]
    exact = [None if b is None else b.detach().double() for b in biases]
    with torch.no_grad():
        got = experts(x, ids, weights)
    if form == "int4":
        whole = [dequantize(weight, torch.float64) for weight in (up, down)]
        names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
        given = (x.double(), ids, weights.double(), *whole, *exact)
        want = oracle.experts(dict(zip(names, given, strict=True)), "gelu", gated)
    else:  # tokens are rounded too, by groups of 128
        tokens = (x.double(), ids, weights.double(), up.values, down.values)
        want = reference.experts(*tokens, exact[0], exact[1], "gelu", gated, up.scales, down.scales)
    assert relative_difference(got, want) <= (TOLERANCE["float32"] if form == "int4" else 1e-2)
    assert f"3 x gelu {'GLU' if gated else 'MLP'} in {form} 38 → 150 → 38" in repr(experts)


def test_biases_follow_a_cast_and_numbers_do_not() -> None:
    experts = build("fp8", gated=True, bias=True)
    before = {name: tensor.clone() for name, tensor in experts.named_buffers()}
    experts.to(torch.bfloat16)
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in experts.named_buffers())
    assert {tensor.dtype for tensor in experts.parameters()} == {torch.bfloat16}
    assert (
        experts(torch.randn(2, 38, dtype=torch.bfloat16), torch.zeros(2, 1).long(), torch.ones(2, 1)).dtype
        == torch.bfloat16
    )
    assert all(tensor.is_meta for tensor in experts.to("meta").buffers())


def test_tokens_in_another_dtype_than_the_biases() -> None:
    experts = build("int4", gated=False, bias=True)
    x, ids, weights = torch.randn(2, 38), torch.tensor([[0], [2]]), torch.ones(2, 1)
    with torch.no_grad():
        wide, narrow = experts(x, ids, weights), experts(x.bfloat16(), ids, weights)
    assert narrow.dtype == torch.bfloat16 and relative_difference(narrow, wide.double()) <= TOLERANCE["bfloat16"]
