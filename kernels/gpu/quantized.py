"""Experts with quantized weights in Triton, forward: e4m3 with scales of blocks or of the whole, int4 with groups.

Both take a product of raw numbers over one block of summed elements, then its scales: that is exact but for the
rounding of fp32. With e4m3 weights the rows are e4m3 too, quantized here, a scale for each row and 128 columns, as
DeepSeek-V3 does (arXiv:2412.19437); with int4 they stay as they are. The activation is a pass of its own: the up
projection's result is written once.

Shape legend: as in `moeify.kernels.gpu.gemm`, G groups of columns.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.gpu.experts import launch_combine
from moeify.kernels.gpu.layout import route
from moeify.kernels.gpu.math import activate, swizzle
from moeify.kernels.gpu.target import has_e4m3
from moeify.kernels.gpu.tiles import fit, quantized_tile, row_tile
from moeify.kernels.inputs import ExpertInputs
from moeify.kernels.layout import RoutingLayout, TileMap
from moeify.kernels.quantized import GROUP, LARGEST, Quantized


@triton.jit
def load_quantized(base, tile, k0, depth, PACKED: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr):
    """Return a block (BN, BK) of raw weights: e4m3, or integers from -8 to 7, two of which lie in a byte."""
    BYTES: tl.constexpr = BK // 2 if PACKED else BK
    left = (depth - k0) // 2 if PACKED else depth - k0
    w = tl.load(base + tile) if EVEN else tl.load(base + tile, mask=(tl.arange(0, BYTES) < left)[None, :], other=0.0)
    if PACKED:
        w = tl.interleave(w & 15, w >> 4).to(tl.int8) - 8
    return w


@triton.jit(do_not_specialize=["tiles"])
def quantized_rows_kernel(
    P, P_SCALES, W, W_SCALES, BIAS, ORDER, OFFSETS, TILE_EXPERT, TILE_ROW, Y, tiles,
    stride_p, stride_ps, stride_we, stride_wn, stride_se, stride_sn, stride_b,
    depth, N: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, GROUP_K: tl.constexpr, TOP_K: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y_SN = P W_E^T + bias, with W_ENK quantized; rows of P are tokens if TOP_K, else sorted.

    A scale of W serves SCALE_N rows and SCALE_K columns; one of P, unless PACKED, GROUP_K columns of a row.
    Grid: (tiles * cdiv(N, BN),).
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP_M)
    expert = tl.load(TILE_EXPERT + pid_m)
    if expert >= 0:
        end = tl.load(OFFSETS + expert + 1)
        row = tl.load(TILE_ROW + pid_m) + tl.arange(0, BM)
        source = tl.minimum(row, end - 1)
        if TOP_K:
            source = tl.load(ORDER + source) // TOP_K
        source = source.to(tl.int64)
        col = pid_n * BN + tl.arange(0, BN)
        n = tl.minimum(col, N - 1)
        k = tl.arange(0, BK)
        p_tile = source[:, None] * stride_p + k[None, :]
        w_base = W + expert.to(tl.int64) * stride_we
        w_tile = n[:, None] * stride_wn + (tl.arange(0, BK // 2) if PACKED else k)[None, :]
        s_ptr = W_SCALES + expert.to(tl.int64) * stride_se + (n // SCALE_N) * stride_sn
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, depth, BK):
            p = tl.load(P + p_tile) if EVEN else tl.load(P + p_tile, mask=(k < depth - k0)[None, :], other=0.0)
            w = load_quantized(w_base, w_tile, k0, depth, PACKED, EVEN, BK).to(p.dtype)
            part = tl.dot(p, w.T, input_precision="ieee")
            if not PACKED:
                part *= tl.load(P_SCALES + source * stride_ps + k0 // GROUP_K)[:, None]
            acc += part * tl.load(s_ptr + k0 // SCALE_K)[None, :]
            P += BK
            w_base += BK // 2 if PACKED else BK
        if HAS_BIAS:
            acc += tl.load(BIAS + expert.to(tl.int64) * stride_b + n)[None, :].to(tl.float32)
        y_ptr = Y + row.to(tl.int64)[:, None] * N + col[None, :]
        tl.store(y_ptr, acc.to(Y.dtype.element_ty), mask=(row < end)[:, None] & (col < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def activate_kernel(
    X, Q, SCALES, VALID, stride_x, rows, N: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    FP8: tl.constexpr, TOP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Q = X or, of the rows before VALID[0], act(X) or act(gate) * up; in e4m3 if FP8, a scale for every BN columns.

    Grid: (cdiv(rows, BM), cdiv(N, BN)).
    """
    if ACTIVATION != "":
        rows = tl.load(VALID)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (n < N)[None, :]
    row64 = row.to(tl.int64)
    x_ptr = X + row64[:, None] * stride_x + n[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        x, _ = activate(x, ACTIVATION)
        if GATED:
            x *= tl.load(x_ptr + N, mask=mask, other=0.0).to(tl.float32)
    if FP8:
        largest = tl.max(tl.where(mask, tl.abs(x), 0.0), 1)
        scale = tl.where(largest > 0, largest / TOP, 1.0)
        tl.store(SCALES + row64 * tl.cdiv(N, BN) + tl.program_id(1), scale, mask=row < rows)
        x = x / scale[:, None]
    tl.store(Q + row64[:, None] * N + n[None, :], x.to(Q.dtype.element_ty), mask=mask)


def has_kernels(inputs: ExpertInputs) -> bool:
    """Whether the hardware multiplies the types of these weights."""
    return has_e4m3() or all(w.dtype == torch.uint8 for w in (inputs.up_EJH, inputs.down_EHI))


def quantized_experts(inputs: ExpertInputs, up_scale: Tensor, down_scale: Tensor) -> Tensor:
    """Compute what `moeify.kernels.ops.experts` says of quantized weights."""
    choices, experts, tokens = inputs.expert_ids_TK.numel(), inputs.experts, inputs.x_TH.shape[0]
    layout, tiles = route(inputs.expert_ids_TK, experts, row_tile(choices, experts))
    up, down = Quantized(inputs.up_EJH, up_scale), Quantized(inputs.down_EHI, down_scale)
    x = inputs.x_TH if inputs.x_TH.stride(-1) == 1 else inputs.x_TH.contiguous()
    valid = layout.offsets_E1[-1:]
    rows = (x, x) if up.packed else launch_activate(x, x.shape[1], "", False, valid)
    z_SJ = launch_quantized_rows(rows, up, inputs.up_bias_EJ, layout, tiles, x.dtype, gather=True)
    rows = launch_activate(z_SJ, down.columns, inputs.activation, inputs.gated, valid, fp8=not down.packed)
    y_SH = launch_quantized_rows(rows, down, inputs.down_bias_EH, layout, tiles, x.dtype, gather=False)
    return launch_combine(y_SH, inputs.weights_TK, layout.inverse_S, layout.offsets_E1, tokens)


def launch_activate(
    x: Tensor, columns: int, activation: str, gated: bool, valid: Tensor, fp8: bool = True
) -> tuple[Tensor, Tensor]:
    """Return each row's activation, or without one the row, in e4m3 if `fp8`; and its scales, (rows, G), if `fp8`."""
    rows, groups = x.shape[0], triton.cdiv(columns, GROUP)
    q = x.new_empty((rows, columns), dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    scales = x.new_empty((rows, groups), dtype=torch.float32) if fp8 else q
    activate_kernel[(triton.cdiv(rows, 16), groups)](
        x, q, scales, valid, x.stride(0), rows,
        N=columns, ACTIVATION=activation, GATED=gated, FP8=fp8, TOP=LARGEST, BM=16, BN=GROUP,
    )  # fmt: skip
    return q, scales


def launch_quantized_rows(
    rows: tuple[Tensor, Tensor], w: Quantized, bias_EN: Tensor | None, layout: RoutingLayout, tiles: TileMap,
    dtype: torch.dtype, *, gather: bool,
) -> Tensor:  # fmt: skip
    """Multiply each row, or each choice's token if `gather`, with the weight of its expert."""
    (p, p_scales), values, scales = rows, w.values.contiguous(), w.scales.float().contiguous()
    bias = scales if bias_EN is None else bias_EN.contiguous()
    tile = fit(quantized_tile(tiles.block_m, p.element_size()), w.rows, max(w.block[1], 32))
    y_SN = p.new_empty((layout.order_S.shape[0], w.rows), dtype=dtype)
    count = tiles.expert_L.shape[0]
    quantized_rows_kernel[(count * triton.cdiv(w.rows, tile.n),)](
        p, p_scales, values, scales, bias, layout.order_S, layout.offsets_E1, tiles.expert_L, tiles.row_L, y_SN, count,
        p.stride(0), p_scales.stride(0), *values.stride()[:2], *scales.stride()[:2], bias.stride(0),
        depth=w.columns, N=w.rows, SCALE_N=w.block[0], SCALE_K=w.block[1], GROUP_K=GROUP,
        TOP_K=layout.top_k if gather else 0, PACKED=w.packed, HAS_BIAS=bias_EN is not None,
        EVEN=w.columns % tile.k == 0, BM=tiles.block_m, BN=tile.n, BK=tile.k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_SN
