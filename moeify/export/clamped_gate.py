"""Gates with a clamp, as GPT-OSS and its kin have them, for the operators that know them.

    min(gate, limit) · sigmoid(alpha · min(gate, limit)) · (clamp(up, ±limit) + beta)

is `com.microsoft::MoE`'s SwiGLU. Which models have it is measured, not looked up: alpha, beta and limit follow from
three values of the gate, and a grid of others must agree.

Shape legend: T tokens, K choices per token, H hidden, J rows of the first weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe

from moeify.export.translate import DOMAIN, EXPERTS
from moeify.hub.stock_experts import stacked_weights, stock_experts

NAME = "moeify_export"
_FAR = 1e6  # beyond any clamp that means something


@dataclass(frozen=True)
class ClampedGate:
    """What stands between the products.

    Attributes:
        alpha: Scale inside the sigmoid.
        beta: What is added to the other factor.
        limit: Of the clamp, infinite without one.
        alternating: Whether the first weight's rows are gate 0, up 0, gate 1, …, and not all gates first.
    """

    alpha: float
    beta: float
    limit: float
    alternating: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute it."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def export_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts as `stock_experts` does; those with a clamped gate become one opaque node of the graph."""
    gate = clamped_gate(self)
    if gate is None:
        return stock_experts(self, hidden_states, top_k_index, top_k_weights)
    inputs = [hidden_states, top_k_index, top_k_weights, *(t for t in stacked_weights(self) if t is not None)]
    attributes: dict[str, Any] = {"activation": "silu", "gated": 1, **vars(gate)}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{EXPERTS}", inputs, attributes, dtype=hidden_states.dtype, shape=hidden_states.shape, version=1
    )


def offer_export_experts() -> None:
    """Add `export_experts` to the implementations that transformers knows by name."""
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(NAME, export_experts)


def gate_of(node: ir.Node) -> ClampedGate | None:
    """Return the clamped gate of an opaque node, None if its experts have another activation."""
    if "alpha" not in node.attributes:
        return None
    alpha, beta, limit = (node.attributes[name].as_float() for name in ("alpha", "beta", "limit"))
    return ClampedGate(alpha, beta, limit, bool(node.attributes["alternating"].as_int()))


def clamped_gate(module: Any) -> ClampedGate | None:
    """Measure the gate of an experts module of transformers.

    Args:
        module: As transformers describes it (`has_gate`, `is_concatenated`, …).
    """
    own = getattr(type(module), "_apply_gate", moe._default_apply_gate) is not moe._default_apply_gate
    if not (own and module.has_gate) or module.has_post_expert_norm:
        return None
    alternating = not module.is_concatenated

    def value(gate: Tensor, up: Tensor) -> Tensor:
        pair = torch.stack((gate, up), dim=-1).flatten(-2) if alternating else torch.cat((gate, up), dim=-1)
        y: Tensor = module._apply_gate(pair)
        return y

    with _disable_current_modes(), torch.no_grad():  # real numbers, also while the model is traced with fake ones
        try:
            return _measured(value, alternating)
        except (RuntimeError, AttributeError, ValueError, ZeroDivisionError):
            return None  # not a function of gate and up on the CPU


def _measured(value: Any, alternating: bool) -> ClampedGate | None:
    near = 1 / 16  # within any clamp
    ups = torch.tensor([[0.0], [near], [_FAR]], dtype=torch.float64)
    at_0, at_near, far = value(torch.full_like(ups, near), ups).flatten().tolist()
    factor = (at_near - at_0) / near  # near · sigmoid(alpha · near)
    beta, reach = at_0 / factor, (far - at_0) / factor
    alpha = math.log(factor / (near - factor)) / near
    found = ClampedGate(alpha, beta, math.inf if reach >= _FAR / 2 else reach, alternating)
    gate, up = torch.meshgrid(*(torch.linspace(-40, 40, 321, dtype=torch.float64),) * 2, indexing="ij")
    same = torch.allclose(value(gate, up), found(gate, up), rtol=1e-7, atol=1e-9)
    return found if same else None
