from __future__ import annotations

import pytest
import torch

from moeify.kernels.ops import quantized_experts
from moeify.kernels.quantized import Quantized
from moeify.measure import relative_difference, tolerance_of
from tests.kernels import oracle
from tests.kernels.quantizing import to_e4m3, to_int4

# A number that rounding sends to the other of two neighbors in e4m3 is off by a sixteenth.
FLIPPED = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


def weights(kind: str, made: oracle.Inputs) -> tuple[Quantized, Quantized]:
    up, down = made["up"], made["down"]
    if kind == "int4":
        return to_int4(up, 64), to_int4(down, 32)
    blocks = {"per tensor": (up.shape[1:], down.shape[1:]), "blocks": ((128, 128), (128, 128))}
    return to_e4m3(up, blocks[kind][0]), to_e4m3(down, blocks[kind][1])


@pytest.mark.parametrize("kind", ["per tensor", "blocks", "int4"])
@pytest.mark.parametrize(("tokens", "dtype", "gated"), [(5, torch.float32, True), (25, torch.bfloat16, False)])
def test_quantized_experts(kind: str, tokens: int, dtype: torch.dtype, gated: bool) -> None:
    ids = torch.randint(-1, 4, (tokens, 2), generator=torch.Generator().manual_seed(0))
    made = oracle.make_inputs(tokens, 2, 192, 96 if kind == "int4" else 136, 3, gated=gated, bias=gated, ids=ids)
    up, down = weights(kind, made)
    made |= {name: None if made[name] is None else made[name].to(dtype) for name in ("x", "up_bias", "down_bias")}
    exact = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in made.items()}
    results = [
        quantized_experts(
            given["x"], ids, given["weights"], up, down, given["up_bias"], given["down_bias"],
            activation="silu", gated=gated, implementation=implementation,
        )
        for given, implementation in ((made, "triton"), (exact, "reference"))
    ]  # fmt: skip
    assert results[0].dtype == dtype
    assert relative_difference(*results) <= (tolerance_of(dtype) if kind == "int4" else FLIPPED[dtype])
