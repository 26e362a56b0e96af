from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch

from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.ops import experts, grouped_linear
from moeify.measure import TOLERANCE, relative_difference
from tests.kernels import oracle

# Inside a kernel a product is summed in fp32, in another order than the oracle's float64.
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check(
    inputs: oracle.Inputs,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> None:
    ours = oracle.cast(inputs, dtype)
    exact = oracle.cast(
        {n: t if t is None or n == "ids" else t.detach().double() for n, t in ours.items()}, torch.float64
    )
    for name in frozen:
        ours[name].requires_grad_(False)
        exact[name].requires_grad_(False)
    out = experts(*ours.values(), activation=activation, gated=gated, implementation="triton", **options)
    expected = oracle.experts(exact, activation, gated)
    tolerance = TOLERANCE[DTYPES[dtype]]
    assert out.dtype == dtype and relative_difference(out, expected) <= tolerance
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = oracle.gradients(out, ours, grad), oracle.gradients(expected, exact, grad)
    for name in want:
        assert got[name].isfinite().all(), name
        assert relative_difference(got[name], want[name]) <= tolerance, name


SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "top_k": 2, "experts": 4, "hidden": 40, "intermediate": 24},
    "fewer tokens than experts": {"tokens": 3, "top_k": 2, "experts": 16, "hidden": 33, "intermediate": 17},
    "every expert": {"tokens": 7, "top_k": 8, "experts": 8, "hidden": 24, "intermediate": 19},
    "no tokens": {"tokens": 0, "top_k": 2, "experts": 4, "hidden": 16, "intermediate": 16},
    "whole tiles": {"tokens": 64, "top_k": 2, "experts": 4, "hidden": 64, "intermediate": 64},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    check(oracle.make_inputs(**SHAPES[shape], gated=True, bias=True), "silu", True, dtype)


def test_tiles_of_128_rows() -> None:
    check(oracle.make_inputs(129, 4, 20, 70, 1, gated=True, bias=True), "silu", True, torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(activation: str, gated: bool) -> None:
    check(oracle.make_inputs(9, 3, 21, 18, 5, gated=gated, bias=gated), activation, gated, torch.float32)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_choices(top_k: int) -> None:
    check(oracle.make_inputs(5, top_k, 18, 20, 8, gated=True, bias=False), "gelu", True, torch.float32)


@pytest.mark.parametrize("ids", [[[3, 3]] * 20, [[0, -1], [5, 2], [99, -7]], [[-1, 5], [6, 7]]])
def test_expert_ids(ids: list[list[int]]) -> None:
    inputs = oracle.make_inputs(len(ids), 2, 17, 18, 5, gated=True, bias=True, ids=torch.tensor(ids))
    check(inputs, "silu", True, torch.float32)


def test_ids_of_a_type_that_cannot_hold_the_number_of_experts() -> None:
    ids = torch.tensor([[1, 127], [-56, 3]], dtype=torch.int8)  # -56 is 200 in eight bits
    inputs = oracle.make_inputs(2, 2, 5, 3, 201, gated=True, bias=True, ids=ids)
    check(inputs, "silu", True, torch.float32, frozen=("up", "down", "up_bias", "down_bias"))


@pytest.mark.parametrize("layout", ["gaps", "transposed"])
def test_strided_inputs(layout: str) -> None:
    def stride(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t], -1)[..., 0] if layout == "gaps" else t.mT.contiguous().mT

    inputs = oracle.cast(oracle.make_inputs(6, 2, 18, 20, 3, gated=True, bias=True), torch.float32)
    strided = {
        n: t if t is None else stride(t.detach()).requires_grad_(n != "ids") for n, t in inputs.items() if n != "ids"
    }
    results = []
    for leaves in (inputs, {**inputs, **strided}):
        out = experts(*leaves.values(), activation="silu", gated=True, implementation="triton")
        grad = torch.randn(18, 6, generator=torch.Generator().manual_seed(0)).t()
        results.append([out, *oracle.gradients(out, leaves, grad).values()])
    for a, b in zip(*results, strict=True):
        assert relative_difference(a, b) < 1e-6  # the interpreter's BLAS rounds by memory layout


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """The same values with so much memory between rows that the last lies past 2**31 elements; none of it is used."""
    stride = (1 << 31) // (t.shape[0] - 1) + 16
    pages = mmap.mmap(-1, (t.shape[0] * stride) * t.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    out = torch.frombuffer(pages, dtype=t.dtype).as_strided(t.shape, (stride, *t.stride()[1:]))
    return out.copy_(t)


def test_addresses_past_two_to_the_31() -> None:
    inputs = oracle.make_inputs(5, 2, 18, 20, 4, gated=True, bias=True, dtype=torch.float16)
    plain, far = oracle.cast(inputs, torch.float16), oracle.cast(inputs, torch.float16)
    for name in ("x", "up", "down", "up_bias", "down_bias"):
        far[name] = far_apart(inputs[name]).requires_grad_()
    results = []
    for leaves in (plain, far):
        out = experts(*leaves.values(), activation="silu", gated=True, implementation="triton")
        grad = torch.ones(5, 18, dtype=torch.float16)
        grad = far_apart(grad) if leaves is far else grad
        results.append([out, *oracle.gradients(out, leaves, grad).values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_rows_of_one_tile_more_than_two_to_the_31_apart() -> None:
    x, w, offsets = torch.randn(24, 5), torch.randn(2, 3, 5), torch.tensor([0, 3, 24], dtype=torch.int32)
    wide = far_apart(w[0])[None].expand(2, 3, 5)
    assert torch.equal(
        grouped_linear(far_apart(x), wide, None, offsets, "triton"),
        grouped_linear(x, w[:1].expand(2, 3, 5), None, offsets, "triton"),
    )


def test_twice_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        inputs = oracle.cast(oracle.make_inputs(9, 2, 18, 20, 3, gated=True, bias=True), torch.float32)
        out = experts(*inputs.values(), activation="silu", gated=True, implementation="triton")
        results.append([out, *oracle.gradients(out, inputs, torch.ones_like(out)).values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_token_with_nan_stays_alone() -> None:
    inputs = oracle.make_inputs(6, 2, 18, 20, 3, gated=True, bias=True, dtype=torch.float32)
    inputs["x"][4] = float("nan")
    out = experts(*inputs.values(), activation="relu", gated=True, implementation="triton")
    assert out[4].isnan().all() and out[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear(transposed: bool, bias: bool) -> None:
    x, offsets = torch.randn(40, 35), torch.tensor([0, 17, 17, 37], dtype=torch.int32)
    w = torch.randn(3, 35, 23).transpose(1, 2) if transposed else torch.randn(3, 23, 35)
    leaves = [t.requires_grad_() for t in (x, w, torch.randn(3, 23))]
    results = []
    for implementation in ("triton", "reference"):
        y = grouped_linear(x, w, leaves[2] if bias else None, offsets, implementation)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves[: 2 + bias])])
    for a, b in zip(*results, strict=True):
        assert relative_difference(a, b) <= TOLERANCE["float32"]
