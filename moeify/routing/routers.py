"""Routers: which experts a token goes to, and with what weight. Pure functions on tensors.

Here a token's choice depends on that token alone; `moeify.routing.joint` has the routers that look at all tokens.

Nothing is kept between calls, and no function waits for the device. Logits, scores and weights are float32 whatever
the model computes in, also under autocast; float64 stays float64, so that gradients can be checked.

Ties go where `torch.topk` puts them, always to k different experts. A NaN logit gives NaN weights: naming the layer
that made it is the caller's affair, because looking would wait for the device. A `generator` is a `torch.Generator` on
the logits' device, and None is torch's default one.

Shape suffixes: T tokens, H hidden width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import ConfigError
from moeify.seeding import generator, normal


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, an expert in [0, E), or E for a place that is not used (dropped, not chosen): the expert
            computation skips it.
        weights_TK: What multiplies each expert's output.
        logits_TE: What the router's projection gave (noisy top-k: with the noise added). For the z-loss.
        scores_TE: What balancing losses take as the probability of each expert, and capacity as its priority.
        clean_logits_TE: Noisy top-k only: the logits before the noise.
        noise_std_TE: Noisy top-k only: the standard deviation of the noise on each logit.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    clean_logits_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None


def router_init(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Initial router weights that break ties at any width: entries N(0, 1/H).

    Their standard deviation is 1/sqrt(H), so inputs of unit root mean square (what an RMSNorm or LayerNorm gives) make
    logits of standard deviation 1: with 8 experts the first choice has probability 0.36 on average.

    The values depend on seed and name alone, not on what was drawn before or on the default device.

    Args:
        shape: (E, H).
        seed: Any integer.
        name: The parameter's full name in the model.

    Returns:
        float32 (E, H), on the CPU.
    """
    init_EH: Tensor = normal(shape, seed, name) / math.sqrt(shape[-1])
    return init_EH.float()


def router_logits(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The router's projection in float32, also under autocast (Switch Transformer's selective precision).

    Args:
        x_TH: (..., H), any float dtype.
        weight_EH: (E, H), any float dtype.
        bias_E: (E,) or None.

    Returns:
        (..., E) float32; float64 if x_TH and weight_EH are.
    """
    x_TH, weight_EH = at_least_fp32(x_TH), at_least_fp32(weight_EH)
    bias_E = None if bias_E is None else at_least_fp32(bias_E)
    device = x_TH.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x_TH, weight_EH, bias_E)
    return F.linear(x_TH, weight_EH, bias_E)


def softmax_topk(logits_TE: Tensor, top_k: int, *, renormalize: bool = True) -> Routing:
    """The k most probable experts (Shazeer et al. 2017 without noise; Mixtral; Qwen-MoE; OLMoE).

    Softmax before the selection and renormalisation after it is the same function as softmax over the selected logits
    (Mixtral, Megatron's post-softmax), so one switch covers both orders.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, 1 to E.
        renormalize: Weights are the softmax over the chosen logits and sum to 1. If False, they are the probabilities
            among all E and sum to less. With top_k=1 renormalised weights are all 1 and give the router no gradient.

    Returns:
        Routing; scores are the softmax over all E.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    check_top_k(top_k, logits_TE.shape[-1])
    logits_TE = at_least_fp32(logits_TE)
    scores_TE = torch.softmax(logits_TE, dim=-1)
    chosen_TK, ids_TK = logits_TE.topk(top_k, dim=-1)
    weights_TK = torch.softmax(chosen_TK, dim=-1) if renormalize else scores_TE.gather(-1, ids_TK)
    return Routing(ids_TK, weights_TK, logits_TE, scores_TE)


def jitter_inputs(x_TH: Tensor, eps: float = 1e-2, *, generator: torch.Generator | None = None) -> Tensor:
    """Multiplies the router's input by U[1-eps, 1+eps] in training (Switch Transformer, Fedus et al. 2021).

    Takes (..., H) of any float dtype; returns float32, for bfloat16 has no room for a jitter of 1e-2.
    """
    x_TH = at_least_fp32(x_TH)
    noise_TH = torch.empty_like(x_TH).uniform_(generator=generator)
    return x_TH * (1 - eps + 2 * eps * noise_TH)


def switch(
    x_TH: Tensor, weight_EH: Tensor, *, jitter: float = 0.0, generator: torch.Generator | None = None
) -> Routing:
    """Top-1 with input jitter, weighted by the expert's probability among all E (Fedus et al. 2021).

    Args:
        x_TH: (T, H), any float dtype.
        weight_EH: (E, H), any float dtype.
        jitter: The paper trains with 1e-2 and evaluates with 0.
        generator: Source of the jitter.

    Returns:
        Routing with K = 1.
    """
    if jitter:
        x_TH = jitter_inputs(x_TH, jitter, generator=generator)
    return softmax_topk(router_logits(x_TH, weight_EH), 1, renormalize=False)


def gshard(logits_TE: Tensor, *, generator: torch.Generator | None = None) -> Routing:
    """Top-2 with a random second expert (GShard, Lepikhin et al. 2020, Algorithm 1).

    With g1 + g2 = 1 the renormalised probabilities, the second expert is kept with probability min(1, 2*g2); g1 stays
    as it is when the second is dropped. The paper's balancing loss counts first choices: `expert_ids_TK[:, :1]`.
    Without randomness (evaluation) this is `softmax_topk(logits_TE, 2)`.

    Takes (T, E) logits, E at least 2 (else ConfigError). Returns K = 2; a second expert not kept has id E and weight 0.
    """
    routing = softmax_topk(logits_TE, 2)
    second_T = routing.weights_TK[:, 1]
    draw_T = torch.empty_like(second_T).uniform_(generator=generator)
    kept_TK = torch.stack((torch.ones_like(draw_T, dtype=torch.bool), draw_T < 2 * second_T), dim=-1)
    return replace(
        routing,
        expert_ids_TK=routing.expert_ids_TK.masked_fill(~kept_TK, logits_TE.shape[-1]),
        weights_TK=routing.weights_TK.masked_fill(~kept_TK, 0),
    )


def noisy_topk(
    clean_logits_TE: Tensor, raw_noise_TE: Tensor | None, top_k: int, *, generator: torch.Generator | None = None
) -> Routing:
    """Top-k of logits with learned noise, softmax after the selection (Shazeer et al. 2017, equations 3-5).

    The paper starts both projections at zero, so that the noise (standard deviation log 2) balances the first steps.

    Args:
        clean_logits_TE: (T, E), x @ W_g, any float dtype.
        raw_noise_TE: (T, E), x @ W_noise; the noise has standard deviation softplus of it. None: no noise (evaluation).
        top_k: Experts per token, 1 to E.
        generator: Source of the noise.

    Returns:
        Routing; scores are the gates G(x), zero outside the chosen experts, as the importance loss takes them.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    clean_logits_TE = noisy_TE = at_least_fp32(clean_logits_TE)
    noise_std_TE = None
    if raw_noise_TE is not None:
        noise_std_TE = F.softplus(at_least_fp32(raw_noise_TE))
        draws_TE = torch.empty_like(noisy_TE).normal_(generator=generator)
        noisy_TE = clean_logits_TE + draws_TE * noise_std_TE
    routing = softmax_topk(noisy_TE, top_k)
    gates_TE = torch.zeros_like(noisy_TE).scatter(-1, routing.expert_ids_TK, routing.weights_TK)
    return replace(routing, scores_TE=gates_TE, clean_logits_TE=clean_logits_TE, noise_std_TE=noise_std_TE)


def sigmoid_grouped(
    logits_TE: Tensor,
    top_k: int,
    *,
    bias_E: Tensor | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Sigmoid scores, selection limited to the best groups and shifted by a bias (DeepSeek-V3, 2412.19437, eq. 12-16).

    A group counts as much as the sum of its two highest biased scores. The bias moves the selection only: weights are
    the plain scores of the chosen experts, divided by their sum + 1e-20 (if `renormalize`), times `scale`.
    DeepSeek-V3 itself: 256 experts, top 8, 4 of 8 groups, scale 2.5, and `updated_bias` after each step.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, at most those in the groups kept.
        bias_E: (E,) float32 or None.
        groups: Number of groups of E/groups experts in a row.
        groups_kept: Groups that a token may use.
        renormalize: Weights sum to `scale`.
        scale: The paper's routed scaling factor.

    Returns:
        Routing; scores are the plain sigmoids divided by their sum over all E, as the sequence loss takes them.

    Raises:
        ConfigError: E does not divide into the groups, or top_k experts do not fit into the groups kept.
    """
    experts = logits_TE.shape[-1]
    if groups < 1 or experts % groups or not 1 <= groups_kept <= groups:
        raise ConfigError(f"groups is {groups}, groups_kept {groups_kept}: need kept <= groups, a divisor of {experts}")
    check_top_k(top_k, groups_kept * (experts // groups))
    logits_TE = at_least_fp32(logits_TE)
    sigmoids_TE = torch.sigmoid(logits_TE)
    chooser_TE = sigmoids_TE if bias_E is None else sigmoids_TE + bias_E
    if groups_kept < groups:
        grouped = chooser_TE.reshape(chooser_TE.shape[0], groups, experts // groups)
        group_scores = grouped.topk(min(2, experts // groups), dim=-1).values.sum(-1)
        best = group_scores.topk(groups_kept, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        chooser_TE = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)
    ids_TK = chooser_TE.topk(top_k, dim=-1).indices
    weights_TK = sigmoids_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    scores_TE = sigmoids_TE / (sigmoids_TE.sum(-1, keepdim=True) + 1e-20)
    return Routing(ids_TK, weights_TK * scale, logits_TE, scores_TE)


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float = 1e-3) -> Tensor:
    """The next selection bias, which balances without a loss (DeepSeek-V3): up for idle experts, down for busy ones.

    Call it once per optimizer step, with the counts of every micro-batch and data-parallel rank in that step summed
    (`moeify.routing.losses.expert_counts`).

    Args:
        bias_E: (E,) float32.
        counts_E: (E,) tokens that chose each expert.
        rate: The paper uses 1e-3 for 14.3T tokens, then 0.

    Returns:
        bias + rate * sign(mean(counts) - counts), outside autograd.
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E.detach() + rate * torch.sign(counts_E.mean() - counts_E)


def hash_table(vocabulary: int, experts: int, seed: int, name: str) -> Tensor:
    """Token id to expert, random, as many ids for each (Hash Layers, Roller et al. 2021): (V,) int64, on the CPU."""
    order_V = torch.randperm(vocabulary, generator=generator(seed, name), device="cpu")
    return order_V % experts


def hash_tokens(token_ids_T: Tensor, table_V: Tensor, experts: int) -> Routing:
    """Routes by token id through a fixed table, with weight 1 (Hash Layers, Roller et al. 2021).

    Takes (T,) integers in [0, V) and a (V,) int64 table. Returns a Routing with K = 1 whose logits are zero and scores
    one-hot, for nothing is learned.
    """
    ids_TK = table_V[token_ids_T].unsqueeze(-1)
    logits_TE = torch.zeros(ids_TK.shape[0], experts, dtype=torch.float32, device=ids_TK.device)
    scores_TE = logits_TE.scatter(-1, ids_TK, 1.0)
    return Routing(ids_TK, torch.ones_like(ids_TK, dtype=torch.float32), logits_TE, scores_TE)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is float64."""
    # Not a bare .float(): torch.export would record the no-op and pin the dtype that it saw.
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def check_top_k(top_k: int, experts: int) -> None:
    """Raises ConfigError unless top_k is in 1..experts."""
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k is {top_k}, but there are {experts} experts: choose a number from 1 to {experts}")
