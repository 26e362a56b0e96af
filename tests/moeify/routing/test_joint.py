"""Expert choice, sinkhorn and soft MoE, against loops over float64 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moeify.errors import ConfigError
from moeify.measure import TOLERANCE
from moeify.routing.joint import expert_choice, sinkhorn, soft_moe
from moeify.routing.routers import softmax_topk
from tests.moeify.routing.draw import randn


def close(actual: Tensor, expected: object) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE["float32"] * expected.abs().max()


# --- expert choice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 1, 4, 13, 40])
def test_each_expert_takes_its_best_tokens(capacity: int) -> None:
    logits = randn(13, 5)
    routing = expert_choice(logits, capacity)
    p = logits.double().softmax(-1)
    for e in range(5):
        takers = sorted(range(13), key=p[:, e].tolist().__getitem__, reverse=True)[:capacity]
        for t in range(13):
            assert int(routing.expert_ids_TK[t, e]) == (e if t in takers else 5)
            assert float(routing.weights_TK[t, e]) == pytest.approx(float(p[t, e]) if t in takers else 0.0, rel=1e-5)
    close(routing.scores_TE, p)


def test_no_expert_takes_padding() -> None:
    logits, real = randn(13, 5), torch.arange(13) % 3 != 1
    logits[~real] = math.nan
    logits[1] = 50.0
    routing = expert_choice(logits, 6, mask_T=real)
    without = expert_choice(logits[real], 6)
    assert torch.equal(routing.expert_ids_TK[real], without.expert_ids_TK)
    assert torch.equal(routing.weights_TK[real], without.weights_TK)
    assert (routing.expert_ids_TK[~real] == 5).all()
    assert (routing.weights_TK[~real] == 0).all()


def test_fewer_real_tokens_than_capacity() -> None:
    routing = expert_choice(randn(4, 3), 3, mask_T=torch.tensor([False, True, False, False]))
    assert routing.expert_ids_TK.tolist() == [[3, 3, 3], [0, 1, 2], [3, 3, 3], [3, 3, 3]]


# --- sinkhorn ----------------------------------------------------------------------------------------------------


def balanced_plan(logits: Tensor, iterations: int) -> Tensor:
    """The alternating scaling, multiplicative and in float64."""
    cost = logits.double().exp()
    tokens, experts = cost.shape
    column = torch.ones(experts, dtype=torch.float64)
    for _ in range(iterations):
        row = torch.stack([1 / (tokens * (cost[t] * column).sum()) for t in range(tokens)])
        column = torch.stack([1 / (experts * (cost[:, e] * row).sum()) for e in range(experts)])
    return cost * row[:, None] * column


@pytest.mark.parametrize("top_k", [1, 2])
def test_sinkhorn_selects_by_the_balanced_plan(top_k: int) -> None:
    logits = randn(61, 7) + 2 * randn(7, seed=1)
    routing = sinkhorn(logits, top_k)
    plan = balanced_plan(logits, 200)
    assert routing.expert_ids_TK.tolist() == plan.topk(top_k).indices.tolist()
    close(plan.sum(1), torch.full((61,), 1 / 61))  # what the reference promises
    gates = logits.double().sigmoid() if top_k == 1 else logits.double().softmax(-1)
    close(routing.weights_TK, gates.gather(1, routing.expert_ids_TK))


def test_sinkhorn_balances() -> None:
    logits = randn(2048, 8) + torch.linspace(-2, 2, 8)
    plain, balanced = (
        torch.bincount(sinkhorn(logits, 1, iterations=n).expert_ids_TK.flatten(), minlength=8).max() for n in (0, 16)
    )
    assert plain > 4 * 256
    assert balanced < 1.15 * 256


def test_sinkhorn_in_evaluation_is_top_k() -> None:
    logits = randn(9, 5)
    assert torch.equal(sinkhorn(logits, 2, iterations=0).expert_ids_TK, softmax_topk(logits, 2).expert_ids_TK)


def test_sinkhorn_survives_huge_logits() -> None:
    routing = sinkhorn(1e4 * randn(33, 5), 2)
    assert routing.weights_TK.isfinite().all()
    assert (routing.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 1]).all()


def test_sinkhorn_ignores_padding() -> None:
    logits, real = randn(40, 5), torch.arange(40) % 4 != 1
    logits[~real] += 30 * torch.eye(5)[0]
    routing = sinkhorn(logits, 1, mask_T=real)
    assert torch.equal(routing.expert_ids_TK[real], sinkhorn(logits[real], 1).expert_ids_TK)
    nothing = sinkhorn(logits, 1, mask_T=torch.zeros(40, dtype=torch.bool))
    assert nothing.weights_TK.isfinite().all()


def test_sinkhorn_names_a_wrong_top_k() -> None:
    with pytest.raises(ConfigError, match="top_k is 4"):
        sinkhorn(torch.zeros(2, 3), 4)


# --- soft MoE ----------------------------------------------------------------------------------------------------


def test_soft_moe() -> None:
    x, slots, scale = randn(2, 9, 11), randn(6, 11, seed=1), torch.tensor(3.0)
    routing = soft_moe(x, slots, scale)
    for b in range(2):
        cosines = torch.zeros(9, 6, dtype=torch.float64)
        for t in range(9):
            for s in range(6):
                token, slot = x[b, t].double(), slots[s].double()
                cosines[t, s] = token @ slot / (token.norm() + 1e-6) / (slot.norm() + 1e-6)
        weights = (3 * cosines).exp()
        close(routing.dispatch_TS[b], weights / weights.sum(0, keepdim=True))
        close(routing.combine_TS[b], weights / weights.sum(1, keepdim=True))


def test_soft_moe_leaves_padding_out() -> None:
    x, slots, scale = randn(9, 11), randn(6, 11, seed=1), torch.tensor(1.0)
    real = torch.tensor([True, False, True, True, False, True, True, True, True])
    routing, without = soft_moe(x, slots, scale, mask_T=real), soft_moe(x[real], slots, scale)
    close(routing.dispatch_TS[real], without.dispatch_TS)
    close(routing.combine_TS[real], without.combine_TS)
    assert not routing.dispatch_TS[~real].any() and not routing.combine_TS[~real].any()
    nothing = soft_moe(x, slots, scale, mask_T=torch.zeros(9, dtype=torch.bool))
    assert not nothing.dispatch_TS.any() and not nothing.combine_TS.any()


def test_soft_moe_of_a_zero_token_has_finite_gradients() -> None:
    x = torch.zeros(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_moe(x, randn(4, 5), torch.tensor(1.0)).dispatch_TS[0, 0], x)
    assert grad.isfinite().all()


def test_soft_moe_is_float32_under_autocast() -> None:
    x, slots, scale = randn(9, 11, dtype=torch.bfloat16), randn(6, 11, seed=1), torch.tensor(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = soft_moe(x, slots, scale)
    close(routing.dispatch_TS, soft_moe(x.double(), slots.double(), scale.double()).dispatch_TS)


# --- gradients, shapes -------------------------------------------------------------------------------------------


def test_gradients() -> None:
    logits = randn(7, 4, dtype=torch.float64).requires_grad_()
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda logits: expert_choice(logits, 3).weights_TK,
        lambda logits: sinkhorn(logits, 1).weights_TK,
        lambda logits: sinkhorn(logits, 2).weights_TK,
    ]
    assert all(torch.autograd.gradcheck(function, (logits,)) for function in functions)
    inputs = (logits, randn(6, 4, seed=1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))

    def soft(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        routing = soft_moe(*inputs)
        return routing.dispatch_TS, routing.combine_TS

    assert torch.autograd.gradcheck(soft, tuple(tensor.detach().requires_grad_() for tensor in inputs))


@pytest.mark.parametrize(("device", "tokens"), [("meta", 11), ("cpu", 0)])
def test_shapes(device: str, tokens: int) -> None:
    logits, real = torch.zeros(tokens, 6, device=device), torch.ones(tokens, dtype=torch.bool, device=device)
    for mask in (None, real):
        chosen = expert_choice(logits, 4, mask_T=mask)
        assert chosen.expert_ids_TK.shape == chosen.weights_TK.shape == (tokens, 6)
        transported = sinkhorn(logits, 2, mask_T=mask)
        assert transported.expert_ids_TK.shape == transported.weights_TK.shape == (tokens, 2)
        soft = soft_moe(logits, torch.zeros(8, 6, device=device), torch.ones((), device=device), mask_T=mask)
        assert soft.dispatch_TS.shape == soft.combine_TS.shape == (tokens, 8)
