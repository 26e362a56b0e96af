"""Bring tokens to the experts that they chose, and the results back: the one object that expert parallelism replaces.

Shape legend: T tokens, H hidden size, K choices per token, R rows that the experts here compute, C choices per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeify.routing.record import Routing


@dataclass(frozen=True)
class Sent:
    """What the experts on this device compute.

    Attributes:
        x: (R, H) rows.
        expert_ids: (R, C) experts of each row, counted within the experts on this device; E there for none.
        weights: (R, C) what multiplies each expert's output.
        state: What the dispatcher needs to combine the results.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    state: object = None


class Dispatcher(Protocol):
    """What an MoE layer asks of its dispatcher."""

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        """Send tokens (T, H) to their experts."""

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        """Return the sum of each token's results, (T, H), from what the experts made of `sent`, (R, H)."""

    def abandon(self, device: torch.device, why: str) -> None:
        """Say, instead of dispatching, that the layer stops here with an error: others may be waiting."""


class LocalDispatcher:
    """All experts are on this device: tokens stay where they are, and the experts sum over their choices."""

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        """Hand on the tokens and their choices."""
        return Sent(x_TH, routing.expert_ids_TK, routing.weights_TK)

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        """Hand on the results."""
        return y_RH

    def abandon(self, device: torch.device, why: str) -> None:
        """Do nothing: nobody waits."""
