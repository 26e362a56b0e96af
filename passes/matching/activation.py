"""The activation of an FFN, recognized by its values and not by its operators.

So a hand-written x·sigmoid(1.702x), a fused gate and up projection in either order and a call to `F.silu` are all seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from moeify.kernels.activations import ACTIVATIONS as KERNELS_KNOW
from moeify.measure import probe, recognize, same_values
from moeify.passes.matching.region import region_parameters

Unary = Callable[[torch.Tensor], torch.Tensor]
Rows = tuple[int, int, int, int]  # of one projection: its index among them, then start, stop and step

# What the kernels know, and what is composed from other operators.
ACTIVATIONS: dict[str, Unary] = {name: known.forward for name, known in KERNELS_KNOW.items()} | {"mish": F.mish}
CUSTOM = "custom"


def _gated(function: Unary) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda gate, up: function(gate) * up


_GATED = {name: _gated(function) for name, function in ACTIVATIONS.items()} | {"identity": torch.mul}


@dataclass(frozen=True)
class GateUpRows:
    """Which output rows of the projections are the gate (None without one) and which are the up projection."""

    gate: Rows | None
    up: Rows

    @property
    def parts(self) -> tuple[Rows, ...]:
        """What there is of gate and up, in this order."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


def name_activation(
    region: fx.GraphModule, widths: Sequence[int], intermediate: int
) -> tuple[str, GateUpRows | None, bool]:
    """Name a region by its values in float64 from -12 to 12.

    Args:
        region: What `capture` returned.
        widths: How many features each input has (the projections' outputs).
        intermediate: How many features the output has.

    Returns:
        Its canonical name, which rows are gate and up, and whether it has the name only up to rounding to float32, as
        with a constant of a few digits (BLOOM's GELU); ("custom", None, False) when nobody has a name for it.
    """
    if region_parameters(region):
        return CUSTOM, None, False  # its values are not known, so no name can be claimed
    inputs = [probe(2, width, seed=seed) for seed, width in enumerate(widths)]
    try:
        values = region(*inputs).double()
    except (RuntimeError, TypeError, ValueError):
        return CUSTOM, None, False
    for rows in _possible_rows(list(widths), intermediate):
        points = [inputs[index][..., start:stop:step] for index, start, stop, step in rows.parts]
        table = ACTIVATIONS if rows.gate is None else _GATED
        name = recognize(values, table, *points)
        if name is not None:
            return name, rows, not same_values(values, table[name](*points), exactly=True)
    return CUSTOM, None, False


def _possible_rows(widths: list[int], intermediate: int) -> list[GateUpRows]:
    """List the ways in which inputs with so many features can make one output with `intermediate`."""
    size = intermediate
    match widths:
        case [single] if single == size:
            return [GateUpRows(None, (0, 0, size, 1))]
        case [fused] if fused == 2 * size:
            first, second = (0, 0, size, 1), (0, size, 2 * size, 1)
            even, odd = (0, 0, 2 * size, 2), (0, 1, 2 * size, 2)
            pairs = [(first, second), (second, first), (even, odd), (odd, even)]
        case [a, b] if a == b == size:
            first, second = (0, 0, size, 1), (1, 0, size, 1)
            pairs = [(first, second), (second, first)]
        case _:
            return []
    return [GateUpRows(gate, up) for gate, up in pairs]
