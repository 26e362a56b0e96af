"""Sparse upcycling: every expert is a copy of the dense FFN (Komatsuzaki et al. 2022, arXiv:2212.05055).

With weights that sum to 1 the layer computes Σ_k w_k·FFN(x) = FFN(x), whatever the router: exact at step 0.
"""

from __future__ import annotations

from torch import Tensor

from moeify.methods import DenseFFN, ExpertWeights


def copy_experts(dense: DenseFFN, experts: int) -> ExpertWeights:
    """Return `experts` copies of an FFN, each with memory of its own."""

    def copies(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else stack_copies(tensor, experts)

    return ExpertWeights(
        up_EJH=stack_copies(dense.up_JH, experts),
        down_EHI=stack_copies(dense.down_HI, experts),
        up_bias_EJ=copies(dense.up_bias_J),
        down_bias_EH=copies(dense.down_bias_H),
    )


def stack_copies(tensor: Tensor, experts: int) -> Tensor:
    """Repeat a tensor along a new first dimension: (…) → (E, …)."""
    return tensor.unsqueeze(0).repeat(experts, *[1] * tensor.dim())
