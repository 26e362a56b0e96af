"""Weights quantized for tests, in either format, and rounded as the definitions say."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.kernels.quantized import Quantized


def to_e4m3(w_ENK: Tensor, block: tuple[int, int]) -> Quantized:
    """A scale for each block: its largest number becomes 448."""
    (_, n, k), (rows, columns) = w_ENK.shape, block
    values, scales = w_ENK.double().clone(), []
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            part = values[:, i : i + rows, j : j + columns]
            scales.append(part.abs().amax((1, 2)) / 448)
            part /= scales[-1][:, None, None]
    shape = (len(w_ENK), -(-n // rows), -(-k // columns))
    return Quantized(values.to(torch.float8_e4m3fn), torch.stack(scales, 1).view(shape).float())


def to_int4(w_ENK: Tensor, group: int) -> Quantized:
    """A scale for `group` columns of each row: its largest number becomes 7."""
    scales = w_ENK.double().reshape(*w_ENK.shape[:2], -1, group).abs().amax(3) / 7
    whole = (w_ENK.double() / scales.repeat_interleave(group, 2)).round().to(torch.int8) + 8
    whole = whole.to(torch.uint8)
    return Quantized(whole[..., ::2] | whole[..., 1::2] << 4, scales.float())
