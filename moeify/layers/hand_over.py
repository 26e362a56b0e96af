"""How a layer reads its FFN's input where the block around it computes the FFN itself.

A block that computes its FFN itself (`self.down(F.gelu(self.up(x)))`) goes on doing so: the up projection's place keeps
`x` for the layer in the down projection's place, and what the block computes between the two is not used. A compiler
leaves it out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from moeify.errors import MoeifyError


class Slot:
    """What an FFN reads in the current forward pass, from its up to its down projection."""

    x: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a tensor of a forward pass can be neither copied nor saved


class HandOver(nn.Module):
    """Stands in the place of an up projection: keeps its input, and returns zeros of the projection's shape.

    Args:
        slot: Where the input is kept.
        features: How many features the up projection wrote.
        axis: The dimension that holds them.
    """

    def __init__(self, slot: Slot, features: int, axis: int) -> None:
        super().__init__()
        self.slot, self.features, self.axis = slot, features, axis

    def forward(self, x: Tensor) -> Tensor:
        """Map an activation with the hidden size to zeros; real ones, because the block may write into them."""
        self.slot.x = x
        dims = list(x.shape)
        dims[self.axis] = self.features
        return x.new_zeros(dims)

    def extra_repr(self) -> str:
        """Describe the module in `repr`."""
        return f"features={self.features}"


def tie(layer: nn.Module, *, slot: Slot | None, axis: int) -> None:
    """Let a layer for activations (…, H) read and write what the model around it does.

    Args:
        layer: The MoE layer.
        slot: Where its input lies, if not in its argument.
        axis: The dimension of the features in the model, counted from the end.
    """
    if slot is not None:
        layer.register_forward_pre_hook(partial(_take, slot))
    if axis != -1:
        layer.register_forward_pre_hook(partial(_features_last, axis))
        layer.register_forward_hook(partial(_features_back, axis))


def _take(slot: Slot, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, slot.x = slot.x, None
    if x is None:
        raise MoeifyError(
            f"{getattr(layer, 'path', '') or 'an MoE layer'} was called without the module that hands its input over: "
            "call the block around both"
        )
    return (x, *args[1:])


def _features_last(axis: int, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].movedim(axis, -1), *args[1:])


def _features_back(axis: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.movedim(-1, axis)
