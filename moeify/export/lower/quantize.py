"""Expert weights in 8 or 4 bits, in the layout of `com.microsoft::QMoE` that its CPU and CUDA kernels share.

Shape legend: E experts, N rows, K values in a row, B blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# For each weight that was rounded, by name, what makes the values that an operator computes with.
Rounded = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Quantized:
    """Weights w = (q - 2^(bits-1)) · scale.

    Attributes:
        packed: uint8 (E, N, K · bits / 8), the first value in the low bits.
        scales: (E, N) or, with blocks, (E, N, B), in the weights' dtype; of either sign.
        bits: 8 or 4.
        block: Values that share a scale, None for a whole row.
    """

    packed: Tensor
    scales: Tensor
    bits: int
    block: int | None

    def dequantized(self) -> Tensor:
        """Return the weights that the operator computes with, (E, N, K)."""
        q = self.packed if self.bits == 8 else torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(-2)
        centred: Tensor = (q.int() - (1 << (self.bits - 1))).to(self.scales.dtype)
        blocks = _blocks(centred, self.block)
        scales = self.scales if self.block else self.scales[..., None]
        weights: Tensor = (blocks * scales[..., None]).flatten(-2)
        return weights


def quantize(weights_ENK: Tensor, bits: int, block: int | None) -> Quantized:
    """Round weights to the nearest of 2^bits levels around zero.

    Of each group with one scale the value farthest from zero becomes the level -2^(bits-1), which has no counterpart:
    scales are negative where that value is positive. In 4 bits the sixteenth level takes a fifth of the error.

    Args:
        weights_ENK: (E, N, K), any float dtype; K a multiple of the block, and even for 4 bits.
        bits: 8 or 4.
        block: Values that share a scale; None for a whole row.
    """
    blocks_ENBK = _blocks(weights_ENK.float(), block)
    zero = 1 << (bits - 1)
    farthest_ENB1 = blocks_ENBK.abs().argmax(-1, keepdim=True)
    scales_ENB = (blocks_ENBK.gather(-1, farthest_ENB1)[..., 0] / -zero).to(weights_ENK.dtype)
    divisor = torch.where(scales_ENB == 0, 1, scales_ENB).float()[..., None]
    q = ((blocks_ENBK / divisor).round().clamp(-zero, zero - 1) + zero).to(torch.uint8).flatten(-2)
    packed = q if bits == 8 else q[..., ::2] | (q[..., 1::2] << 4)
    return Quantized(packed.contiguous(), scales_ENB if block else scales_ENB[..., 0].contiguous(), bits, block)


def _blocks(x_ENK: Tensor, block: int | None) -> Tensor:
    """(E, N, K) as (E, N, B, block)."""
    return x_ENK.reshape(*x_ENK.shape[:-1], -1, block or x_ENK.shape[-1])
