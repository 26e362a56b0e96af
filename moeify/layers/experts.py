"""The experts: E FFNs of one shape, in stacked parameters.

Shape legend: T tokens, H hidden size, I intermediate size, J rows of the up projections (2I with a gate), E experts,
K choices per token, S = T·K choices in the experts' order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.kernels import ops
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.layout import routing_layout
from moeify.layers.implementations import chosen_by_config


def unfused(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    stacks: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    between: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run experts with any torch code between the projections, and after them.

    Args:
        x_TH: (T, H).
        expert_ids_TK: (T, K) integers; an id outside [0, E) contributes zero.
        weights_TK: (T, K).
        stacks: Up projections (E, J, H), down projections (E, H, I), and the biases (E, J) and (E, H) or None.
        between: (S, J) to (S, I).
        after: (S, H) to (S, H), before the weights multiply; None for nothing.
    """
    up, down, up_bias, down_bias = stacks
    layout = routing_layout(expert_ids_TK, up.shape[0])
    z_SJ = ops.grouped_linear(ops.dispatch(x_TH, layout), up, up_bias, layout.offsets_E1)
    y_SH = ops.grouped_linear(between(z_SJ), down, down_bias, layout.offsets_E1)
    return ops.combine(y_SH if after is None else after(y_SH), weights_TK, layout).to(x_TH.dtype)


class Experts(nn.Module):
    """E FFNs of one shape, stacked as transformers holds them: a module of its `use_experts_implementation` kind.

    Parameters: `gate_up_proj` (E, 2I, H) with a gate, else `up_proj` (E, J, H); `down_proj` (E, H, I); and, where the
    dense FFN had biases, the same names with `_bias`.

    Args:
        hidden: H.
        intermediate: I.
        num_experts: E.
        activation: A name that the kernels know, or any name when `region` is given.
        gated: act(gate) * up.
        up_rows: J.
        up_bias: Whether the up projections have biases.
        down_bias: Whether the down projection has one.
        region: The captured computation between the projections, where the kernels do not know it by name.
        region_widths: Rows of each up projection that the region takes.
        dropout: Probability of dropping hidden values inside the experts, in training.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        config: The config of the transformers model around, whose `_experts_implementation` says what computes the
            experts; None outside such a model, where `moeify::experts` does.
    """

    is_transposed, is_concatenated, has_post_expert_norm = False, True, False
    _is_expert_parallel = False

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        num_experts: int,
        activation: str,
        gated: bool,
        up_rows: int,
        up_bias: bool = False,
        down_bias: bool = False,
        region: nn.Module | None = None,
        region_widths: tuple[int, ...] = (),
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = None
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, intermediate
        self.activation, self.has_gate, self.has_bias = activation, gated, up_bias or down_bias
        self.has_one_bias = up_bias != down_bias
        self.region, self.region_widths, self.dropout = region, region_widths, dropout

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_experts, *shape, device=device, dtype=dtype))

        self.up_name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self.up_name, parameter(up_rows, hidden))
        self.down_proj = parameter(hidden, intermediate)
        self.register_parameter(f"{self.up_name}_bias", parameter(up_rows) if up_bias else None)
        self.down_proj_bias = parameter(hidden) if down_bias else None

    @property
    def up(self) -> Tensor:
        """The up projections (E, J, H), whatever their name."""
        weight: Tensor = getattr(self, self.up_name)
        return weight

    @property
    def up_bias(self) -> Tensor | None:
        """Biases of the up projections (E, J), or None."""
        bias: Tensor | None = getattr(self, f"{self.up_name}_bias")
        return bias

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation: of the gate alone (…, I) where there is a plain one, else of all rows (…, J)."""
        plain = self.has_gate and self.region is None
        return ACTIVATIONS[self.activation].forward if plain else self._apply_gate

    @chosen_by_config
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ_k weight · expert(x).

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers; an id outside [0, E) contributes zero.
            top_k_weights: (T, K).

        Raises:
            RefusedError: The implementation that the model's config names cannot compute these experts.
        """
        if self.region is None and not (self.training and self.dropout):
            return ops.experts(
                hidden_states,
                top_k_index,
                top_k_weights,
                self.up,
                self.down_proj,
                self.up_bias,
                self.down_proj_bias,
                activation=self.activation,
                gated=self.has_gate,
            )
        weights = (self.up, self.down_proj, self.up_bias, self.down_proj_bias)
        return unfused(hidden_states, top_k_index, top_k_weights, weights, self._apply_gate)

    def _apply_gate(self, z_SJ: Tensor) -> Tensor:
        """Compute what stands between the projections, (S, J) to (S, I)."""
        if self.region is not None:
            starts = accumulate(self.region_widths, initial=0)
            # Not `split`: what it returns may not be written into, and an activation may do that (`relu_`).
            z_SJs = [z_SJ.narrow(-1, *each) for each in zip(starts, self.region_widths, strict=False)]
            a_SI: Tensor = self.region(*z_SJs)
        elif self.has_gate:
            gate_SI, up_SI = z_SJ.chunk(2, dim=-1)
            a_SI = self.act_fn(gate_SI) * up_SI
        else:
            a_SI = ACTIVATIONS[self.activation].forward(z_SJ)
        return F.dropout(a_SI, self.dropout, self.training)

    def extra_repr(self) -> str:
        """Describe the experts in `repr`."""
        form = f"{self.activation} {'GLU' if self.has_gate else 'MLP'}"
        return f"{self.num_experts} x {form} {self.hidden_dim} → {self.intermediate_dim} → {self.hidden_dim}"
