"""The soft layer: experts compute slots, which are mixtures of tokens (Soft MoE, Puigcerver et al. 2023).

Shape legend: B sequences, L positions, H hidden size, E experts, S slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.layers.moe import MoELayer
from moeify.routing.record import Routing


class SoftMoE(MoELayer):
    """A soft mixture of experts in the place of a dense FFN: nothing is chosen, nothing dropped, nothing to balance."""

    chooses = False

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map activations (B, L, H), or (L, H) of one sequence, to the same shape (see `ModelInputs.tokens`)."""
        x_BLH = x.reshape(-1, *x.shape[-2:])
        mask_T, _ = self.model_inputs.tokens(x, token_ids, mask)
        mixtures = self.router(x_BLH, None if mask_T is None else mask_T.view(x_BLH.shape[:2]))
        slots_BSH = (mixtures.dispatch_TS.transpose(-1, -2) @ x_BLH.to(mixtures.dispatch_TS.dtype)).to(x.dtype)
        sent = self.dispatcher.dispatch(slots_BSH.flatten(0, 1), self._own_experts(slots_BSH))
        y = self.experts(sent.x, sent.expert_ids, sent.weights)
        out_BSH = self.dispatcher.combine(y, sent).view(slots_BSH.shape)
        out_BLH = (mixtures.combine_TS @ out_BSH.to(mixtures.combine_TS.dtype)).to(x.dtype)
        out_TH = self.with_shared(out_BLH.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))
        return F.dropout(out_TH.view(x.shape), self.dropout, self.training)

    def _own_experts(self, slots_BSH: Tensor) -> Routing:
        """Send every slot to its own expert with weight 1."""
        batch, slots, _ = slots_BSH.shape
        ids = torch.arange(slots, device=slots_BSH.device) // (slots // self.config.experts)
        ids = ids.expand(batch, slots).reshape(-1, 1)
        weights = torch.ones_like(ids, dtype=torch.float32)
        unused = weights.new_zeros(ids.shape[0], self.config.experts)
        return Routing(ids, weights, unused, unused)
