"""Gates with a clamp, as GPT-OSS and its kin have them, for the operators that know them.

    min(gate, limit) · sigmoid(alpha · min(gate, limit)) · (clamp(up, ±limit) + beta)

is `com.microsoft::MoE`'s SwiGLU. Which models have it is measured, not looked up: alpha, beta and limit follow from
three values of the gate, and many others must agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations import moe

from moeify.contract.stock_experts import stacked_weights, stock_experts
from moeify.export.capture.interface import DOMAIN, EXPERTS
from moeify.measure import probe, same_values

NAME = "moeify_export"
_FAR = 1e6  # beyond any clamp that means something
_REACH = 40.0  # how far the gate is compared: limits of clamps are below
_POINTS = 321

Gate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClampedGate:
    """What stands between the up projections and the down projection.

    Attributes:
        alpha: Scale inside the sigmoid.
        beta: What is added to the other factor.
        limit: Of the clamp, infinite without one.
        alternating: Whether the rows of the up projections are gate 0, up 0, gate 1, …, and not all gates first.
    """

    alpha: float
    beta: float
    limit: float
    alternating: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute it."""
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def export_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute experts as `stock_experts` does; those with a clamped gate become one opaque node of the graph."""
    gate = clamped_gate(self)
    if gate is None:
        return stock_experts(self, hidden_states, top_k_index, top_k_weights)
    inputs = [hidden_states, top_k_index, top_k_weights, *(t for t in stacked_weights(self) if t is not None)]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{EXPERTS}",
        inputs,
        {"activation": "silu", "gated": 1, **asdict(gate)},
        dtype=hidden_states.dtype, shape=hidden_states.shape, version=1,
    )  # fmt: skip


def offer_export_experts() -> None:
    """Add `export_experts` to the implementations that transformers knows by name."""
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ALL_EXPERTS_FUNCTIONS.register(NAME, export_experts)


def clamped_gate(module: nn.Module) -> ClampedGate | None:
    """Measure the gate of an experts module of transformers; None if it is the plain one or has another formula."""
    apply = getattr(type(module), "_apply_gate", moe._default_apply_gate)
    if apply is moe._default_apply_gate or not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    alternating = not module.is_concatenated

    def gate_of(gate: Tensor, up: Tensor) -> Tensor:
        pairs = torch.stack((gate, up), dim=-1).flatten(-2) if alternating else torch.cat((gate, up), dim=-1)
        y: Tensor = apply(module, pairs)
        return y

    with _disable_current_modes(), torch.no_grad():  # real numbers, also while the model is traced with fake ones
        try:
            return _measured(gate_of, alternating)
        except (RuntimeError, AttributeError, ValueError, ZeroDivisionError):
            return None  # not a function of gate and up on the CPU


def _measured(gate_of: Gate, alternating: bool) -> ClampedGate | None:
    near = 1 / 16  # within any clamp
    ups = torch.tensor([[0.0], [near], [_FAR]], dtype=torch.float64)
    at_0, at_near, far = gate_of(torch.full_like(ups, near), ups).flatten().tolist()
    factor = (at_near - at_0) / near  # near · sigmoid(alpha · near)
    beta, reach = at_0 / factor, (far - at_0) / factor
    alpha = math.log(factor / (near - factor)) / near
    found = ClampedGate(alpha, beta, math.inf if reach >= _FAR / 2 else reach, alternating)
    gate, up = torch.meshgrid(probe(_POINTS, reach=_REACH), probe(_POINTS, seed=1, reach=_REACH), indexing="ij")
    return found if same_values(gate_of(gate, up), found(gate, up)) else None
