"""The arguments of the expert computation, as every implementation takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ExpertInputs(NamedTuple):
    """What `moeify.kernels.ops.experts` computes with; that function says what each field means."""

    x_TH: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    up_EJH: Tensor
    down_EHI: Tensor
    up_bias_EJ: Tensor | None
    down_bias_EH: Tensor | None
    activation: str
    gated: bool

    @property
    def experts(self) -> int:
        """E."""
        return self.up_EJH.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.expert_ids_TK.shape[1]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The experts' weights and biases."""
        return self.up_EJH, self.down_EHI, self.up_bias_EJ, self.down_bias_EH


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass: the pre-activation and the order of the choices."""

    z_SJ: Tensor
    order_S: Tensor
    offsets_E1: Tensor
