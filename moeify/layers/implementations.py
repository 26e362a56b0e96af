"""Stacked experts computed by another implementation than ours: those that transformers knows by name.

Shape legend: T tokens, H hidden size, K choices per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moeify.errors import RefusedError, first_line

if TYPE_CHECKING:
    from moeify.layers.experts import Experts

    Forward = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]

OURS, LOOP = "moeify", "eager"
_OTHERS = f"call set_experts_implementation with {OURS!r} or {LOOP!r}, which compute all"


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is a tensor of a kind of its own (torchao's), which only plain operations take."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__name__ != "DTensor"


def chosen_by_config(ours: Forward) -> Forward:
    """Let the config of the model around choose what computes the experts, and `ours` do it where it chooses nothing.

    Tools know such a forward by its `__wrapped__`, which transformers' `use_experts_implementation` leaves too.
    """

    @wraps(ours)
    def forward(self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen: str = getattr(self.config, "_experts_implementation", None) or OURS
        if chosen.startswith(OURS):  # an export has a name of its own for ours
            if not is_quantized(self.down_proj):
                return ours(self, hidden_states, top_k_index, top_k_weights)
            chosen = LOOP
        return compute(self, chosen, hidden_states, top_k_index, top_k_weights)

    return forward


def compute(experts: Experts, name: str, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return what `Experts.forward` does.

    Args:
        experts: The stacked weights.
        name: "eager" is a loop over the experts; the others are in transformers' `ALL_EXPERTS_FUNCTIONS`.
        x_TH: (T, H).
        expert_ids_TK: (T, K) integers; an id outside [0, E) contributes zero.
        weights_TK: (T, K).

    Raises:
        RefusedError: There is no such implementation, or it takes the biases of one projection for those of both.
    """
    if name == LOOP:
        return _loop(experts, x_TH, expert_ids_TK, weights_TK)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # models of other libraries need none

    if name not in ALL_EXPERTS_FUNCTIONS:
        known = ", ".join(sorted({OURS, LOOP, *ALL_EXPERTS_FUNCTIONS.keys()}))
        raise RefusedError(f"{name!r} is no implementation of experts: choose one of {known}")
    if experts.has_one_bias:
        raise RefusedError(
            f"{name!r} cannot compute experts of which one projection has a bias and the other has none: {_OTHERS}"
        )
    none_TK = (expert_ids_TK < 0) | (expert_ids_TK >= experts.num_experts)  # they read the weights of every id
    ids_TK, weights_TK = expert_ids_TK.masked_fill(none_TK, 0), weights_TK.masked_fill(none_TK, 0)
    try:
        out_TH: Tensor = ALL_EXPERTS_FUNCTIONS[name](experts, x_TH, ids_TK, weights_TK)
    except (RuntimeError, ValueError, ImportError) as error:
        raise RefusedError(f"{name!r} cannot compute these experts ({first_line(error)}): {_OTHERS}") from error
    return out_TH


def _loop(experts: Experts, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    out_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, weights_TK.dtype))
    up_bias, down_bias = experts.up_bias, experts.down_proj_bias
    for expert in range(experts.num_experts):
        token, choice = (expert_ids_TK == expert).nonzero(as_tuple=True)
        z = F.linear(x_TH[token], experts.up[expert], None if up_bias is None else up_bias[expert])
        a = experts._apply_gate(z)
        y = F.linear(a, experts.down_proj[expert], None if down_bias is None else down_bias[expert])
        out_TH = out_TH.index_add(0, token, (y * weights_TK[token, choice, None]).to(out_TH.dtype))
    return out_TH.to(x_TH.dtype)
