"""Quantized weights of experts: what their numbers and scales mean, in plain torch.

Shape legend: E experts, N rows and K columns of a weight, R rows of any matrix, G groups of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = ("fp8", "int4")
GROUP = 128  # columns of a row of e4m3 activations that share a scale; rows and columns of a block of weights that do
LARGEST = 448.0  # of e4m3
INT4_LARGEST, INT4_ZERO = 7.0, 8  # what stands for zero


class Quantized(NamedTuple):
    """Stacked weights: `values * scales`, where a scale serves a block of rows and columns.

    Attributes:
        values: (E, N, K) float8_e4m3fn; or uint8 (E, N, K / 2), int4 plus 8, the even column in the low half.
        scales: (E, rows of blocks, columns of blocks): one block is all rows or columns, GROUP of them, or a single
            row; or, in an int4 weight, a part of the columns that is a power of two.
    """

    values: Tensor
    scales: Tensor

    @property
    def packed(self) -> bool:
        """Whether two numbers lie in a byte."""
        return self.values.dtype == torch.uint8

    @property
    def rows(self) -> int:
        """N."""
        return self.values.shape[1]

    @property
    def columns(self) -> int:
        """K."""
        return self.values.shape[2] * (2 if self.packed else 1)

    @property
    def block(self) -> tuple[int, int]:
        """How many rows and columns share a scale; 0 for a number of scales that fits none of the ways."""
        rows, columns = self.scales.shape[1:]
        if not rows * columns:
            return 0, 0
        parts = self.columns // columns if self.columns % columns == 0 else 0
        power = parts >= 32 and parts & (parts - 1) == 0
        return _share(self.rows, rows, 1), parts if power else _share(self.columns, columns, 0)


def _share(size: int, scales: int, least: int) -> int:
    """Return how many of `size` share one of `scales` scales."""
    if scales == 1:
        return size
    return GROUP if scales == -(-size // GROUP) else least if scales == size else 0


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """Return the weights as (E, N, K)."""
    values = weight.values
    if weight.packed:
        values = torch.stack([values & 15, values >> 4], -1).flatten(2).to(torch.int8) - INT4_ZERO
    rows, columns = weight.block
    scales = weight.scales.to(dtype).repeat_interleave(rows, 1)[:, : weight.rows]
    return values.to(dtype) * scales.repeat_interleave(columns, 2)[..., : weight.columns]


def quantize(w_ENK: Tensor, form: str) -> Quantized:
    """Round stacked weights to the nearest in a format, one expert at a time.

    Args:
        w_ENK: (E, N, K), any float dtype.
        form: "fp8" is e4m3 with a scale for each block of GROUP rows and columns, "int4" has one for each row and GROUP
            columns. The largest number of a block becomes the largest of the format.

    Raises:
        ValueError: There is no such format, or int4 has a column without a second one for its byte.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r} of quantized weights: expected {' or '.join(FORMATS)}")
    if form == "int4" and w_ENK.shape[2] % 2:
        raise ValueError(
            f"int4 packs two columns in a byte, and a weight has {w_ENK.shape[2]}: expected even; use 'fp8'"
        )
    parts = [_quantize(w_NK, form == "int4") for w_NK in w_ENK]
    return Quantized(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))


def _quantize(w_NK: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    rows, columns = w_NK.shape
    height = 1 if packed else GROUP
    padded = F.pad(w_NK.float(), (0, -columns % GROUP, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // GROUP, GROUP)
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / (INT4_LARGEST if packed else LARGEST), 1.0)
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    if not packed:
        return values.to(torch.float8_e4m3fn), scales
    whole = (values.round() + INT4_ZERO).to(torch.uint8)
    return pack(whole), scales


def pack(values: Tensor) -> Tensor:
    """Return integers (…, K) from 0 to 15 two in a byte, (…, K / 2): that of an even column in its low half."""
    return values[..., ::2] | values[..., 1::2] << 4


def round_rows(x_RK: Tensor) -> Tensor:
    """Return what is left of each row in e4m3, with a scale for every GROUP columns."""
    parts = []
    for start in range(0, x_RK.shape[1], GROUP):
        part = x_RK[:, start : start + GROUP]
        largest = part.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        parts.append((part / scale).to(torch.float8_e4m3fn).to(x_RK.dtype) * scale)
    return torch.cat(parts, 1)
