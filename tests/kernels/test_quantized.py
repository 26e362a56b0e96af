from __future__ import annotations

import pytest
import torch

from moeify.kernels import ops, reference
from moeify.kernels.quantized import Quantized, dequantize, quantize, round_rows
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle
from tests.kernels.quantizing import to_e4m3, to_int4


def test_blocks_and_groups_keep_their_scales() -> None:
    w = torch.randn(2, 130, 256, dtype=torch.float64)
    w[:, :128, :128] *= 1000  # in e4m3 a scale for all would leave little of the rest
    for weight, step in ((to_e4m3(w, (128, 128)), 2**-4), (to_int4(w, 64), 1 / 14)):
        exact = dequantize(weight, torch.float64)
        assert weight._replace(scales=weight.scales[:, :0]).block == (0, 0)
        assert exact.shape == w.shape and weight.block == ((128, 128) if not weight.packed else (1, 64))
        for rows, columns in ((slice(0, 128), slice(0, 128)), (slice(128, 130), slice(128, 256))):
            part, want = exact[:, rows, columns], w[:, rows, columns]
            assert 0 < relative_difference(part, want) <= step
    assert relative_difference(dequantize(to_e4m3(w, (130, 256)), torch.float64), w) <= 2**-4


@pytest.mark.parametrize("shape", [(3, 130, 256), (2, 5, 18), (2, 256, 386)])
def test_weights_are_rounded_as_the_formats_say(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[0], w[1, 0] = w[0] * 1e4, 0
    columns = -shape[2] % 128
    for form, want in (
        ("fp8", to_e4m3(w, (128, 128))),
        ("int4", to_int4(torch.nn.functional.pad(w, (0, columns)), 128)),
    ):
        got = quantize(w, form)
        assert got.scales.shape == want.scales.shape and got.block[1] == min(128, shape[2])
        exact, other = dequantize(got, torch.float64), dequantize(want, torch.float64)[..., : shape[2]]
        assert exact.shape == w.shape and (exact[1, 0] == 0).all()
        step = other.abs().max() * (1 / 7 if form == "int4" else 2**-3)
        off = (exact - other).nan_to_num().abs()
        assert off.max() <= step and (off > 0).float().mean() < 0.02  # a number between two may go to either
        for e in range(shape[0]):
            assert relative_difference(exact[e], w[e].double()) <= (1 / 14 if form == "int4" else 2**-4)


def test_a_format_that_is_none_and_a_column_without_a_second_one() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp4' of quantized weights: expected fp8 or int4"):
        quantize(torch.ones(1, 2, 4), "fp4")
    with pytest.raises(ValueError, match="a weight has 3: expected even; use 'fp8'"):
        quantize(torch.ones(1, 2, 3), "int4")
    assert dequantize(quantize(torch.ones(1, 2, 3), "fp8"), torch.float32).equal(torch.ones(1, 2, 3))


def test_the_even_column_is_the_low_half_of_a_byte() -> None:
    packed = Quantized(torch.tensor([[[0x1F, 0x80]]], dtype=torch.uint8), torch.full((1, 1, 1), 0.5))
    assert dequantize(packed, torch.float32).tolist() == [[[3.5, -3.5, -4.0, 0.0]]]


def test_rows_are_rounded_by_groups() -> None:
    x = torch.randn(3, 200, dtype=torch.float64)
    x[0, 128:] *= 1e6
    x[2] = 0
    rounded = round_rows(x)
    assert relative_difference(rounded[0, :128], x[0, :128]) <= 2**-4 and (rounded[2] == 0).all()


@pytest.mark.parametrize("kind", ["e4m3", "int4"])
def test_experts_are_those_with_the_weights_made_whole(kind: str) -> None:
    made = oracle.make_inputs(6, 2, 64, 32, 4, gated=True, bias=True, dtype=torch.float32)
    up, down = (
        to_int4(w, 32) if kind == "int4" else to_e4m3(w, (w.shape[1], w.shape[2])) for w in (made["up"], made["down"])
    )
    got = ops.quantized_experts(
        made["x"], made["ids"], made["weights"], up, down, made["up_bias"], made["down_bias"],
        activation="silu", gated=True,
    )  # fmt: skip
    exact = {n: t if n == "ids" else t.double() for n, t in made.items()}
    whole = exact | {"up": dequantize(up, torch.float64), "down": dequantize(down, torch.float64)}
    want = oracle.experts(whole, "silu", True)
    assert relative_difference(got, want) <= (TOLERANCE["float32"] if kind == "int4" else 0.1)
    same = exact | {"up": up.values, "down": down.values}
    rounded = reference.experts(*(*same.values(), "silu", True, up.scales, down.scales))
    assert relative_difference(got, rounded) <= (TOLERANCE["float32"] if kind == "int4" else 1e-2)
