"""What a layer computed in a forward pass, the sum of the losses of several, and whether anything balances them.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from moeify.routing.balance import StepCounts, weighted_sum
from moeify.routing.record import Routing

if TYPE_CHECKING:
    from moeify.layers.moe import MoELayer

_UNBALANCED = (
    "the experts are trained and nothing balances them: add moeify.aux_loss(model) to the loss, convert with "
    "attach_losses=True, or with aux_loss=0 if that is meant"
)


@dataclass
class ForwardRecord:
    """What a layer computed in a forward pass.

    Attributes:
        routing: The router's choice, before capacity.
        mask_T: (T,) bool, False for padding; None when all tokens are real.
        sequences: B; the tokens are B sequences in a row.
        step: Choices in this step so far, on all ranks; None unless the balancing loss asks for them.
        dropped: Number of dropped choices, () int64; None without a limit.
        trained: Whether a gradient has come back to the router's weights.
        balanced: Whether one has come to the losses, or is sure to.
    """

    routing: Routing
    mask_T: Tensor | None
    sequences: int
    step: StepCounts | None = None
    dropped: Tensor | None = None
    trained: bool = False
    balanced: bool = False

    def follow(self, before: ForwardRecord | None) -> None:
        """Watch whether this pass is trained and balanced; say so once if the one before was trained alone."""
        if torch.compiler.is_compiling():
            return
        if before is not None and before.trained and not before.balanced:
            warnings.warn(_UNBALANCED, stacklevel=2)
        if self.routing.weights_TK.requires_grad:
            _hook(self.routing.weights_TK, partial(_mark_trained, ref(self)))  # no cycle: it would keep activations


def summed_losses(layers: Iterable[MoELayer]) -> Tensor | None:
    """Return the losses of the last forward pass times their coefficients, over all layers; None if there are none.

    The layers learn when a gradient flows into it: they are balanced then.
    """
    ran = [(layer, layer.record) for layer in layers if layer.record is not None]
    terms = [weighted_sum(layer.losses(), layer.config, layer.loss_share) for layer, _ in ran]
    found = [term for term in terms if term is not None]
    if not found:
        return None
    total = sum((term.to(found[0].device) for term in found[1:]), found[0])
    if total.requires_grad and not torch.compiler.is_compiling():
        _hook(total, partial(_mark_balanced, [record for _, record in ran]))
    return total


def _hook(tensor: Tensor, mark: partial[None]) -> None:
    tensor.register_hook(mark)  # type: ignore[no-untyped-call]


def _mark_balanced(records: Iterable[ForwardRecord], gradient: Tensor) -> None:
    for record in records:
        record.balanced = True


def _mark_trained(record: ReferenceType[ForwardRecord], gradient: Tensor) -> None:
    if (found := record()) is not None:
        found.trained = True
