"""Expert computation on GPU: the host side of the Triton kernels, with the same functions as `moeify.kernels.cpu`.

Nothing here waits for the device and no shape depends on the routing, so CUDA graphs can capture it. Results are the
same bits every time: no kernel uses atomics.

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, N any number of columns. A trailing 1 is plus one: offsets_E1 is (E + 1,).
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moeify.kernels.gpu import tuned_tiles
from moeify.kernels.gpu.gemm import (
    bias_kernel,
    combine_kernel,
    down_backward_kernel,
    gather_kernel,
    rows_kernel,
    up_kernel,
    weights_kernel,
)
from moeify.kernels.gpu.layout import route, tile_map
from moeify.kernels.gpu.target import has_tma, multiprocessors, product_precision
from moeify.kernels.gpu.tiles import Tile, row_tile
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import TileMap, invert, wide_enough

WIDEST = 256  # rows or columns of the largest tile


def experts_forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Kept]:
    """Return the output (T, H) and what the backward pass reads; the pre-activation has no rows unless `keep`."""
    height = row_tile(inputs.expert_ids_TK.numel(), inputs.experts)
    layout, tiles = route(inputs.expert_ids_TK, inputs.experts, height)
    order_S, offsets_E1 = layout.order_S, layout.offsets_E1
    z_SJ, a_SI = launch_up(inputs, order_S, offsets_E1, tiles, keep)
    y_SH = launch_rows(a_SI, inputs.down_EHI.transpose(1, 2), inputs.down_bias_EH, offsets_E1, tiles)
    out_TH = launch_combine(y_SH, inputs.weights_TK, layout.inverse_S, offsets_E1, inputs.x_TH.shape[0])
    return out_TH, Kept(z_SJ, order_S, offsets_E1)


def experts_backward(grad_TH: Tensor, inputs: ExpertInputs, kept: Kept, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of the seven tensors of `inputs`, an empty tensor for each that `needs` leaves out."""
    grad_TH, inputs = _unit_stride(grad_TH), inputs._replace(weights_TK=inputs.weights_TK.contiguous())
    x_TH, expert_ids_TK, weights_TK, up_EJH, _, _, down_bias_EH, _, _ = inputs
    (_, order_S, offsets_E1), top_k = kept, inputs.top_k
    tiles = cut(offsets_E1, order_S.shape[0])
    dz_SJ, as_SI, ds_S = launch_down_backward(grad_TH, inputs, kept, tiles)
    gradients = [x_TH.new_empty(0)] * 7
    inverse_S = invert(order_S)
    if needs[0]:
        dx_SH = launch_rows(dz_SJ, up_EJH, None, offsets_E1, tiles)
        gradients[0] = launch_combine(dx_SH, None, inverse_S, offsets_E1, x_TH.shape[0])
        del dx_SH  # the gathered rows below take its memory
    if needs[2]:
        ds_TK = torch.where(inverse_S < offsets_E1[-1], ds_S[inverse_S], 0).view_as(weights_TK)
        if down_bias_EH is not None:
            ds_TK += _bias_scores(grad_TH, down_bias_EH, expert_ids_TK)
        gradients[2] = ds_TK.to(weights_TK.dtype)
    if needs[3]:
        gradients[3] = launch_weights(dz_SJ, launch_gather(x_TH, order_S, offsets_E1, top_k), offsets_E1)
    if needs[4]:
        gradients[4] = launch_weights(launch_gather(grad_TH, order_S, offsets_E1, top_k), as_SI, offsets_E1)
    if needs[5]:
        gradients[5] = launch_bias(dz_SJ, None, order_S, offsets_E1, top_k)
    if needs[6]:
        gradients[6] = launch_bias(grad_TH, weights_TK, order_S, offsets_E1, top_k)
    return gradients


def grouped_linear_forward(x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Compute what `moeify.kernels.ops.grouped_linear` says."""
    return launch_rows(x_SH, w_ENH.transpose(1, 2), b_EN, offsets_E1, cut(offsets_E1, x_SH.shape[0]), fill=True)


def grouped_linear_backward(
    grad_SN: Tensor, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of the four inputs of the forward pass, an empty tensor for each that `needs` leaves out."""
    gradients = [x_SH.new_empty(0)] * 4
    if needs[0]:
        gradients[0] = launch_rows(grad_SN, w_ENH, None, offsets_E1, cut(offsets_E1, x_SH.shape[0]), fill=True)
    if needs[1]:
        gradients[1] = launch_weights(grad_SN, x_SH, offsets_E1)
    if needs[2]:
        gradients[2] = launch_bias(grad_SN, None, offsets_E1, offsets_E1, 1)
    return gradients


def cut(offsets_E1: Tensor, choices: int) -> TileMap:
    """Cut sorted rows into tiles, as high as an expert's share of them asks for: one map serves all of a layer."""
    return tile_map(offsets_E1, choices, row_tile(choices, offsets_E1.shape[0] - 1))


def _options(kernel: str, m: int, n: int, k: int, *blocks: Tensor) -> dict[str, Any]:
    """Return the compile-time arguments of a matrix product: tile, schedule and precision.

    Args:
        kernel: Its name in the table of tiles.
        m: Rows of a tile.
        n: Columns of the result.
        k: Elements that are summed.
        blocks: What is read by tensor descriptor if the tile says so and their strides allow it.
    """
    dtype = blocks[0].dtype
    tile = tuned_tiles.pick(kernel, m, n, k, dtype.itemsize)
    tma = tile.tma and has_tma() and all(map(_has_blocks, blocks))
    return _schedule(tile, product_precision(dtype), tma, kernel == "rows")


@cache
def _schedule(tile: Tile, precision: str, tma: bool, rows: bool) -> dict[str, Any]:
    return {
        "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": tile.group_m, "PRECISION": precision, "TMA": tma,
        "num_warps": tile.warps, "num_stages": tile.stages,
        **({"PERSISTENT": tile.persistent and tma} if rows else {}),
    }  # fmt: skip


def _has_blocks(t: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: a dense last dimension, all else in steps of 16 bytes."""
    steps = [t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:-1])]
    return t.numel() > 0 and t.stride(-1) == 1 and 0 not in steps[1:] and all(step % 16 == 0 for step in steps)


def _blocks(t: Tensor, tma: bool, *block: int) -> Any:
    return TensorDescriptor.from_tensor(t, list(block)) if tma else t


def _stored(w_EKN: Tensor) -> tuple[Tensor, bool]:
    """Return stacked weights with the dense dimension last, and whether that is K."""
    k_major = w_EKN.stride(1) == 1
    return (w_EKN.transpose(1, 2) if k_major else w_EKN), k_major


def _weight(stored: Tensor, k_major: bool, options: dict[str, Any]) -> Any:
    """Return what a kernel gets for stacked weights: a tensor, or a descriptor of its blocks."""
    n, k = options["BN"], options["BK"]
    return _blocks(stored, options["TMA"], 1, *((n, k) if k_major else (k, n)))


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _within_reach(t: Tensor) -> Tensor:
    """Copy a matrix (or a stack of them) so spread out that 32 bits do not hold the offsets within one tile."""
    return t.contiguous() if WIDEST * sum(t.stride()[-2:]) >= 1 << 31 else t


def launch_up(
    inputs: ExpertInputs, order_S: Tensor, offsets_E1: Tensor, tiles: TileMap, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return the pre-activation `z_SJ`, without rows unless `keep`, and the activation `a_SI`."""
    x_TH, up_EJH, activation, gated = _unit_stride(inputs.x_TH), _within_reach(inputs.up_EJH), *inputs[-2:]
    bias = up_EJH if inputs.up_bias_EJ is None else _unit_stride(inputs.up_bias_EJ)
    (_, rows, hidden), choices, count = up_EJH.shape, order_S.shape[0], tiles.expert_L.shape[0]
    intermediate = rows // 2 if gated else rows
    z_SJ, a_SI = x_TH.new_empty(choices if keep else 0, rows), x_TH.new_empty(choices, intermediate)
    stored, k_major = _stored(up_EJH.transpose(1, 2))
    options = _options("up", tiles.block_m, intermediate, hidden, stored)
    up_kernel[(count * triton.cdiv(intermediate, options["BN"]),)](
        x_TH, _weight(stored, k_major, options), bias, order_S, offsets_E1, tiles.expert_L, tiles.row_L, z_SJ, a_SI,
        count, x_TH.stride(0), *up_EJH.stride(), bias.stride(0),
        HIDDEN=hidden, INTERMEDIATE=intermediate, TOP_K=inputs.top_k, ACTIVATION=activation, GATED=gated,
        HAS_BIAS=inputs.up_bias_EJ is not None, KEEP=keep, K_MAJOR=k_major, EVEN=hidden % options["BK"] == 0, **options,
    )  # fmt: skip
    return z_SJ, a_SI


def launch_rows(
    p_SK: Tensor, w_EKN: Tensor, bias_EN: Tensor | None, offsets_E1: Tensor, tiles: TileMap, fill: bool = False
) -> Tensor:
    """Multiply each row with the weight of its expert; rows of no expert are zero if `fill`, else not written."""
    p_SK, w_EKN = _within_reach(_unit_stride(p_SK)), _within_reach(w_EKN)
    (experts, depth, width), choices, count = w_EKN.shape, p_SK.shape[0], tiles.expert_L.shape[0]
    bias = w_EKN if bias_EN is None else _unit_stride(bias_EN)
    y_SN = (p_SK.new_zeros if fill else p_SK.new_empty)(choices, width)
    stored, k_major = _stored(w_EKN)
    options = _options("rows", tiles.block_m, width, depth, stored, p_SK)
    programs = count * triton.cdiv(width, options["BN"])
    if options["PERSISTENT"]:
        options, programs = {**options, "PERSISTENT": experts}, min(programs, multiprocessors(p_SK.device))
    rows_kernel[(programs,)](
        _blocks(p_SK, options["TMA"], options["BM"], options["BK"]), _weight(stored, k_major, options), bias,
        offsets_E1, tiles.expert_L, tiles.row_L, y_SN, count, p_SK.stride(0), *w_EKN.stride(), bias.stride(0),
        depth=depth, N=width, HAS_BIAS=bias_EN is not None, K_MAJOR=k_major, EVEN=depth % options["BK"] == 0, **options,
    )  # fmt: skip
    return y_SN


def launch_down_backward(
    grad_TH: Tensor, inputs: ExpertInputs, kept: Kept, tiles: TileMap
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(dz_SJ, weight * a_SI, dweight_S)`; the last is fp32 and lacks the part of the down bias."""
    down_EHI, (z_SJ, order_S, offsets_E1) = _within_reach(inputs.down_EHI), kept
    (_, hidden, intermediate), choices, count = down_EHI.shape, order_S.shape[0], tiles.expert_L.shape[0]
    stored, k_major = _stored(down_EHI)
    options = _options("down_backward", tiles.block_m, intermediate, hidden, stored)
    columns = triton.cdiv(intermediate, options["BN"])
    dz_SJ, as_SI = torch.empty_like(z_SJ), z_SJ.new_empty(choices, intermediate)
    partial = z_SJ.new_empty((choices, columns), dtype=torch.float32)
    down_backward_kernel[(count * columns,)](
        grad_TH, _weight(stored, k_major, options), z_SJ, inputs.weights_TK, order_S, offsets_E1, tiles.expert_L,
        tiles.row_L, dz_SJ, as_SI, partial, count, grad_TH.stride(0), *down_EHI.stride(), depth=hidden,
        INTERMEDIATE=intermediate, TOP_K=inputs.top_k, ACTIVATION=inputs.activation, GATED=inputs.gated,
        K_MAJOR=k_major, EVEN=hidden % options["BK"] == 0, **options,
    )  # fmt: skip
    return dz_SJ, as_SI, partial.sum(1)


def launch_weights(left_SM: Tensor, right_SN: Tensor, offsets_E1: Tensor) -> Tensor:
    """Return the gradient of stacked weights, (E, M, N), from rows that are sorted by expert."""
    left_SM, right_SN, experts = _unit_stride(left_SM), _unit_stride(right_SN), offsets_E1.shape[0] - 1
    m, n = left_SM.shape[1], right_SN.shape[1]
    options = _options("weights", 128, m, n, left_SM, right_SN)
    depth, tma = options["BK"], options["TMA"]
    dw_EMN = left_SM.new_empty(experts, m, n)
    weights_kernel[(triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]), experts)](
        left_SM, right_SN, _blocks(left_SM, tma, depth, options["BM"]), _blocks(right_SN, tma, depth, options["BN"]),
        offsets_E1, dw_EMN, left_SM.stride(0), right_SN.stride(0), M=m, N=n, **options,
    )  # fmt: skip
    return dw_EMN


def launch_gather(x_TN: Tensor, order_S: Tensor, offsets_E1: Tensor, top_k: int) -> Tensor:
    """Return the token of each sorted row, (S, N); rows of no expert are not written."""
    x_TN, (choices,) = _unit_stride(x_TN), order_S.shape
    width, out_SN = x_TN.shape[1], x_TN.new_empty(choices, x_TN.shape[1])
    gather_kernel[(triton.cdiv(choices, 16), triton.cdiv(width, 256))](
        x_TN, order_S, offsets_E1[-1:], out_SN, x_TN.stride(0), N=width, TOP_K=top_k, BM=16, BN=256
    )
    return out_SN


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
