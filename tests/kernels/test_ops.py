from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.layout import routing_layout
from moeify.kernels.ops import combine, dispatch, experts, grouped_linear
from moeify.measure import TOLERANCE, relative_difference, tolerance_of
from tests.kernels import oracle


def run(inputs: oracle.Inputs, activation: str, gated: bool, **options: Any) -> Tensor:
    return experts(*inputs.values(), activation=activation, gated=gated, **options)


def check_against_oracle(
    inputs: oracle.Inputs, activation: str, gated: bool, dtype: torch.dtype, **options: Any
) -> None:
    ours = oracle.cast(inputs, dtype)
    exact = oracle.cast(
        {n: t if t is None or n == "ids" else t.detach().double() for n, t in ours.items()}, torch.float64
    )
    out, expected = run(ours, activation, gated, **options), oracle.experts(exact, activation, gated)
    tolerance = tolerance_of(dtype)
    assert out.dtype == dtype and relative_difference(out, expected) <= tolerance
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, want = oracle.gradients(out, ours, grad), oracle.gradients(expected, exact, grad)
    for name in want:
        assert got[name].dtype == dtype
        assert relative_difference(got[name], want[name]) <= tolerance, name


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation_and_gradient(implementation: str, activation: str, gated: bool, bias: bool) -> None:
    inputs = oracle.make_inputs(11, 3, 13, 9, 5, gated=gated, bias=bias)
    check_against_oracle(inputs, activation, gated, torch.float64, implementation=implementation)


SHAPES: dict[str, dict[str, Any]] = {
    "one token": {"tokens": 1, "top_k": 2, "experts": 4},
    "fewer tokens than experts": {"tokens": 3, "top_k": 2, "experts": 16},
    "every expert": {"tokens": 7, "top_k": 8, "experts": 8},
    "more choices than experts": {"tokens": 5, "top_k": 4, "experts": 2},
    "no tokens": {"tokens": 0, "top_k": 2, "experts": 4},
    "one expert": {"tokens": 40, "top_k": 1, "experts": 1},
    "many rows": {"tokens": 100, "top_k": 1, "experts": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes(shape: str, dtype: torch.dtype) -> None:
    inputs = oracle.make_inputs(**SHAPES[shape], hidden=19, intermediate=21, gated=True, bias=True)
    check_against_oracle(inputs, "silu", True, dtype)


@pytest.mark.parametrize(
    "ids",
    [
        [[3, 3], [3, 3], [3, 3]],
        [[0, -1], [5, 2], [99, -7]],
        [[-1, 5], [6, 7], [-3, -4]],
    ],
    ids=["all on one expert", "some outside", "all outside"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_expert_ids(ids: list[list[int]], dtype: torch.dtype) -> None:
    tensor = torch.tensor(ids).to(dtype)
    inputs = oracle.make_inputs(3, 2, 6, 7, 5, gated=True, bias=True, ids=tensor)
    check_against_oracle(inputs, "gelu", True, torch.float64)


def test_experts_without_tokens_get_zero_gradients() -> None:
    inputs = oracle.cast(
        oracle.make_inputs(3, 1, 6, 7, 5, gated=True, bias=True, ids=torch.full((3, 1), 2)), torch.float32
    )
    grads = oracle.gradients(run(inputs, "silu", True), inputs, torch.ones(3, 6))
    for name in ("up", "down", "up_bias", "down_bias"):
        assert grads[name][2].abs().sum() > 0
        assert (grads[name][[0, 1, 3, 4]] == 0).all()


def test_strided_inputs() -> None:
    inputs = oracle.make_inputs(6, 2, 10, 8, 3, gated=True, bias=True)
    strided: oracle.Inputs = {n: None if t is None else torch.stack([t, t], -1)[..., 0] for n, t in inputs.items()}
    up = inputs["up"]
    strided["up"] = up.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(t is None or not t.is_contiguous() for t in strided.values())
    torch.testing.assert_close(run(strided, "silu", True), run(inputs, "silu", True))
    assert not strided["up"].is_contiguous()
    leaves = {n: t if t is None or n == "ids" else t.requires_grad_() for n, t in strided.items()}
    exact = oracle.cast(inputs, torch.float64)
    grad = torch.ones(10, 6, dtype=torch.float64).t()
    got = oracle.gradients(run(leaves, "silu", True), leaves, grad)
    for name, want in oracle.gradients(oracle.experts(exact, "silu", True), exact, grad).items():
        assert relative_difference(got[name], want) < TOLERANCE["float64"], name


def test_the_inputs_the_pre_activation_and_the_order_are_kept() -> None:
    inputs = oracle.cast(oracle.make_inputs(9, 2, 12, 10, 4, gated=True, bias=True), torch.float32)
    out: Any = run(inputs, "silu", True)
    kept = sum(t.numel() for t in out.grad_fn.saved_tensors) - sum(t.numel() for t in inputs.values())
    assert kept == 9 * 2 * 20 + 9 * 2 + (4 + 1)


def test_frozen_inputs_get_no_gradient() -> None:
    inputs = oracle.cast(oracle.make_inputs(5, 2, 6, 7, 3, gated=True, bias=True), torch.float64)
    everything = oracle.gradients(run(inputs, "silu", True), inputs, torch.ones(5, 6))
    for name, tensor in inputs.items():
        if name == "ids" or tensor is None:
            continue
        alone = {n: t if t is None or n == name else t.detach() for n, t in inputs.items()}
        assert torch.equal(oracle.gradients(run(alone, "silu", True), alone, torch.ones(5, 6))[name], everything[name])


def test_weights_in_another_dtype() -> None:
    inputs = oracle.cast(oracle.make_inputs(5, 2, 6, 7, 3, gated=True, bias=False), torch.bfloat16)
    weights = inputs["weights"]
    inputs["weights"] = weights.detach().float().requires_grad_()
    out = run(inputs, "silu", True)
    assert out.dtype == torch.bfloat16
    assert oracle.gradients(out, inputs, torch.ones_like(out))["weights"].dtype == torch.float32


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_gradcheck_first_and_second_order(implementation: str) -> None:
    inputs = oracle.cast(oracle.make_inputs(3, 2, 3, 2, 3, gated=True, bias=True), torch.float64)
    names = [n for n in inputs if n != "ids"]

    def function(*tensors: Tensor) -> Tensor:
        return run({**inputs, **dict(zip(names, tensors, strict=True))}, "silu", True, implementation=implementation)

    tensors = [inputs[n] for n in names]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_a_token_with_nan_stays_alone() -> None:
    inputs = oracle.make_inputs(6, 2, 8, 8, 3, gated=True, bias=True, dtype=torch.float32)
    clean = run(inputs, "silu", True)
    inputs["x"][4] = float("nan")
    out = run(inputs, "silu", True)
    assert out[4].isnan().all()
    rest = [0, 1, 2, 3, 5]
    torch.testing.assert_close(out[rest], clean[rest])


def test_grouped_linear_and_a_composed_activation() -> None:
    inputs = oracle.cast(
        oracle.make_inputs(7, 2, 6, 5, 4, gated=True, bias=True, ids=torch.randint(-1, 5, (7, 2))), torch.float64
    )
    x, ids, weights, up, down, up_bias, down_bias = inputs.values()
    layout = routing_layout(ids, 4)
    z = grouped_linear(dispatch(x, layout), up, up_bias, layout.offsets_E1)
    assert (z[int(layout.offsets_E1[-1]) :] == 0).all()
    gate, up_half = z.chunk(2, -1)
    y = grouped_linear(torch.nn.functional.silu(gate) * up_half, down, down_bias, layout.offsets_E1)
    out = combine(y, weights, layout)
    expected = run(inputs, "silu", True)
    assert relative_difference(out, expected) < TOLERANCE["float64"]
    grad = torch.randn_like(out)
    got, want = oracle.gradients(out, inputs, grad), oracle.gradients(expected, inputs, grad)
    for name in want:
        assert relative_difference(got[name], want[name]) < TOLERANCE["float64"], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grouped_linear_takes_transposed_weights(dtype: torch.dtype) -> None:
    x, w = torch.randn(6, 5).to(dtype), torch.randn(3, 5, 7).to(dtype).transpose(1, 2)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (x, w)]
    results = []
    for implementation in ("cpu", "reference"):
        y = grouped_linear(x, w, None, offsets, implementation)
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    for a, b in zip(*results, strict=True):
        assert relative_difference(a, b) <= tolerance_of(dtype)
    assert torch.autograd.gradgradcheck(
        lambda x, w: grouped_linear(x, w, None, offsets), [t.detach().double().requires_grad_() for t in leaves]
    )
