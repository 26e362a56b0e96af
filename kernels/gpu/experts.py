"""Expert computation on GPU: the host side of the Triton kernels, with the same functions as `moeify.kernels.cpu`.

Nothing here waits for the device and no shape depends on the routing, so CUDA graphs can capture it. Results are the
same bits every time: no kernel uses atomics.

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, N any number of columns. A trailing 1 is plus one: offsets_E1 is (E + 1,).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moeify.kernels.gpu import tiles, tuned_tiles
from moeify.kernels.gpu.gemm import (
    bias_kernel,
    combine_kernel,
    down_backward_kernel,
    rows_kernel,
    up_kernel,
    weights_kernel,
)
from moeify.kernels.gpu.layout import routing_layout, tile_map
from moeify.kernels.gpu.target import product_precision
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import invert, wide_enough

WIDEST = 128  # rows or columns of the largest tile


def experts_forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Kept]:
    """Return the output (T, H) and what the backward pass reads; the pre-activation has no rows unless `keep`."""
    layout = routing_layout(inputs.expert_ids_TK, inputs.experts)
    order_S, offsets_E1 = layout.order_S, layout.offsets_E1
    z_SJ, a_SI = launch_up(inputs, order_S, offsets_E1, keep)
    y_SH = launch_rows(a_SI, inputs.down_EHI.transpose(1, 2), inputs.down_bias_EH, offsets_E1)
    out_TH = launch_combine(y_SH, inputs.weights_TK, layout.inverse_S, offsets_E1, inputs.x_TH.shape[0])
    return out_TH, Kept(z_SJ, order_S, offsets_E1)


def experts_backward(grad_TH: Tensor, inputs: ExpertInputs, kept: Kept, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of the seven tensors of `inputs`, an empty tensor for each that `needs` leaves out."""
    grad_TH, inputs = _unit_stride(grad_TH), inputs._replace(weights_TK=inputs.weights_TK.contiguous())
    x_TH, expert_ids_TK, weights_TK, up_EJH, down_EHI, _, down_bias_EH, _, _ = inputs
    (_, order_S, offsets_E1), top_k = kept, inputs.top_k
    dz_SJ, as_SI, ds_S = launch_down_backward(grad_TH, inputs, kept)
    gradients = [x_TH.new_empty(0)] * 7
    inverse_S = invert(order_S)
    if needs[0]:
        dx_SH = launch_rows(dz_SJ, up_EJH, None, offsets_E1)
        gradients[0] = launch_combine(dx_SH, None, inverse_S, offsets_E1, x_TH.shape[0])
    if needs[2]:
        ds_TK = torch.where(inverse_S < offsets_E1[-1], ds_S[inverse_S], 0).view_as(weights_TK)
        if down_bias_EH is not None:
            ds_TK += _bias_scores(grad_TH, down_bias_EH, expert_ids_TK)
        gradients[2] = ds_TK.to(weights_TK.dtype)
    if needs[3]:
        gradients[3] = launch_weights(dz_SJ, x_TH, order_S, offsets_E1, top_k, gather="right").view_as(up_EJH)
    if needs[4]:
        gradients[4] = launch_weights(grad_TH, as_SI, order_S, offsets_E1, top_k, gather="left").view_as(down_EHI)
    if needs[5]:
        gradients[5] = launch_bias(dz_SJ, None, order_S, offsets_E1, top_k)
    if needs[6]:
        gradients[6] = launch_bias(grad_TH, weights_TK, order_S, offsets_E1, top_k)
    return gradients


def grouped_linear_forward(x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Compute what `moeify.kernels.ops.grouped_linear` says."""
    return launch_rows(x_SH, w_ENH.transpose(1, 2), b_EN, offsets_E1, fill=True)


def grouped_linear_backward(
    grad_SN: Tensor, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of the four inputs of the forward pass, an empty tensor for each that `needs` leaves out."""
    gradients = [x_SH.new_empty(0)] * 4
    if needs[0]:
        gradients[0] = launch_rows(grad_SN, w_ENH, None, offsets_E1, fill=True)
    if needs[1]:
        gradients[1] = launch_weights(grad_SN, x_SH, offsets_E1, offsets_E1, 1, gather="neither")
    if needs[2]:
        gradients[2] = launch_bias(grad_SN, None, offsets_E1, offsets_E1, 1)
    return gradients


def _options(kernel: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time arguments of a matrix product: tile, schedule and precision."""
    tile = tuned_tiles.pick(kernel, m, n, k, dtype.itemsize)
    return {
        "EVEN": k % tile.k == 0, "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": tile.group_m,
        "PRECISION": product_precision(dtype), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _within_reach(t: Tensor) -> Tensor:
    """Copy a matrix (or a stack of them) so spread out that 32 bits do not hold the offsets within one tile."""
    return t.contiguous() if WIDEST * sum(t.stride()[-2:]) >= 1 << 31 else t


def launch_up(inputs: ExpertInputs, order_S: Tensor, offsets_E1: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the pre-activation `z_SJ`, without rows unless `keep`, and the activation `a_SI`."""
    x_TH, up_EJH, activation, gated = _unit_stride(inputs.x_TH), _within_reach(inputs.up_EJH), *inputs[-2:]
    bias = up_EJH if inputs.up_bias_EJ is None else _unit_stride(inputs.up_bias_EJ)
    (experts, rows, hidden), choices = up_EJH.shape, order_S.shape[0]
    intermediate = rows // 2 if gated else rows
    z_SJ, a_SI = x_TH.new_empty(choices if keep else 0, rows), x_TH.new_empty(choices, intermediate)
    options = _options("up", tiles.row_tile(choices, experts), intermediate, hidden, x_TH.dtype)
    tile = tile_map(offsets_E1, choices, options["BM"])
    count = tile.expert_L.shape[0]
    up_kernel[(count * triton.cdiv(intermediate, options["BN"]),)](
        x_TH, up_EJH, bias, order_S, offsets_E1, tile.expert_L, tile.row_L, z_SJ, a_SI, count,
        x_TH.stride(0), *up_EJH.stride(), bias.stride(0),
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=inputs.top_k, ACTIVATION=activation, GATED=gated,
        HAS_BIAS=inputs.up_bias_EJ is not None, KEEP=keep, **options,
    )  # fmt: skip
    return z_SJ, a_SI


def launch_rows(p_SK: Tensor, w_EKN: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, fill: bool = False) -> Tensor:
    """Multiply each row with the weight of its expert; rows of no expert are zero if `fill`, else not written."""
    p_SK, w_EKN = _within_reach(_unit_stride(p_SK)), _within_reach(w_EKN)
    (experts, depth, width), choices = w_EKN.shape, p_SK.shape[0]
    bias = w_EKN if bias_EN is None else _unit_stride(bias_EN)
    y_SN = (p_SK.new_zeros if fill else p_SK.new_empty)(choices, width)
    options = _options("rows", tiles.row_tile(choices, experts), width, depth, p_SK.dtype)
    tile = tile_map(offsets_E1, choices, options["BM"])
    count = tile.expert_L.shape[0]
    rows_kernel[(count * triton.cdiv(width, options["BN"]),)](
        p_SK, w_EKN, bias, offsets_E1, tile.expert_L, tile.row_L, y_SN, count,
        p_SK.stride(0), *w_EKN.stride(), bias.stride(0),
        depth=depth, N=width, HAS_BIAS=bias_EN is not None, **options,
    )  # fmt: skip
    return y_SN


def launch_down_backward(grad_TH: Tensor, inputs: ExpertInputs, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dz_SJ, weight * a_SI, dweight_S)`; the last is fp32 and lacks the part of the down bias."""
    down_EHI, (z_SJ, order_S, offsets_E1) = _within_reach(inputs.down_EHI), kept
    (experts, hidden, intermediate), choices = down_EHI.shape, order_S.shape[0]
    options = _options("down_backward", tiles.row_tile(choices, experts), intermediate, hidden, grad_TH.dtype)
    tile = tile_map(offsets_E1, choices, options["BM"])
    count, columns = tile.expert_L.shape[0], triton.cdiv(intermediate, options["BN"])
    dz_SJ, as_SI = torch.empty_like(z_SJ), z_SJ.new_empty(choices, intermediate)
    partial = z_SJ.new_empty((choices, columns), dtype=torch.float32)
    down_backward_kernel[(count * columns,)](
        grad_TH, down_EHI, z_SJ, inputs.weights_TK, order_S, offsets_E1, tile.expert_L, tile.row_L, dz_SJ, as_SI,
        partial, count, grad_TH.stride(0), *down_EHI.stride(), depth=hidden, INTERMEDIATE=intermediate,
        TOP_K=inputs.top_k, ACTIVATION=inputs.activation, GATED=inputs.gated, **options,
    )  # fmt: skip
    return dz_SJ, as_SI, partial.sum(1)


def launch_weights(
    left: Tensor, right: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int, *, gather: str
) -> Tensor:
    """Return the gradient of stacked weights, (E, columns of left, columns of right).

    Args:
        left: (S, M), or (T, M) if `gather` is "left".
        right: (S, N), or (T, N) if `gather` is "right".
        order_S: As in `RoutingLayout`.
        offsets_E1: As in `RoutingLayout`.
        top_k: K.
        gather: The side that holds tokens, whose rows are to be gathered: "left", "right" or "neither".
    """
    left, right, experts = _unit_stride(left), _unit_stride(right), offsets_E1.shape[0] - 1
    (_, m), (_, n) = left.shape, right.shape
    options = _options("weights", 128, m, n, left.dtype)
    del options["EVEN"]
    dw_EMN = left.new_empty(experts, m, n)
    weights_kernel[(triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]), experts)](
        left, right, order_S, offsets_E1, dw_EMN, left.stride(0), right.stride(0),
        M=m, N=n, GATHER_L=gather == "left", GATHER_R=gather == "right", TOP_K=top_k, **options,
    )  # fmt: skip
    return dw_EMN


def launch_bias(rows: Tensor, weights_TK: Tensor | None, order_S: Tensor, offsets_E1: Tensor, top_k: int) -> Tensor:
    """Sum each expert's rows or, with `weights_TK`, its tokens times their weights."""
    rows, weighted, width = _unit_stride(rows), weights_TK is not None, rows.shape[1]
    db_EN = rows.new_empty(offsets_E1.shape[0] - 1, width)
    bias_kernel[(triton.cdiv(width, 64), db_EN.shape[0])](
        rows, weights_TK if weighted else rows, order_S, offsets_E1, db_EN, rows.stride(0),
        N=width, GATHER=weighted, WEIGHTED=weighted, TOP_K=top_k, BN=64, BK=32,
    )  # fmt: skip
    return db_EN


def _bias_scores(grad_TH: Tensor, down_bias_EH: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Return <dO[t], bias of expert ids[t, k]> in fp32, zero for ids outside [0, E)."""
    expert_ids_TK = wide_enough(expert_ids_TK)
    scores_TE = grad_TH.float() @ down_bias_EH.float().t()
    inside_TK = (expert_ids_TK >= 0) & (expert_ids_TK < down_bias_EH.shape[0])
    return torch.where(inside_TK, scores_TE.gather(1, torch.where(inside_TK, expert_ids_TK, 0).long()), 0)


def launch_combine(
    y_SN: Tensor, weights_TK: Tensor | None, inverse_S: Tensor, offsets_E1: Tensor, tokens: int
) -> Tensor:
    """Sum the sorted rows of each token's choices, weighted unless `weights_TK` is None."""
    width, weighted = y_SN.shape[1], weights_TK is not None
    out_TN = y_SN.new_empty(tokens, width)
    block = min(triton.next_power_of_2(width), 1024)
    combine_kernel[(tokens, triton.cdiv(width, block))](
        y_SN, weights_TK.contiguous() if weights_TK is not None else y_SN, inverse_S, offsets_E1[-1:], out_TN,
        N=width, TOP_K=inverse_S.shape[0] // max(tokens, 1), WEIGHTED=weighted, BN=block,
    )  # fmt: skip
    return out_TN
