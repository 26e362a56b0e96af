"""The experts of transformers' own MoE models, computed by `moeify::experts`.

transformers looks up by name how its experts are computed, and calls that function with the module that holds the
stacked weights. Shape legend: T tokens, H hidden size, K choices per token, E experts, I intermediate size, J rows of
the up projection (2I with a gate).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

from moeify.kernels import ops
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.quantized import Quantized
from moeify.layers.experts import unfused
from moeify.layers.implementations import OURS, is_quantized
from moeify.measure import probe, recognize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stock_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what transformers' other experts functions compute, with their signature.

    Args:
        self: The module that holds the stacked weights, as `use_experts_implementation` describes it.
        hidden_states: (T, H).
        top_k_index: (T, K) int64; an id past the last expert counts nothing.
        top_k_weights: (T, K).
    """
    if is_quantized(self.down_proj):
        return _own_forward(self)(self, hidden_states, top_k_index, top_k_weights)
    stacks = stacked_weights(self)
    name = activation_name(self)
    if name is not None:
        return ops.experts(
            hidden_states, top_k_index, top_k_weights, *stacks,
            activation=name, gated=self.has_gate,
        )  # fmt: skip
    between = self._apply_gate if self.has_gate else self.act_fn
    norm = self.post_expert_norm if _has_norm(self) else None
    return unfused(hidden_states, top_k_index, top_k_weights, stacks, between, norm)


def offer_stock_experts() -> None:
    """Add `stock_experts` to the implementations that transformers knows by name."""
    if OURS not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(OURS, stock_experts)
        ALL_FP8_EXPERTS_FUNCTIONS.register(OURS, _fp8_experts)


def _fp8_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts that transformers has quantized to FP8, or leave them to its default where ours cannot."""
    asked = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    if not asked and (found := _as_quantized(self)) is not None:
        name, up, down = found
        return ops.quantized_experts(
            hidden_states, top_k_index, top_k_weights, up, down, activation=name, gated=self.has_gate
        )
    none_TK = (top_k_index < 0) | (top_k_index >= self.num_experts)  # it reads the weights of every id
    ids_TK, weights_TK = top_k_index.masked_fill(none_TK, 0), top_k_weights.masked_fill(none_TK, 0)
    out_TH: Tensor = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, ids_TK, weights_TK)
    return out_TH


def _as_quantized(module: Any) -> tuple[str, Quantized, Quantized] | None:
    """Return the activation and the weights of transformers' `FP8Experts`, if they are what our kernels compute."""
    special = ("swiglu_alpha", "swiglu_limit", "limit", "gate_softcap", "up_softcap")
    if module.activation_scheme != "dynamic" or any(getattr(module, field, None) is not None for field in special):
        return None
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = (Quantized(getattr(module, n), getattr(module, f"{n}_scale_inv")) for n in (up_name, "down_proj"))
    plain = all(w.values.dtype == torch.float8_e4m3fn and 0 not in w.block for w in (up, down))
    name = _known_activation(module.act_fn)
    return (name, up, down) if plain and name is not None else None


def _own_forward(module: nn.Module) -> Callable[..., Tensor]:
    """Return the forward of a class of experts as it was before it asked for implementations: the loop of "eager"."""
    forward: Callable[..., Tensor] = inspect.unwrap(type(module).forward)
    return forward


@contextmanager
def through_moeify(model: nn.Module, name: str = OURS) -> Iterator[None]:
    """Let a transformers model compute its experts in another way inside the block; other models stay as they are.

    Args:
        model: Any model.
        name: Of the implementation, as transformers knows it; `stock_experts` unless another was added.
    """
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    offer_stock_experts()
    pretrained = cast("PreTrainedModel", model)
    before = pretrained.get_experts_implementation()
    pretrained.set_experts_implementation(name)
    try:
        yield
    finally:
        pretrained.set_experts_implementation(before)


def stacked_weights(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the weights as the kernels take them, (E, J, H) and (E, H, I), and the biases (E, J) and (E, H)."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not module.has_bias:
        return up, down, None, None
    return up, down, getattr(module, f"{name}_bias"), module.down_proj_bias


def _has_norm(module: object) -> bool:
    return getattr(module, "has_post_expert_norm", False)  # transformers 5.17 has no such field


def activation_name(module: Any) -> str | None:
    """Return the kernels' name for what stands between the projections, or None if they have none."""
    plain_gate = getattr(type(module), "_apply_gate", None) is moe._default_apply_gate and module.is_concatenated
    if _has_norm(module) or (module.has_gate and not plain_gate):
        return None
    return _known_activation(module.act_fn)


def _known_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    with _disable_current_modes():  # real numbers, also while the model is traced with fake ones
        points = probe(257)
        try:
            values = function(points)
        except (RuntimeError, AttributeError):
            return None  # not a function of one tensor on the CPU
        return recognize(values, {name: known.forward for name, known in ACTIVATIONS.items()}, points)
