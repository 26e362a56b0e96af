"""Soft: every slot is a mixture of tokens, every token a mixture of slots (Soft MoE, Puigcerver et al. 2023).

What it does with a token depends on the other tokens of the sequence, later ones too: it fits encoders and vision
models.

Shape suffixes: B sequences, L positions, T tokens, H hidden size, S slots (expert e owns S/E of them in a row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.config.checks import Count
from moeify.routers.base import Router, RouterModule, StartValue, Zeros, drawn
from moeify.routing.logits import at_least_fp32, router_logits


@dataclass(frozen=True)
class SoftRouting:
    """Both mixtures.

    Attributes:
        dispatch_TS: Weights over tokens; slot inputs are dispatch_TS.T @ x_TH.
        combine_TS: Weights over slots; outputs are combine_TS @ slot_outputs_SH.
    """

    dispatch_TS: Tensor
    combine_TS: Tensor


def soft_moe(x_TH: Tensor, slots_SH: Tensor, scale: Tensor, *, mask_T: Tensor | None = None) -> SoftRouting:
    """Mix by scaled cosines of tokens and slots (Soft MoE, Algorithms 1 and 2).

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
    """Return rows of length 1, with the paper's guard: divided by their norm + 1e-6."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / (norms + 1e-6)


class SoftRouter(RouterModule):
    """Module of `Soft`: the learned slots, and the scale of their logits."""

    def __init__(self, options: Soft, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(config)
        self.slots_per_expert = options.slots
        self.slots = nn.Parameter(zeros(config.experts * options.slots, hidden))
        self.scale = nn.Parameter(zeros(()) + 1)

    def forward(self, x_BLH: Tensor, mask_BL: Tensor | None) -> SoftRouting:
        """Return the weights of both mixtures for tokens (B, L, H)."""
        return soft_moe(x_BLH, self.slots, self.scale, mask_T=mask_BL)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        return f"{self.config.experts} x {self.slots_per_expert} slots of {self.slots.shape[1]}"


@dataclass(frozen=True)
class Soft(Router):
    """Slots that mix tokens.

    Attributes:
        slots: Slots of each expert.
    """

    builds = SoftRouter
    aux_loss = 0.0
    sums_to_one = False
    joint = True
    mixes_tokens = True
    has_logits = False

    slots: Count = 1

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the start values of the slots and of the scale, which is 1."""
        slots = drawn("slots", config, hidden, path, self.slots)
        return {"slots": slots, "scale": StartValue((), None, lambda: torch.ones(()))}
