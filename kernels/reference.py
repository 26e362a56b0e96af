"""What the kernels must compute, in plain torch: one expert at a time, nothing clever, differentiable, any float dtype.

Shape legend: T tokens, K choices per token, S sorted rows, E experts, H hidden, I intermediate,
J = 2*I if gated else I, N any width. A trailing 1 is plus one: offsets_E1 is (E + 1,).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.activations import find_activation
from moeify.kernels.checks import check_offsets
from moeify.kernels.layout import wide_enough
from moeify.kernels.quantized import Quantized, dequantize, round_rows
from moeify.kernels.topology import BlockTopology


def experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EJH: Tensor,
    down_EHI: Tensor,
    up_bias_EJ: Tensor | None,
    down_bias_EH: Tensor | None,
    activation: str,
    gated: bool,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Sum over choices k of weights[t, k] * FFN of expert ids[t, k] applied to x[t]. Returns (T, H) in x's dtype.

    With scales the weights are the values of `moeify.kernels.quantized.Quantized`.
    """
    act = find_activation(activation).forward
    expert_ids_TK, out_TH = wide_enough(expert_ids_TK), torch.zeros_like(x_TH)
    for e in range(up_EJH.shape[0]):
        token, choice = torch.where(expert_ids_TK == e)
        z = _linear(x_TH[token], up_EJH, up_scale, up_bias_EJ, e)
        if gated:
            gate, up = z.chunk(2, dim=-1)
            a = act(gate) * up
        else:
            a = act(z)
        y = _linear(a, down_EHI, down_scale, down_bias_EH, e)
        weighted = y * weights_TK[token, choice, None]
        out_TH = out_TH.index_add(0, token, weighted.to(x_TH.dtype))
    return out_TH


def _linear(x: Tensor, w_ENK: Tensor, scale: Tensor | None, b_EN: Tensor | None, e: int) -> Tensor:
    """Apply one expert's linear layer; rows are rounded to e4m3 if its weight is of that type."""
    w_NK = w_ENK[e]
    if scale is not None and not len(x):
        return x.new_empty(0, w_ENK.shape[1])  # an idle expert's weight is not made whole
    if scale is not None:
        x = x if w_ENK.dtype == torch.uint8 else round_rows(x)
        w_NK = dequantize(Quantized(w_ENK[e : e + 1], scale[e : e + 1]), x.dtype)[0]
    return F.linear(x, w_NK, None if b_EN is None else b_EN[e])


def grouped_linear(x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] - 1 of x go through w[e], b[e]. Rows past the last offset give zeros."""
    bounds = offsets_E1.tolist()
    check_offsets(bounds, x_SH.shape[0])
    parts = [
        F.linear(x_SH[start:end], w_ENH[e], None if b_EN is None else b_EN[e])
        for e, (start, end) in enumerate(pairwise(bounds))
    ]
    return torch.cat([*parts, x_SH.new_zeros(x_SH.shape[0] - bounds[-1], w_ENH.shape[1])])


def to_dense(data_NBB: Tensor, topology: BlockTopology) -> Tensor:
    """The matrix (S, E*F) that block-sparse data stand for."""
    out = data_NBB.new_zeros(topology.rows, topology.experts * topology.columns)
    for block, (rows, columns) in enumerate(_extents(topology)):
        out[rows, columns] = data_NBB[block, : rows.stop - rows.start, : columns.stop - columns.start]
    return out


def to_blocks(dense: Tensor, topology: BlockTopology) -> Tensor:
    """The blocks (N, B, B) of a matrix (S, E*F); what lies outside them is dropped."""
    out = dense.new_zeros(topology.blocks, topology.block, topology.block)
    for block, (rows, columns) in enumerate(_extents(topology)):
        out[block, : rows.stop - rows.start, : columns.stop - columns.start] = dense[rows, columns]
    return out


def _extents(topology: BlockTopology) -> list[tuple[slice, slice]]:
    """Rows and columns of the dense matrix that each live block covers."""
    extents = []
    for row, column in zip(topology.row_N.tolist(), topology.column_N.tolist(), strict=True):
        if row < 0:
            break
        expert = int(topology.expert_L[row])
        first, j = int(topology.first_row_L[row]), column - expert * topology.expert_blocks
        last = min(first + topology.block, int(topology.offsets_E1[expert + 1]))
        left, right = j * topology.block, min((j + 1) * topology.block, topology.columns)
        base = expert * topology.columns
        extents.append((slice(first, last), slice(base + left, base + right)))
    return extents
