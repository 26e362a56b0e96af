from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from moeify.kernels.gpu.blocksparse import sdd
from moeify.kernels.ops import experts, grouped_linear, quantized_experts
from moeify.kernels.quantized import Quantized
from moeify.kernels.topology import block_topology
from tests.kernels import oracle
from tests.kernels.quantizing import to_int4

WRONG: dict[str, oracle.Inputs] = {
    "x has shape": {"x": torch.randn(3, 9)},
    "up has shape": {"up": torch.randn(4, 5, 6)},
    "down has shape": {"down": torch.randn(6, 7)},
    "weights has shape": {"weights": torch.rand(3, 1)},
    "up_bias has shape": {"up_bias": torch.randn(4, 7)},
    "down_bias has shape": {"down_bias": torch.randn(6)},
    "expert_ids has shape": {"ids": torch.zeros(2, 2, dtype=torch.long)},
    "expert_ids has shape .T, 0.": {"ids": torch.zeros(3, 0, dtype=torch.long)},
    "expert_ids has dtype": {"ids": torch.zeros(3, 2)},
    "x has dtype": {"x": torch.zeros(3, 6, dtype=torch.long)},
    "weights has dtype": {"weights": torch.zeros(3, 2, dtype=torch.long)},
    "down has dtype": {"down": torch.randn(4, 6, 7, dtype=torch.float64)},
    "x has dtype torch.float8_e4m3fn": {"x": torch.zeros(3, 6).to(torch.float8_e4m3fn)},
    "up is on meta": {"up": torch.zeros(4, 14, 6, device="meta")},
    "down has shape .0, 6, 7.": {"down": torch.zeros(0, 6, 7), "up": torch.zeros(0, 14, 6)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    inputs = oracle.make_inputs(3, 2, 6, 7, 4, gated=True, bias=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"^{message}.*: expected .*;") as raised:
        experts(*(inputs | WRONG[message]).values(), activation="silu", gated=True)
    assert "\n" not in str(raised.value)


QUANTIZED: dict[str, dict[str, Any]] = {
    "up has dtype": {"up": Quantized(torch.zeros(4, 128, 64), torch.ones(4, 1, 1))},
    "up has shape .4, 128, 32.": {"up": Quantized(torch.zeros(4, 128, 16, dtype=torch.uint8), torch.ones(4, 128, 1))},
    "the scale of down has shape .3, 1, 1.": {"scale": torch.ones(3, 1, 1)},
    "the scale of down has shape .4, 7, 2.": {"scale": torch.ones(4, 7, 2)},
    "the scale of down has shape .4, 1, 4.": {"scale": torch.ones(4, 1, 4)},
    "the scale of down is on meta": {"scale": torch.ones(4, 1, 1, device="meta")},
    "x has shape": {"x": torch.randn(3, 62)},
    "quantized experts have no gradient": {"x": torch.randn(3, 64, requires_grad=True)},
}


@pytest.mark.parametrize("message", QUANTIZED)
def test_wrong_quantized_arguments_are_named(message: str) -> None:
    made: dict[str, Any] = oracle.make_inputs(3, 2, 64, 64, 4, gated=True, bias=False, dtype=torch.float32)
    made |= {"up": to_int4(made["up"], 32), "down": to_int4(made["down"], 32)}
    assert quantized_experts(*made.values(), activation="silu", gated=True).isfinite().all()
    change = dict(QUANTIZED[message])
    if "scale" in change:
        change = {"down": made["down"]._replace(scales=change["scale"])}
    with pytest.raises(ValueError, match=f"^{message}.*: expected .*;") as raised:
        quantized_experts(*(made | change).values(), activation="silu", gated=True)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors on CPU")
def test_triton_needs_a_gpu() -> None:
    inputs = oracle.make_inputs(3, 2, 6, 7, 4, gated=True, bias=True, dtype=torch.float32)
    with pytest.raises(ValueError, match="got a tensor on cpu: expected a GPU; use 'auto'"):
        experts(*inputs.values(), activation="silu", gated=True, implementation="triton")
    with pytest.raises(ValueError, match="a is on cpu: expected a GPU"):
        topology = block_topology(torch.tensor([0, 3], dtype=torch.int32), 3, 4, 16)
        sdd(torch.zeros(3, 5), torch.zeros(5, 4), topology)


@pytest.mark.parametrize("options", [{"activation": "mish"}, {"implementation": "cuda"}])
def test_unknown_names_list_the_known(options: dict[str, Any]) -> None:
    inputs = oracle.make_inputs(3, 2, 6, 7, 4, gated=True, bias=False)
    known: dict[str, Any] = {"activation": "silu", "gated": True}
    with pytest.raises(ValueError, match="expected one of"):
        experts(*inputs.values(), **known | options)


def test_grouped_linear_arguments() -> None:
    x, w, offsets = torch.randn(3, 6), torch.randn(4, 7, 6), torch.zeros(5, dtype=torch.int32)
    for arguments, message in (
        ((x, w[0], None, offsets), "w has shape"),
        ((x, w, torch.zeros(7), offsets), "b has shape"),
        ((x, w, None, offsets[1:]), "offsets has shape"),
        ((x, w, None, offsets.long()), "offsets has dtype"),
        ((x.double(), w, None, offsets), "w has dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_linear(*arguments)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("offsets", "expert"),
    [([0, 3, 2, 5], 1), ([0, 3, 4, 6], 2), ([1, 3, 4, 5], 0), ([-1, 0, 4, 5], 0), ([0, 7, 5, 5], 0), ([0, 2, 7, 5], 1)],
)
def test_offsets_that_do_not_cut_the_rows_are_refused(offsets: list[int], expert: int, implementation: str) -> None:
    x, w = torch.randn(5, 6), torch.randn(3, 7, 6)
    found = f"offsets of expert {expert} are {offsets[expert]} and {offsets[expert + 1]}: "
    with pytest.raises(ValueError, match=f"^{found}.* within the 5 rows of x; use"):
        grouped_linear(x, w, None, torch.tensor(offsets, dtype=torch.int32), implementation)
    assert grouped_linear(x, w, None, torch.tensor([0, 3, 3, 4], dtype=torch.int32), implementation)[4].eq(0).all()
