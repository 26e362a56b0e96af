"""The soft layer: every slot is a mixture of tokens, every token a mixture of slots (Soft MoE, Puigcerver et al. 2023).

Shape legend: B sequences, L positions, H hidden, E experts, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.layers.moe import MoELayer
from moeify.routing.joint import SoftRouting, soft_moe
from moeify.routing.routers import Routing


class SoftRouter(nn.Module):
    """The learned slots, and the scale of their logits.

    Args:
        hidden: H.
        config: The settings.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self, hidden: int, config: MoEConfig, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.slots = nn.Parameter(torch.zeros(config.experts * config.slots, hidden, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def forward(self, x_BLH: Tensor, mask_BL: Tensor | None) -> SoftRouting:
        """Return the weights of both mixtures for tokens (B, L, H)."""
        return soft_moe(x_BLH, self.slots, self.scale, mask_T=mask_BL)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        return f"{self.config.experts} x {self.config.slots} slots of {self.slots.shape[1]}"


class SoftMoE(MoELayer):
    """A soft mixture of experts in the place of a dense FFN: nothing is chosen, nothing dropped, nothing to balance."""

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map activations (B, L, H), or (L, H) of one sequence, to the same shape (see `Batch.tokens`)."""
        x_BLH = x.reshape(-1, *x.shape[-2:])
        mask_T, _ = self.batch.tokens(x, token_ids, mask)
        routing = self.router(x_BLH, None if mask_T is None else mask_T.view(x_BLH.shape[:2]))
        slots_BSH = (routing.dispatch_TS.transpose(-1, -2) @ x_BLH.to(routing.dispatch_TS.dtype)).to(x.dtype)
        rows = slots_BSH.flatten(0, 1)
        out_BSH = self.experts(rows, self._everyone(slots_BSH)).view(slots_BSH.shape)
        out_BLH = (routing.combine_TS @ out_BSH.to(routing.combine_TS.dtype)).to(x.dtype)
        out_TH = self.with_shared(out_BLH.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        return F.dropout(out_TH.view(x.shape), self.dropout, self.training)

    def _everyone(self, slots_BSH: Tensor) -> Routing:
        """Send every slot to its own expert with weight 1."""
        batch, slots, _ = slots_BSH.shape
        ids = torch.arange(slots, device=slots_BSH.device) // self.config.slots
        ids = ids.expand(batch, slots).reshape(-1, 1)
        weights = torch.ones_like(ids, dtype=torch.float32)
        unused = weights.new_zeros(ids.shape[0], self.config.experts)
        return Routing(ids, weights, unused, unused)
