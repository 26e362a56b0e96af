"""Losses that keep experts in use and logits small, without their coefficients.

Each docstring states the value on a perfectly balanced routing (every expert gets the same share, with the same
probabilities) and on a collapsed one (every token goes to the same k experts, which share all the probability).
Padding is excluded by a mask, True for real tokens, and means are over real tokens; with none of them, and with no
tokens at all, every loss is 0 with zero gradients, whatever the padded rows hold.

Shape suffixes: T tokens, E experts, K choices per token, B sequences (of T/B tokens each, in a row).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.errors import ConfigError


def expert_counts(expert_ids_TK: Tensor, experts: int, *, mask_T: Tensor | None = None) -> Tensor:
    """Count how many tokens chose each expert.

    Args:
        expert_ids_TK: (T, K) int64; E is not counted.
        experts: E.
        mask_T: (T,) bool, False for padding.

    Returns:
        (E,) int64.
    """
    return _counts_per_sequence(expert_ids_TK, experts, mask_T, sequences=1)[0]


def load_balancing_loss(
    scores_TE: Tensor,
    expert_ids_TK: Tensor,
    *,
    divide_by_top_k: bool,
    mask_T: Tensor | None = None,
    sequences: int = 1,
    counts_E: Tensor | None = None,
) -> Tensor:
    """Return E * sum_e f_e P_e: f_e the share of tokens that chose e, P_e the mean score of e (Switch Transformer).

    There are two scales. With `divide_by_top_k` f is divided by K, as in MegaBlocks, Megatron and DeepSeek: **1**
    balanced, **E/K** collapsed. Without, f sums to K, as in flaxformer and transformers' Mixtral: **K** balanced, **E**
    collapsed. GShard counts first choices only: pass `expert_ids_TK[:, :1]`.

    Args:
        scores_TE: (T, E) probabilities. The gradient flows through these alone.
        expert_ids_TK: (T, K) int64; E counts as no choice.
        divide_by_top_k: The scale, as above.
        mask_T: (T,) bool, False for padding.
        sequences: B, which divides T: the mean of the losses of each sequence, without sequences of padding alone.
        counts_E: (E,) choices of all tokens of the step, other micro-batches and ranks included (`expert_counts`), used
            for f instead of their own counts. P stays local: averaging gradients over equal ranks is right then.

    Returns:
        () in the dtype of scores_TE.

    Raises:
        ConfigError: `sequences` does not divide T.
    """
    top_k = expert_ids_TK.shape[-1]
    tokens_B1, mean_BE = _mean_per_sequence(scores_TE, mask_T, sequences)
    if counts_E is None:
        counts_BE = _counts_per_sequence(expert_ids_TK, scores_TE.shape[-1], mask_T, sequences)
        share_BE = counts_BE.to(mean_BE.dtype) / (top_k * tokens_B1.clamp(min=1))
    else:
        share_BE = counts_E.to(mean_BE.dtype) / counts_E.sum().clamp(min=1)
    loss_B = scores_TE.shape[-1] * (share_BE * mean_BE).sum(-1)
    loss = loss_B.sum() / (tokens_B1 > 0).sum().clamp(min=1)
    return loss if divide_by_top_k else top_k * loss


def deepseek_sequence_loss(
    scores_TE: Tensor, top_k: int, *, mask_T: Tensor | None = None, sequences: int = 1
) -> Tensor:
    """Return DeepSeek-V3's loss within each sequence (2412.19437, eq. 17-20): **1** balanced, **E/K** collapsed.

    As in the paper, f counts the top-k of the plain scores, not the chosen experts, which depend on the selection bias
    and the group limit too. The paper's coefficient is 1e-4.

    Args:
        scores_TE: (T, E), each token's sigmoids divided by their sum (`sigmoid_grouped` returns them so).
        top_k: K.
        mask_T: (T,) bool, False for padding.
        sequences: B, which divides T.

    Returns:
        () in the dtype of scores_TE.
    """
    ids_TK = scores_TE.topk(top_k, dim=-1).indices
    return load_balancing_loss(scores_TE, ids_TK, divide_by_top_k=True, mask_T=mask_T, sequences=sequences)


def z_loss(logits_TE: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """Return mean_t logsumexp(logits_t)^2, which keeps logits small (ST-MoE, Zoph et al. 2022; coefficient 1e-3).

    All logits zero (balanced): **log(E)^2**. Collapsed with logits c for k experts, far above the rest:
    **(c + log k)^2**.

    Args:
        logits_TE: (T, E) float32.
        mask_T: (T,) bool, False for padding.

    Returns:
        () in the dtype of logits_TE.
    """
    logits_TE = _without_padding(logits_TE, mask_T)
    squares_T1 = torch.logsumexp(logits_TE, dim=-1, keepdim=True).square()
    return _mean_per_sequence(squares_T1, mask_T, sequences=1)[1].squeeze()


def importance_cv2(scores_TE: Tensor, *, mask_T: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation of each expert's summed gates (Shazeer et al. 2017, eq. 6-7).

    **0** balanced, **E/K - 1** collapsed; the paper's coefficient is 0.1. The variance is the population's (divided by
    E, as V-MoE and tensor2tensor do; Tutel divides by E - 1).

    Args:
        scores_TE: (T, E); the paper's are the gates, zero for experts not chosen (`noisy_topk` returns them so).
        mask_T: (T,) bool, False for padding.

    Returns:
        () in the dtype of scores_TE.
    """
    return _cv2(_without_padding(scores_TE, mask_T).sum(0))


def load_cv2(
    clean_logits_TE: Tensor,
    noisy_logits_TE: Tensor,
    noise_std_TE: Tensor,
    top_k: int,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Return the squared coefficient of variation of each expert's load, smooth (Shazeer et al. 2017, appendix A).

    The load of an expert is the sum over tokens of the probability that it is chosen if its own noise is drawn again:
    Phi((clean - threshold) / std), the threshold being the k-th of the *other* noisy logits. **0** balanced,
    **E/K - 1** collapsed by a margin of many standard deviations. Population variance. For k = E it is 0.

    Args:
        clean_logits_TE: (T, E), before the noise.
        noisy_logits_TE: (T, E), after it, those that were selected on.
        noise_std_TE: (T, E), positive.
        top_k: K.
        mask_T: (T,) bool, False for padding.

    Returns:
        () in the dtype of clean_logits_TE.
    """
    clean_logits_TE = _without_padding(clean_logits_TE, mask_T)
    if top_k == clean_logits_TE.shape[-1]:
        return clean_logits_TE.sum() * 0
    noisy_logits_TE = _without_padding(noisy_logits_TE, mask_T)
    noise_std_TE = _without_padding(noise_std_TE, mask_T, fill=1.0)
    best = noisy_logits_TE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, -2:-1], best[:, -1:]
    threshold_TE = torch.where(noisy_logits_TE > first_out, first_out, last_in)
    chance_TE = torch.special.ndtr((clean_logits_TE - threshold_TE) / noise_std_TE)
    return _cv2(_without_padding(chance_TE, mask_T).sum(0))


def _without_padding(rows: Tensor, mask_T: Tensor | None, fill: float = 0.0) -> Tensor:
    return rows if mask_T is None else rows.masked_fill(~mask_T.unsqueeze(-1), fill)


def _mean_per_sequence(rows: Tensor, mask_T: Tensor | None, sequences: int) -> tuple[Tensor, Tensor]:
    """Return the (B, 1) numbers of real tokens, and the (B, D) means over them of (T, D) rows."""
    length = rows.shape[0] // sequences
    if rows.shape[0] % sequences:
        raise ConfigError(
            f"{rows.shape[0]} tokens are not {sequences} sequences of equal length: pad them and pass a mask"
        )
    sums = _without_padding(rows, mask_T).reshape(sequences, length, rows.shape[-1]).sum(1)
    tokens_B1 = (
        sums.new_full((sequences, 1), length)
        if mask_T is None
        else mask_T.reshape(sequences, length).sum(1, keepdim=True)
    )
    return tokens_B1, sums / tokens_B1.clamp(min=1)


def _counts_per_sequence(expert_ids_TK: Tensor, experts: int, mask_T: Tensor | None, sequences: int) -> Tensor:
    ids_TK = _without_padding(expert_ids_TK, mask_T, fill=experts)
    ids = ids_TK.reshape(sequences, ids_TK.numel() // sequences)
    counts = torch.zeros(sequences, experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(1, ids, torch.ones_like(ids))[:, :experts]


def _cv2(totals_E: Tensor) -> Tensor:
    return totals_E.var(correction=0) / (totals_E.mean().square() + 1e-10)
