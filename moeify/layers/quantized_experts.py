"""The experts with quantized weights, for inference: e4m3 or int4, computed by `moeify::quantized_experts`.

Shape legend: T tokens, H hidden size, I intermediate size, J rows of the up projections (2I with a gate), E experts,
K choices per token, N and K rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import RefusedError
from moeify.kernels import ops
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.quantized import Quantized, quantize

SCALE = "_scale"  # what follows the name of a weight in that of its scales


class QuantizedExperts(nn.Module):
    """The same experts with fewer bits: a module of transformers' experts interface without gradients.

    State: the names of the stacked weights hold the numbers of `moeify.kernels.quantized.Quantized`, the same with
    `_scale` their scales, both as buffers; biases are what they were.

    Args:
        stacked: A module of transformers' experts interface whose weights lie (E, J, H) and (E, H, I), gate rows first;
            it is left without any.
        form: "fp8" or "int4".
        activation: The kernels' name for what stands between its projections.

    Raises:
        ValueError: The format does not take these sizes.
    """

    is_transposed, is_concatenated, has_post_expert_norm = False, True, False

    def __init__(self, stacked: Any, form: str, activation: str) -> None:
        super().__init__()
        self.form, self.activation, self.act_fn = form, activation, ACTIVATIONS[activation].forward
        self.num_experts, self.has_gate, self.has_bias = stacked.num_experts, stacked.has_gate, stacked.has_bias
        self.hidden_dim, self.intermediate_dim = stacked.down_proj.shape[1:]
        self.up_name = "gate_up_proj" if stacked.has_gate else "up_proj"
        for name in (self.up_name, "down_proj"):
            weight = quantize(stacked._parameters.pop(name).detach(), form)
            self.register_buffer(name, weight.values)
            self.register_buffer(name + SCALE, weight.scales)
            self.register_parameter(f"{name}_bias", stacked._parameters.pop(f"{name}_bias", None))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ_k weight · expert(x).

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers; an id outside [0, E) contributes zero.
            top_k_weights: (T, K).
        """
        asked = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if not asked:
            return self._compute(hidden_states, top_k_index, top_k_weights)
        without: Any = _WithoutGradient
        out_TH: Tensor = without.apply(self._compute, hidden_states, top_k_index, top_k_weights)
        return out_TH

    @property
    def weights(self) -> tuple[Quantized, Quantized]:
        """The up and the down projections."""
        up, down = (Quantized(getattr(self, name), getattr(self, name + SCALE)) for name in (self.up_name, "down_proj"))
        return up, down

    def _compute(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dtype = x_TH.dtype
        up, down = self.weights
        biases = (getattr(self, f"{name}_bias") for name in (self.up_name, "down_proj"))
        with torch.no_grad():
            return ops.quantized_experts(
                x_TH, expert_ids_TK, weights_TK, up, down, *(b if b is None else b.to(dtype) for b in biases),
                activation=self.activation, gated=self.has_gate,
            )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        """Move to another device; a cast of the model is none of the numbers and their scales."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def extra_repr(self) -> str:
        """Describe the experts in `repr`."""
        form = f"{self.activation} {'GLU' if self.has_gate else 'MLP'} in {self.form}"
        return f"{self.num_experts} x {form} {self.hidden_dim} → {self.intermediate_dim} → {self.hidden_dim}"


class _WithoutGradient(torch.autograd.Function):
    """A function of which the forward pass alone is known, so that a script need not say that it wants no gradient."""

    @staticmethod
    def forward(_: Any, compute: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return compute(*args)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> None:
        raise RefusedError(
            "quantized experts have no gradient: train the model as it was before moeify.quantize_experts, then "
            "quantize it"
        )
