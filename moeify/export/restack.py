"""Switch Transformers, whose experts are modules of their own that a loop over data calls: what is traced instead.

Shape legend: T tokens, E experts, H hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moeify.hub.stock_experts import stock_experts


def traceable(model: nn.Module) -> nn.Module:
    """Return a model that torch.export can trace and that computes the same; the model itself, where nothing hinders.

    Args:
        model: Any; it stays as it is.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "switch_transformers":
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        experts, router = getattr(module, "experts", None), getattr(module, "router", None)
        if isinstance(experts, nn.ModuleDict) and router is not None:
            untyped: Any = module
            untyped.experts = _Stacked(experts)
            untyped.router.classifier = _settled(router.classifier, router.dtype)
    return model


class _Stacked(nn.Module):
    """The experts of one layer with their weights in one tensor, described as transformers describes its own."""

    has_gate = has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self, experts: nn.ModuleDict) -> None:
        super().__init__()
        each: list[Any] = list(experts.values())
        self.up_proj = nn.Parameter(torch.stack([expert.wi.weight.detach() for expert in each]))
        self.down_proj = nn.Parameter(torch.stack([expert.wo.weight.detach() for expert in each]))
        self.act_fn = each[0].act

    def forward(self, x_TH: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
        """Compute the expert that each token chose; a token that came too late has none."""
        experts = chosen_T1E.shape[-1]
        ids_T1 = torch.where(chosen_T1E.amax(-1) > 0, chosen_T1E.argmax(-1), experts)
        return stock_experts(self, x_TH, ids_T1, weights_T1)


class _Settled(nn.Linear):
    """A projection in its final dtype: the router casts it in every forward, which torch.export cannot carry."""

    def to(self, *_: Any, **__: Any) -> Any:
        return self


def _settled(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    linear = linear.to(dtype)
    linear.__class__ = _Settled
    return linear
