"""The experts: E FFNs of one shape, in stacked parameters.

Shape legend: T tokens, H hidden size, I intermediate size, J rows of the up projections (2I with a gate), E experts,
K choices per token, S = T·K choices in the experts' order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.kernels import ops
from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.layout import routing_layout


class Experts(nn.Module):
    """E FFNs of one shape, stacked as transformers holds them.

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
    """

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
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.activation, self.gated, self.dropout = activation, gated, dropout
        self.region, self.region_widths = region, region_widths

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

    def forward(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return Σ_k weight · expert(x).

        Args:
            x_TH: (T, H).
            expert_ids_TK: (T, K) integers; an id outside [0, E) contributes zero.
            weights_TK: (T, K).
        """
        if self.region is None and not (self.training and self.dropout):
            return ops.experts(
                x_TH,
                expert_ids_TK,
                weights_TK,
                self.up,
                self.down_proj,
                self.up_bias,
                self.down_proj_bias,
                activation=self.activation,
                gated=self.gated,
            )
        return self._unfused(x_TH, expert_ids_TK, weights_TK)

    def _unfused(self, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Run the experts with any torch code between the projections."""
        layout = routing_layout(expert_ids_TK, self.num_experts)
        z_SJ = ops.grouped_linear(ops.dispatch(x_TH, layout), self.up, self.up_bias, layout.offsets_E1)
        a_SI = F.dropout(self._activate(z_SJ), self.dropout, self.training)
        y_SH = ops.grouped_linear(a_SI, self.down_proj, self.down_proj_bias, layout.offsets_E1)
        return ops.combine(y_SH, weights_TK, layout).to(x_TH.dtype)

    def _activate(self, z_SJ: Tensor) -> Tensor:
        if self.region is not None:
            activated: Tensor = self.region(*torch.split(z_SJ, list(self.region_widths), dim=-1))
            return activated
        act = ACTIVATIONS[self.activation].forward
        if not self.gated:
            return act(z_SJ)
        gate_SI, up_SI = z_SJ.chunk(2, dim=-1)
        return act(gate_SI) * up_SI

    def extra_repr(self) -> str:
        """Describe the experts in `repr`."""
        form = f"{self.activation} {'GLU' if self.gated else 'MLP'}"
        return f"{self.num_experts} x {form} {self.hidden} → {self.intermediate} → {self.hidden}"
