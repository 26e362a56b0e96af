"""Routers as modules: each holds what its function in `moeify.routing` needs, and takes tokens and a context.

Shape legend: T tokens, H hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.routing import joint
from moeify.routing.capacity import exact_factor, expert_capacity
from moeify.routing.routers import (
    Routing,
    gshard,
    hash_tokens,
    jitter_inputs,
    noisy_topk,
    router_logits,
    sigmoid_grouped,
    softmax_topk,
    updated_bias,
)


@dataclass(frozen=True)
class Context:
    """What a router may look at besides the tokens.

    Attributes:
        mask_T: (T,) bool, False for padding; None when all tokens are real.
        token_ids_T: (T,) integers, the tokens' ids in the vocabulary, where the model was called with them.
        capacity_factor: The layer's limit; None for none.
    """

    mask_T: Tensor | None = None
    token_ids_T: Tensor | None = None
    capacity_factor: Fraction | None = None


class LinearRouter(nn.Module):
    """A router whose logits are a linear projection, in float32 whatever the model computes in.

    Args:
        hidden: H.
        config: The settings.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self, hidden: int, config: MoEConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.experts, hidden, device=device, dtype=dtype))

    def forward(self, x_TH: Tensor, context: Context = Context()) -> Routing:
        """Route tokens (T, H)."""
        if self.training and self.config.jitter:
            x_TH = jitter_inputs(x_TH, self.config.jitter)
        return self.route(x_TH, context)

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        raise NotImplementedError

    def logits(self, x_TH: Tensor) -> Tensor:
        """Project tokens (T, H) to (T, E)."""
        return router_logits(x_TH, self.weight)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        experts, hidden = self.weight.shape
        return f"{hidden} → {experts}, top-{self.config.top_k}"


class TopKRouter(LinearRouter):
    """Softmax, k experts per token: Mixtral, Switch, ST-MoE, MegaBlocks."""

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose the k most probable experts."""
        return softmax_topk(self.logits(x_TH), self.config.top_k, renormalize=self.config.renormalize)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        order = "softmax over the chosen" if self.config.renormalize else "softmax over all"
        return f"{super().extra_repr()}, {order}"


class GShardRouter(LinearRouter):
    """Top-2, the second at random in training (GShard)."""

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose two experts."""
        logits_TE = self.logits(x_TH)
        return gshard(logits_TE) if self.training else softmax_topk(logits_TE, 2)


class SinkhornRouter(LinearRouter):
    """Chosen by a balanced plan in training, by the logits in evaluation (S-BASE)."""

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose k experts."""
        iterations = 16 if self.training else 0
        return joint.sinkhorn(self.logits(x_TH), self.config.top_k, iterations=iterations, mask_T=context.mask_T)


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its most probable tokens (expert choice)."""

    def __init__(self, hidden: int, config: MoEConfig, **options: Any) -> None:
        super().__init__(hidden, config, **options)
        self.factor = exact_factor(config.capacity_factor or 1.0)

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Let every expert choose."""
        factor = self.factor if context.capacity_factor is None else context.capacity_factor
        capacity = expert_capacity(x_TH.shape[0], self.config.experts, self.config.top_k, factor)
        return joint.expert_choice(self.logits(x_TH), capacity, mask_T=context.mask_T)


class NoisyTopKRouter(LinearRouter):
    """Top-k of logits with learned noise in training (Shazeer et al. 2017)."""

    def __init__(self, hidden: int, config: MoEConfig, **options: Any) -> None:
        super().__init__(hidden, config, **options)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose the k best after the noise."""
        raw_noise_TE = router_logits(x_TH, self.noise_weight) if self.training else None
        return noisy_topk(self.logits(x_TH), raw_noise_TE, self.config.top_k)


class SigmoidRouter(LinearRouter):
    """Sigmoid scores, a limit on groups, and a selection bias that no gradient moves (DeepSeek-V3).

    The bias is a float32 buffer. The layer counts the choices of its training forwards, and
    `moeify.attach_bias_update` makes an optimizer move the bias by them after each step.
    """

    def __init__(self, hidden: int, config: MoEConfig, **options: Any) -> None:
        super().__init__(hidden, config, **options)
        self.selection_bias: Tensor
        self.register_buffer("selection_bias", torch.zeros(config.experts, device=self.weight.device))

    def route(self, x_TH: Tensor, context: Context) -> Routing:
        """Choose the k best after the bias."""
        config = self.config
        return sigmoid_grouped(
            self.logits(x_TH),
            config.top_k,
            bias_E=self.selection_bias,
            groups=config.groups,
            groups_kept=config.groups_kept,
            renormalize=config.renormalize,
            scale=config.routed_scale,
        )

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Move the bias by how many tokens chose each expert, (E,)."""
        self.selection_bias.copy_(updated_bias(self.selection_bias, counts_E, self.config.bias_rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.selection_bias = self.selection_bias.float()  # its steps of 1e-3 would be lost in bfloat16
        return self


class HashRouter(nn.Module):
    """By token id, through a fixed random table (Hash Layers)."""

    def __init__(self, hidden: int, config: MoEConfig, *, device: torch.device | None = None, **_: Any) -> None:
        super().__init__()
        self.config = config
        self.table: Tensor
        self.register_buffer("table", torch.zeros(config.vocabulary or 0, dtype=torch.int64, device=device))

    def forward(self, x_TH: Tensor, context: Context = Context()) -> Routing:
        """Look the tokens' experts up."""
        if context.token_ids_T is None:
            raise MoeifyError("hash routing needs the token ids: call the model with `input_ids`")
        return hash_tokens(context.token_ids_T, self.table, self.config.experts)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        return f"{self.table.shape[0]} token ids → {self.config.experts}"


ROUTERS: dict[str, type[LinearRouter] | type[HashRouter]] = {
    "softmax": TopKRouter,
    "gshard": GShardRouter,
    "noisy_topk": NoisyTopKRouter,
    "sigmoid": SigmoidRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
}
