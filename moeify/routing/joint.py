"""Routers that look at all tokens at once: expert choice, sinkhorn, soft MoE.

What they do with a token depends on the other tokens, later ones too. They fit encoders and vision models; in a causal
decoder they leak the future in training and cannot be repeated one token at a time. For the same reason they take a
padding mask, which the routers of `moeify.routing.routers` do not need.

Shape suffixes: T tokens, H hidden width, E experts, K experts per token, C tokens per expert, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.routing.routers import Routing, at_least_fp32, check_top_k, router_logits


@dataclass(frozen=True)
class SoftRouting:
    """Soft MoE: every slot is a mixture of tokens, every token a mixture of slots; expert e owns S/E slots in a row.

    Attributes:
        dispatch_TS: Weights over tokens; slot inputs are dispatch_TS.T @ x_TH.
        combine_TS: Weights over slots; outputs are combine_TS @ slot_outputs_SH.
    """

    dispatch_TS: Tensor
    combine_TS: Tensor


def expert_choice(logits_TE: Tensor, capacity: int, *, mask_T: Tensor | None = None) -> Routing:
    """Each expert takes the `capacity` tokens that give it the highest probability (Zhou et al. 2022).

    A token may be taken by any number of experts. Balanced by construction, so it needs no balancing loss.

    Args:
        logits_TE: (T, E), any float dtype.
        capacity: Tokens per expert; the paper's is round(capacity_factor * T / E). More than T counts as T.
        mask_T: (T,) bool, False for padding, which no expert takes.

    Returns:
        Routing with K = E: place e of a token has id e if expert e took it, else E with weight 0. Weights are the
        softmax over the experts, not renormalised.
    """
    logits_TE = at_least_fp32(logits_TE)
    tokens, experts = logits_TE.shape
    scores_TE = torch.softmax(logits_TE, dim=-1)
    chooser_TE = scores_TE if mask_T is None else scores_TE.masked_fill(~mask_T.unsqueeze(-1), -1)
    taken_CE = chooser_TE.topk(min(capacity, tokens), dim=0).indices
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, taken_CE, True)
    if mask_T is not None:
        chosen_TE = chosen_TE & mask_T.unsqueeze(-1)
    ids_TE = torch.arange(experts, device=logits_TE.device).expand(tokens, experts).masked_fill(~chosen_TE, experts)
    return Routing(ids_TE, scores_TE.masked_fill(~chosen_TE, 0), logits_TE, scores_TE)


def sinkhorn(logits_TE: Tensor, top_k: int, *, iterations: int = 16, mask_T: Tensor | None = None) -> Routing:
    """Selects by a balanced transport plan, weighs by the plain router (S-BASE, Clark et al. 2022; Megatron).

    The plan is exp(logits) with rows and columns scaled to sums 1/T and 1/E. Weights are the sigmoid of the chosen
    logit if top_k is 1, else the softmax among all E. Evaluation uses `iterations=0`, the plain top-k. Use no
    balancing loss with it.

    The number of iterations is fixed because stopping on a tolerance waits for the device, and may never stop: with
    one popular expert the usual tolerance (1e-4 on the unscaled factors) took over 100 000. 16 reach the same choices
    for logits of standard deviation 3 with a bias of 6.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, 1 to E.
        iterations: Row and column scalings.
        mask_T: (T,) bool, False for padding, which then takes no share of the plan.

    Returns:
        Routing; scores are the softmax over all E.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    check_top_k(top_k, logits_TE.shape[-1])
    logits_TE = at_least_fp32(logits_TE)
    with torch.no_grad():
        column_E = logits_TE.new_zeros(logits_TE.shape[-1])
        for _ in range(iterations):
            plan_TE = logits_TE - torch.logsumexp(logits_TE + column_E, dim=-1, keepdim=True)
            if mask_T is not None:
                plan_TE = plan_TE.masked_fill(~mask_T.unsqueeze(-1), torch.finfo(plan_TE.dtype).min)
            column_E = -torch.logsumexp(plan_TE, dim=0)
        ids_TK = (logits_TE + column_E).topk(top_k, dim=-1).indices
    scores_TE = torch.softmax(logits_TE, dim=-1)
    gates_TE = torch.sigmoid(logits_TE) if top_k == 1 else scores_TE
    return Routing(ids_TK, gates_TE.gather(-1, ids_TK), logits_TE, scores_TE)


def soft_moe(x_TH: Tensor, slots_SH: Tensor, scale: Tensor, *, mask_T: Tensor | None = None) -> SoftRouting:
    """Soft MoE (Puigcerver et al. 2023, Algorithms 1 and 2): logits are scaled cosines of tokens and slots.

    Args:
        x_TH: (..., T, H), any float dtype; tokens mix within their own sequence only.
        slots_SH: (S, H), learned, S = experts * slots per expert; the paper's Phi, transposed.
        scale: (), learned, 1 at the start.
        mask_T: (..., T) bool, False for padding, which no slot reads and which reads no slot.

    Returns:
        SoftRouting with dispatch (softmax over tokens) and combine (softmax over slots), both (..., T, S) float32.
    """
    x_TH, slots_SH = at_least_fp32(x_TH), at_least_fp32(slots_SH)
    logits_TS = at_least_fp32(scale) * router_logits(_unit(x_TH), _unit(slots_SH))
    if mask_T is None:
        return SoftRouting(torch.softmax(logits_TS, dim=-2), torch.softmax(logits_TS, dim=-1))
    padding_TS = ~mask_T.unsqueeze(-1)
    masked_TS = logits_TS.masked_fill(padding_TS, torch.finfo(logits_TS.dtype).min)
    return SoftRouting(
        torch.softmax(masked_TS, dim=-2).masked_fill(padding_TS, 0),
        torch.softmax(logits_TS, dim=-1).masked_fill(padding_TS, 0),
    )


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, with the paper's guard: divided by their norm + 1e-6."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / (norms + 1e-6)
