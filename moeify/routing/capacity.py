"""Expert capacity: how many tokens an expert may take, and which choices it drops, without a wait for the device.

A dropped choice gets id E, which the expert computation skips: the token keeps what the residual stream carries.
Memory is linear in the T*K choices; nothing of size T*E*C is made.

Shape suffixes: T tokens, E experts, K choices per token, N = K*T choices (all first ones, then all second ones, ...).
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moeify.config.settings import DropOrder
from moeify.errors import ConfigError


def exact_factor(factor: float | Fraction) -> Fraction:
    """Return the number that a capacity factor's decimal digits say: 1.1 is 11/10.

    Raises:
        ConfigError: The factor is not a positive finite number.
    """
    if not 0 < factor < float("inf"):
        raise ConfigError(f"the capacity factor is {factor}: give a positive number, or None for no limit")
    return Fraction(str(factor))


def expert_capacity(tokens: int, experts: int, top_k: int, factor: float | Fraction, *, minimum: int = 1) -> int:
    """Return min(tokens, max(minimum, ceil(tokens * top_k / experts * factor))), as DeepSpeed computes it.

    GShard and mesh-tensorflow leave out top_k: for the same capacity their factor for top-2 is twice this one. The
    ceiling is taken of the exact decimal number: 100 tokens on one expert with factor 1.1 are 110 and not 111. With at
    least one token the capacity is at least 1; more than `tokens` would change nothing, since a token picks an expert
    at most once.

    Args:
        tokens: T, padding included if it is routed.
        experts: E.
        top_k: K.
        factor: 1.0 is just enough for a perfectly balanced routing.
        minimum: Of few tokens, as in decoding, this many reach an expert whatever the factor.

    Returns:
        Tokens per expert.

    Raises:
        ConfigError: The factor is not a positive finite number.
    """
    # torch.compile cannot turn a float into text: compiled code passes the fraction.
    exact = factor if isinstance(factor, Fraction) else exact_factor(factor)
    # Integer arithmetic, so that a symbolic number of tokens goes through; nothing negative is divided, because an
    # exported graph rounds that towards zero.
    divisor = experts * exact.denominator
    return min(tokens, max(minimum, (tokens * top_k * exact.numerator + divisor - 1) // divisor))


def drop_overflow(
    expert_ids_TK: Tensor, scores_TE: Tensor, capacity: int, *, order: DropOrder = "position"
) -> tuple[Tensor, Tensor]:
    """Keep at most `capacity` choices of each expert.

    Which choices are kept first, by `order`:
    - position: first choices before second ones, then earlier tokens (GShard, Switch);
    - probability: the highest score for that expert (DeepSpeed; Megatron with its softmax before the selection, while
      its default orders by the weights that sum to 1);
    - random: any choice, all equally likely (DeepSpeed's random token selection);
    - batch_prioritized: first choices before second ones, then the tokens with the highest score for any expert
      (V-MoE, Riquelme et al. 2021). Like probability, it lets later tokens push out earlier ones: in a causal decoder
      that leaks the future.
    Equal priorities are kept by position. Padding takes capacity unless its ids are E already.

    Args:
        expert_ids_TK: (T, K) int64 in [0, E]; E is no choice and stays.
        scores_TE: (T, E) probabilities; only two of the orders read its values.
        capacity: Choices per expert.
        order: As above.

    Returns:
        (T, K) int64 ids with E for dropped choices, and the number of dropped choices, () int64.
    """
    tokens, top_k = expert_ids_TK.shape
    experts = scores_TE.shape[-1]
    ids_N = expert_ids_TK.t().reshape(-1)
    queue_N = _queue(expert_ids_TK, scores_TE, order)
    # Stable: within an expert the order of the queue survives, and a choice's rank is its distance from the first.
    sorted_ids_N, by_expert_N = ids_N[queue_N].sort(stable=True)
    first_E = torch.searchsorted(sorted_ids_N, torch.arange(experts + 1, device=ids_N.device))
    rank_N = torch.arange(ids_N.shape[0], device=ids_N.device) - first_E[sorted_ids_N]
    kept_ids_N = sorted_ids_N.masked_fill(rank_N >= capacity, experts)
    new_ids_N = torch.empty_like(ids_N).scatter(0, queue_N[by_expert_N], kept_ids_N)
    return new_ids_N.reshape(top_k, tokens).t().contiguous(), (new_ids_N != ids_N).sum()


def _queue(expert_ids_TK: Tensor, scores_TE: Tensor, order: DropOrder) -> Tensor:
    """Return the indices of the choices in the order in which they are kept."""
    (tokens, top_k), device = expert_ids_TK.shape, expert_ids_TK.device
    match order:
        case "position":
            return torch.arange(top_k * tokens, device=device)
        case "probability":
            # What is no choice (id E) may read any score: it is never kept.
            scores_TK = scores_TE.gather(-1, expert_ids_TK.clamp(max=scores_TE.shape[-1] - 1))
            return scores_TK.t().reshape(-1).argsort(descending=True, stable=True)
        case "random":
            return torch.rand(top_k * tokens, device=device).argsort()
        case "batch_prioritized":
            tokens_T = scores_TE.amax(-1).argsort(descending=True, stable=True)
            return (torch.arange(top_k, device=device).unsqueeze(-1) * tokens + tokens_T).reshape(-1)
    raise ConfigError(f"unknown drop order {order!r}: position, probability, random or batch_prioritized")
