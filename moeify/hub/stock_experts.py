"""The experts of transformers' own MoE models, computed by `moeify::experts`.

transformers looks up by name how its experts are computed, and gives the function the module with its stacked weights.
Shape legend: T tokens, H hidden, K experts per token, S = T·K rows in the experts' order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe

from moeify.kernels import ops
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.layout import routing_layout

NAME = "moeify"


def stock_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute what transformers' other experts functions compute, with their signature.

    Args:
        self: The module that holds the stacked weights.
        hidden_states: (T, H).
        top_k_index: (T, K) int64; an id past the last expert counts nothing.
        top_k_weights: (T, K).
    """
    up, down, up_bias, down_bias = stacked_weights(self)
    name = _activation_name(self)
    if name is not None:
        return ops.experts(
            hidden_states, top_k_index, top_k_weights, up, down, up_bias, down_bias,
            activation=name, gated=self.has_gate,
        )  # fmt: skip
    layout = routing_layout(top_k_index, up.shape[0])
    z = ops.grouped_linear(ops.dispatch(hidden_states, layout), up, up_bias, layout.offsets_E1)
    activated = self._apply_gate(z) if self.has_gate else self.act_fn(z)
    y_SH = ops.grouped_linear(activated, down, down_bias, layout.offsets_E1)
    if self.has_post_expert_norm:
        y_SH = self.post_expert_norm(y_SH)
    return ops.combine(y_SH, top_k_weights, layout).to(hidden_states.dtype)


def offer_stock_experts() -> None:
    """Add `stock_experts` to the implementations that transformers knows by name."""
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(NAME, stock_experts)


@contextmanager
def through_moeify(model: nn.Module, name: str = NAME) -> Iterator[None]:
    """Let a transformers model compute its experts so inside the block; others stay as they are.

    Args:
        model: Any.
        name: Of the implementation, as transformers knows it; `stock_experts` unless another was added.
    """
    untyped: Any = model
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    offer_stock_experts()
    before = untyped.get_experts_implementation()
    untyped.set_experts_implementation(name)
    try:
        yield
    finally:
        untyped.set_experts_implementation(before)


def stacked_weights(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the weights as the kernels take them: (E, J, H) and (E, H, I), and the biases (E, J) and (E, H)."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not module.has_bias:
        return up, down, None, None
    return up, down, getattr(module, f"{name}_bias"), module.down_proj_bias


def _activation_name(module: Any) -> str | None:
    """The kernels' name for what stands between the products; None if they have none."""
    plain_gate = getattr(type(module), "_apply_gate", None) is moe._default_apply_gate and module.is_concatenated
    if module.has_post_expert_norm or (module.has_gate and not plain_gate):
        return None
    with _disable_current_modes():  # real numbers, also while the model is traced with fake ones
        points = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
        try:
            values = module.act_fn(points)
        except (RuntimeError, AttributeError):
            return None  # not a function of one tensor on the CPU
        for name, known in ACTIVATIONS.items():
            if torch.allclose(values, known.forward(points), rtol=1e-9, atol=1e-12):
                return name
    return None
