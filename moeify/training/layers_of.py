"""The MoE layers of a model, by their paths."""

from __future__ import annotations

from torch import nn

from moeify.errors import MoeifyError
from moeify.layers import MoELayer


def layers_of(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers inside a model, in the order of its modules; the model may be wrapped (PEFT, DDP).

    Raises:
        MoeifyError: There is none.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}
    if not found:
        raise MoeifyError(f"{type(model).__name__} has no MoE layer of moeify: convert it first")
    return found
