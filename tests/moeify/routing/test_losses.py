"""The losses: their stated values, loops over Python floats, levels, masks, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moeify.errors import ConfigError
from moeify.measure import TOLERANCE
from moeify.routers.noisy_topk import noisy_topk
from moeify.routers.sigmoid import sigmoid_grouped
from moeify.routers.softmax import softmax_topk
from moeify.routing.losses import (
    deepseek_sequence_loss,
    expert_counts,
    importance_cv2,
    load_balancing_loss,
    load_cv2,
    z_loss,
)
from tests.moeify.routing import draw

randn = partial(draw.randn, dtype=torch.float64)


def close(actual: Tensor, expected: float | Tensor, dtype: str = "float64") -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


# --- the stated values: 8 experts, top-2 -------------------------------------------------------------------------

BALANCED_IDS = torch.stack([torch.arange(24) % 8, (torch.arange(24) + 3) % 8], dim=-1)
COLLAPSED_IDS = torch.tensor([[2, 5]]).repeat(24, 1)
UNIFORM = torch.full((24, 8), 1 / 8)
COLLAPSED = torch.zeros(24, 8).index_fill(1, torch.tensor([2, 5]), 0.5)


@pytest.mark.parametrize(("divide_by_top_k", "balanced", "collapsed"), [(True, 1.0, 4.0), (False, 2.0, 8.0)])
def test_load_balancing_values(divide_by_top_k: bool, balanced: float, collapsed: float) -> None:
    close(load_balancing_loss(UNIFORM, BALANCED_IDS, divide_by_top_k=divide_by_top_k), balanced, "float32")
    close(load_balancing_loss(COLLAPSED, COLLAPSED_IDS, divide_by_top_k=divide_by_top_k), collapsed, "float32")
    for sequences in (1, 3):
        close(deepseek_sequence_loss(COLLAPSED, 2, sequences=sequences), 4.0, "float32")


def test_deepseek_balanced_value() -> None:
    # Each token prefers its two experts by a little, so that the plain top-k is balanced and P uniform.
    scores = UNIFORM + 0.01 * torch.zeros(24, 8).scatter(1, BALANCED_IDS, 1.0)
    close(deepseek_sequence_loss(scores / scores.sum(-1, keepdim=True), 2, sequences=3), 1.0, "float32")


def test_z_loss_values() -> None:
    close(z_loss(torch.zeros(24, 8)), math.log(8) ** 2, "float32")
    close(
        z_loss(torch.full((24, 8), -1e3).index_fill(1, torch.tensor([2, 5]), 30.0)), (30 + math.log(2)) ** 2, "float32"
    )


def test_cv2_values() -> None:
    gates = torch.zeros(24, 8).scatter(1, BALANCED_IDS, 0.5)
    close(importance_cv2(gates), 0.0, "float32")
    close(importance_cv2(COLLAPSED), 3.0, "float32")
    ones, collapsed = torch.ones(24, 8), 100 * COLLAPSED
    close(load_cv2(torch.zeros(24, 8), torch.zeros(24, 8), ones, 2), 0.0, "float32")
    close(load_cv2(collapsed, collapsed, ones, 2), 3.0, "float32")
    close(load_cv2(collapsed, collapsed, ones, 8), 0.0, "float32")


# --- against loops -----------------------------------------------------------------------------------------------


def switch_loss(scores: Tensor, ids: Tensor) -> float:
    """E * sum f P with f the share of tokens that chose e, over all k choices."""
    tokens, experts = scores.shape
    total = 0.0
    for e in range(experts):
        f = sum(row.count(e) for row in ids.tolist()) / tokens
        total += f * float(scores[:, e].sum()) / tokens
    return experts * total


def test_load_balancing_loop() -> None:
    routing = softmax_topk(randn(37, 5), 2)
    expected = switch_loss(routing.scores_TE, routing.expert_ids_TK)
    close(load_balancing_loss(routing.scores_TE, routing.expert_ids_TK, divide_by_top_k=False), expected)
    close(load_balancing_loss(routing.scores_TE, routing.expert_ids_TK, divide_by_top_k=True), expected / 2)
    # GShard: first choices.
    first = routing.expert_ids_TK[:, :1]
    close(load_balancing_loss(routing.scores_TE, first, divide_by_top_k=True), switch_loss(routing.scores_TE, first))
    dropped = first.masked_fill(torch.arange(37).unsqueeze(-1) % 3 == 0, 5)
    close(
        load_balancing_loss(routing.scores_TE, dropped, divide_by_top_k=True), switch_loss(routing.scores_TE, dropped)
    )


def test_sequence_level_is_the_mean_over_sequences() -> None:
    routing, mask = softmax_topk(randn(33, 5), 2), torch.ones(33, dtype=torch.bool)
    mask[7:11] = mask[22:] = False  # the first sequence is partly padding, the last entirely
    scores, ids = routing.scores_TE, routing.expert_ids_TK
    expected = (switch_loss(scores[:7], ids[:7]) + switch_loss(scores[11:22], ids[11:22])) / 2
    close(load_balancing_loss(scores, ids, divide_by_top_k=False, mask_T=mask, sequences=3), expected)
    with pytest.raises(ConfigError, match="33 tokens are not 2 sequences"):
        load_balancing_loss(scores, ids, divide_by_top_k=False, sequences=2)


def test_global_level_averages_to_the_loss_of_the_whole_batch() -> None:
    logits = randn(40, 5) + torch.arange(40).unsqueeze(-1) * torch.linspace(-0.05, 0.05, 5)
    whole = softmax_topk(logits, 2)
    micro_batches = [softmax_topk(part, 2) for part in (logits[:20], logits[20:])]
    counts = torch.stack([expert_counts(part.expert_ids_TK, 5) for part in micro_batches]).sum(0)
    assert torch.equal(counts, torch.bincount(whole.expert_ids_TK.flatten(), minlength=5))
    for normalize in (True, False):
        losses = [
            load_balancing_loss(part.scores_TE, part.expert_ids_TK, divide_by_top_k=normalize, counts_E=counts)
            for part in micro_batches
        ]
        expected = load_balancing_loss(whole.scores_TE, whole.expert_ids_TK, divide_by_top_k=normalize)
        close(torch.stack(losses).mean(), expected)
        local = load_balancing_loss(
            micro_batches[0].scores_TE, micro_batches[0].expert_ids_TK, divide_by_top_k=normalize
        )
        assert abs(float(losses[0] - local)) > 1e-3


def test_expert_counts_skip_dropped_places_and_padding() -> None:
    ids = torch.tensor([[0, 3], [1, 0], [2, 0]])
    assert expert_counts(ids, 3).tolist() == [3, 1, 1]
    assert expert_counts(ids, 3, mask_T=torch.tensor([True, True, False])).tolist() == [2, 1, 0]


def test_deepseek_counts_plain_scores_and_not_the_biased_choice() -> None:
    routing = sigmoid_grouped(randn(30, 6), 2, bias_E=torch.linspace(-1, 1, 6).double())
    scores = routing.scores_TE
    plain = scores.topk(2).indices
    assert not torch.equal(plain.sort().values, routing.expert_ids_TK.sort().values)
    expected = sum(switch_loss(scores[i : i + 10], plain[i : i + 10]) for i in (0, 10, 20)) / 3 / 2
    close(deepseek_sequence_loss(scores, 2, sequences=3), expected)


def test_z_loss_loop() -> None:
    logits = randn(37, 5)
    close(z_loss(logits), sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 37)


def cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def test_importance_loop() -> None:
    gates = softmax_topk(randn(37, 5), 2).scores_TE
    close(importance_cv2(gates), cv2(gates.sum(0).tolist()), "float32")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_loop(top_k: int) -> None:
    torch.manual_seed(2)
    routing = noisy_topk(randn(37, 5), randn(37, 5, seed=1), top_k)
    assert routing.clean_logits_TE is not None and routing.noise_std_TE is not None
    load = [0.0] * 5
    for t in range(37):
        noisy = routing.logits_TE[t].tolist()
        for i in range(5):
            threshold = sorted(noisy[:i] + noisy[i + 1 :], reverse=True)[top_k - 1]
            z = (float(routing.clean_logits_TE[t, i]) - threshold) / float(routing.noise_std_TE[t, i])
            load[i] += 0.5 * math.erfc(-z / math.sqrt(2))
    close(load_cv2(routing.clean_logits_TE, routing.logits_TE, routing.noise_std_TE, top_k), cv2(load), "float32")


# --- every loss alike: gradients, padding, nothing at all ---------------------------------------------------------


def noisy_load(logits: Tensor, mask: Tensor | None, top_k: int = 2) -> Tensor:
    noise = 0.3 * torch.sin(torch.arange(logits.numel()).to(logits)).reshape(logits.shape)
    std = torch.nn.functional.softplus(logits.flip(-1))
    return load_cv2(logits, logits + noise * std, std, top_k, mask_T=mask)


LOSSES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "load balancing": lambda logits, mask: load_balancing_loss(
        logits.softmax(-1), logits.detach().topk(2).indices, divide_by_top_k=True, mask_T=mask
    ),
    "load balancing, global": lambda logits, mask: load_balancing_loss(
        logits.softmax(-1),
        logits.detach().topk(2).indices,
        divide_by_top_k=False,
        mask_T=mask,
        counts_E=torch.arange(5),
    ),
    "deepseek": lambda logits, mask: deepseek_sequence_loss(logits.softmax(-1), 2, mask_T=mask),
    "z": lambda logits, mask: z_loss(logits, mask_T=mask),
    "importance": lambda logits, mask: importance_cv2(logits.softmax(-1), mask_T=mask),
    "load": noisy_load,
    "load, every expert": lambda logits, mask: noisy_load(logits, mask, 5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    mask = torch.arange(9) % 4 != 3
    for m in (None, mask):
        assert torch.autograd.gradcheck(lambda logits, m=m: LOSSES[name](logits, m), (randn(9, 5).requires_grad_(),))


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_is_the_same_as_leaving_padding_out(name: str) -> None:
    logits, mask = randn(12, 5), torch.arange(12) < 9
    close(LOSSES[name](logits, mask), LOSSES[name](logits[:9], None))


def test_padded_rows_get_no_gradient_whatever_they_hold() -> None:
    mask = torch.arange(12) % 3 != 1
    logits, noisy, std = (randn(12, 5, seed=i).exp().masked_fill(~mask.unsqueeze(-1), math.nan) for i in range(3))
    leaves = [logits.requires_grad_(), noisy.requires_grad_(), std.requires_grad_()]
    ids = torch.zeros(12, 2, dtype=torch.int64)
    loss = (
        load_balancing_loss(logits, ids, divide_by_top_k=True, mask_T=mask)
        + deepseek_sequence_loss(logits, 2, mask_T=mask, sequences=2)
        + z_loss(logits, mask_T=mask)
        + importance_cv2(logits, mask_T=mask)
        + load_cv2(logits, noisy, std, 2, mask_T=mask)
    )
    for grad in torch.autograd.grad(loss, leaves):
        assert grad[mask].isfinite().all() and grad[mask].any()
        assert torch.equal(grad[~mask], torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [0, 6])
def test_no_real_token_is_no_loss_and_no_gradient(name: str, tokens: int) -> None:
    logits = randn(tokens, 5).requires_grad_()
    loss = LOSSES[name](logits, torch.zeros(tokens, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.detach().item() == 0
    assert torch.equal(grad, torch.zeros(tokens, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_meta_and_compile(name: str) -> None:
    mask = torch.ones(9, dtype=torch.bool)
    if name != "load balancing, global":  # its counts are on the CPU
        assert LOSSES[name](torch.zeros(9, 5, device="meta"), mask.to("meta")).shape == ()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    close(compiled(randn(9, 5), mask), LOSSES[name](randn(9, 5), mask))
