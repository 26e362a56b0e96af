"""Layers in training against the papers' equations as loops: outputs, losses, every gradient, what is dropped.

Sizes are multiples of nothing, weights random, some tokens padding. Losses are attached, so gradients hold theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import moeify
from moeify import routers
from moeify.config import MoEConfig
from moeify.contract.watch import stock_losses
from moeify.layers.forward_record import ForwardRecord
from moeify.measure import TOLERANCE, relative_difference
from moeify.routers.softmax import softmax_topk
from moeify.routing.balance import weighted_sum
from moeify.routing.losses import load_balancing_loss
from tests.moeify.layers import make, papers
from tests.moeify.routing.draw import randn

SHAPE = (3, 7)
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()
IDS = torch.arange(21).view(SHAPE) * 5 % make.VOCABULARY


@dataclass(frozen=True)
class Case:
    """Settings, the paper as loops, and the paper's capacity for 21 tokens."""

    config: MoEConfig
    paper: Callable[[papers.Given], papers.Routed]
    capacity: int | None = None
    queue: Callable[[papers.Routed], list[tuple[int, int]]] = papers.by_position


def hashed(given: papers.Given) -> papers.Routed:
    """Hash layers (Roller et al. 2021), eq. 4: the expert is that of the token's id, with weight 1."""
    return papers.Routed([[(token % make.VOCABULARY % 5, 1.0)] for token in IDS.flatten().tolist()])


CASES = {
    "switch": Case(MoEConfig.switch(5), papers.switch, 6),  # 21 / 5 * 1.25 = 5.25
    "gshard": Case(MoEConfig.gshard(5), papers.gshard, 9),  # 2 * 21 / 5 = 8.4
    "st_moe": Case(MoEConfig.st_moe(5), papers.st_moe, 6),  # 21 / 5 * 1.25 = 5.25
    "mixtral": Case(MoEConfig.mixtral(5, 2), papers.mixtral),
    "megablocks": Case(MoEConfig.dropless(7, 3), papers.megablocks),
    "megatron": Case(
        MoEConfig(5, 2, renormalize=False, aux_loss=0.3, balance_level="sequence", divide_loss_by_top_k=True,
                  capacity_factor=0.7, min_capacity=1, drop_order="probability"),
        papers.megatron, 6, papers.by_probability,  # 21 * 2 / 5 * 0.7 = 5.88
    ),
    "v_moe": Case(
        MoEConfig(5, 2, renormalize=False, aux_loss=0.3, balance="cv2", capacity_factor=0.5,
                  drop_order="batch_prioritized"),
        papers.v_moe, 5, papers.batch_prioritized,  # 21 * 2 / 5 * 0.5 = 4.2
    ),
    "shazeer": Case(MoEConfig.noisy_topk(7, 3), papers.shazeer),
    "deepseek_v3": Case(
        MoEConfig.deepseek_v3(9, 2, shared_experts=1, router={"n_group": 3, "topk_group": 2}), papers.deepseek_v3
    ),
    "expert_choice": Case(MoEConfig.expert_choice(5, 2), papers.expert_choice),
    "upcycling": Case(
        MoEConfig.expert_choice(5, 2, renormalize=True), partial(papers.expert_choice, renormalize=True)
    ),
    "s_base": Case(MoEConfig(5, 1, router="sinkhorn"), papers.sinkhorn),
    "s_base, two": Case(MoEConfig(5, 2, router="sinkhorn"), papers.sinkhorn),
    "hash": Case(MoEConfig(5, 1, router=routers.Hash(vocab_size=make.VOCABULARY)), hashed),
}  # fmt: skip


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert relative_difference(found, expected.view(found.shape)) <= TOLERANCE["float64"], what


def by_loops(case: Case, layer: Any, x: Tensor, real: Tensor) -> tuple[Tensor, papers.Routed, list[Any]]:
    """The output (T, H), what was chosen, and what is left of it."""
    config = layer.config
    weights = {name: papers.numbers(p) for name, p in layer.router.named_parameters()}
    bias = getattr(layer.router, "selection_bias", torch.zeros(config.experts)).tolist()
    x_TH = x.view(-1, x.shape[-1])
    given = papers.Given(papers.numbers(x_TH), real.flatten().tolist(), x.shape[1], weights, bias, config.top_k)
    torch.manual_seed(3)  # what `make.call` starts with
    routed = case.paper(given)
    left = routed.choices if case.capacity is None else papers.kept(given, routed, case.capacity, case.queue(routed))
    out = papers.combined(x_TH, left, layer.experts.gate_up_proj, layer.experts.down_proj)
    if layer.shared_expert is not None:
        shared = [[(0, 1.0)] for _ in x_TH]
        out = out + papers.combined(x_TH, shared, layer.shared_expert.gate_up_proj, layer.shared_expert.down_proj)
    return out, routed, left


def gradients(total: Tensor, layer: Any, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_what_its_paper_says(name: str, padded: bool) -> None:
    case, real = CASES[name], REAL if padded else torch.ones_like(REAL)
    layer = make.layer(case.config, dtype=torch.float64)
    x = (make.inputs(*SHAPE, dtype=torch.float64) + 1.5).requires_grad_()  # some experts are better for all tokens
    if hasattr(layer.router, "selection_bias"):
        layer.router.selection_bias.copy_(0.3 * randn(case.config.experts, seed=4))
    make.tell(layer, mask=real if padded else None, token_ids=IDS)
    torch.manual_seed(3)
    out = layer(x)
    expected, routed, left = by_loops(case, layer, x, real)
    close(out[real], expected.view(out.shape)[real], "output")
    loss = weighted_sum(layer.losses(), case.config)
    close(torch.zeros(()) if loss is None else loss, torch.as_tensor(routed.loss), "loss")
    kept = randn(*x.shape, seed=9, dtype=torch.float64) * real.unsqueeze(-1)  # padding is in no script's loss
    found = gradients((out * kept).sum(), layer, x)
    for each, gradient in gradients((expected.view(x.shape) * kept).sum() + routed.loss, layer, x).items():
        close(found[each], gradient, each)
    stats, tokens = moeify.routing_stats(layer)[""], [t for t in range(21) if real.flatten()[t]]
    counts = [sum(i == e for t in tokens for i, _ in routed.choices[t]) for e in range(case.config.experts)]
    assert stats.load == pytest.approx([count / sum(counts) for count in counts])
    assert stats.dropped == sum(len(routed.choices[t]) - len(left[t]) for t in tokens)
    assert (stats.dropped > 0) == (case.capacity is not None)  # else nothing is seen of the order


@pytest.mark.parametrize("padded", [False, True])
def test_a_soft_layer_is_what_its_paper_says(padded: bool) -> None:
    layer = make.layer(make.CONFIGS["soft"], dtype=torch.float64)
    real = REAL if padded else torch.ones_like(REAL)
    x = make.inputs(*SHAPE, dtype=torch.float64).requires_grad_()
    make.tell(layer, mask=real if padded else None)
    out, router, experts = layer(x), layer.router, layer.experts
    weights = router.slots, router.scale, experts.gate_up_proj, experts.down_proj
    expected = torch.cat([papers.soft_moe(x[b][real[b]], *weights) for b in range(SHAPE[0]) if real[b].any()])
    close(out[real], expected, "output")
    kept = randn(*x.shape, seed=9, dtype=torch.float64)[real]
    found = gradients((out[real] * kept).sum(), layer, x)
    for each, gradient in gradients((expected * kept).sum(), layer, x).items():
        close(found[each], gradient, each)


def test_the_selection_bias_moves_as_the_paper_says() -> None:
    layer = make.layer(CASES["deepseek_v3"].config, dtype=torch.float64)
    layer.router.selection_bias.copy_(0.3 * randn(9, seed=4))
    before, chosen = layer.router.selection_bias.tolist(), []
    for seed in (1, 2):  # micro-batches of one step
        make.tell(layer, mask=REAL)
        layer(make.inputs(*SHAPE, seed=seed, dtype=torch.float64))
        chosen += layer.record.routing.expert_ids_TK[REAL.flatten()].tolist()
    moeify.update_selection_bias(layer)
    expected = torch.tensor(papers.moved_bias(before, chosen, 1e-3))
    assert len(set((expected - torch.tensor(before)).sign().tolist())) > 1
    torch.testing.assert_close(layer.router.selection_bias, expected)


def pooled(layers: list[Tensor], real: Tensor, k: int) -> Any:
    """transformers' `load_balancing_loss_func`: over the tokens of all layers together."""
    rows = [papers.softmax(row) for logits in layers for row in papers.numbers(logits[real])]
    loss = torch.zeros((), dtype=torch.float64)
    for e in range(len(rows[0])):
        share = sum(e in papers.best(row, k) for row in rows) / len(rows)
        loss = loss + share * sum(row[e] for row in rows) / len(rows)
    return len(rows[0]) * loss


def test_the_losses_of_layers_of_transformers_are_over_their_tokens_together() -> None:
    logits = [2 * randn(21, 7, seed=seed, dtype=torch.float64) for seed in (1, 2)]
    leaves, real = [each.requires_grad_() for each in logits], REAL.flatten()
    found = stock_losses([ForwardRecord(softmax_topk(each, 3), real, 3) for each in leaves])["balance"]
    expected = pooled(leaves, real, 3)
    close(found, expected, "loss")
    for one, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        close(one, other, "gradient")


def test_the_global_level_shares_counts_among_micro_batches() -> None:
    """2501.11873, eq. 5: f of all micro-batches, P of each; their mean is the loss of the whole."""
    logits = [2 * randn(21, 7, seed=seed, dtype=torch.float64).requires_grad_() for seed in (1, 2)]
    parts, tokens = [softmax_topk(each, 3) for each in logits], REAL.flatten().nonzero().flatten().tolist()
    p = [[papers.softmax(row) for row in papers.numbers(each)] for each in logits]
    chosen = [papers.best(part[t], 3) for part in p for t in tokens]
    f = [sum(e in row for row in chosen) / len(chosen) for e in range(7)]
    counts = torch.tensor([sum(e in row for row in chosen) for e in range(7)])
    for each, part, rows in zip(logits, parts, p, strict=True):
        found = load_balancing_loss(
            part.scores_TE, part.expert_ids_TK, divide_by_top_k=False, mask_T=REAL.flatten(), counts_E=counts
        )
        expected = 7 * sum(f[e] * sum(rows[t][e] for t in tokens) / len(tokens) for e in range(7))
        close(found, expected, "loss")
        close(torch.autograd.grad(found, each)[0], torch.autograd.grad(expected, each)[0], "gradient")
