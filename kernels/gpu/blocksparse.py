"""Block-sparse products in Triton: sdd (sparse = dense x dense), dsd (dense = sparse x dense) and dds.

Transposed operands are views: pass `a.t()`. A transposed sparse operand is `transpose=True`.

Shape legend: S sorted rows, E experts, F columns per expert, B block size, N blocks, G block columns of one expert,
K summed dimension, M free dimension of the dense operand.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.checks import check_dtypes, check_shape
from moeify.kernels.gpu.target import interpreted, product_precision
from moeify.kernels.gpu.tiles import Tile, block_tile
from moeify.kernels.topology import BlockTopology

WIDTH = 64  # columns of the result of dsd that one program computes, at most
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def sdd_kernel(
    A, B, OFFSETS, EXPERT, FIRST_ROW, ROW, COLUMN, DATA, stride_am, stride_ak, stride_bk, stride_bn, K,
    F: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DATA_NBB[n] = the block (row[n], column[n]) of A_SK B_K(EF). Grid: (N,)."""
    block = tl.program_id(0)
    block_row = tl.load(ROW + block)
    inside = tl.arange(0, BLOCK)
    out = DATA + block.to(tl.int64) * (BLOCK * BLOCK) + inside[:, None] * BLOCK + inside[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    if block_row >= 0:
        expert = tl.load(EXPERT + block_row)
        end = tl.load(OFFSETS + expert + 1)
        row = tl.load(FIRST_ROW + block_row) + inside
        col = (tl.load(COLUMN + block) - expert * G) * BLOCK + inside
        k = tl.arange(0, BK)
        a_ptr = A + row.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak
        b_ptr = B + k.to(tl.int64)[:, None] * stride_bk + (expert * F + col).to(tl.int64)[None, :] * stride_bn
        for k0 in range(0, K, BK):
            a = tl.load(a_ptr, mask=(row < end)[:, None] & (k < K - k0)[None, :], other=0.0)
            b = tl.load(b_ptr, mask=(k < K - k0)[:, None] & (col < F)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptr += BK * stride_ak
            b_ptr += BK * stride_bk
    tl.store(out, acc.to(DATA.dtype.element_ty))


@triton.jit
def dsd_kernel(
    DATA, D, OFFSETS, EXPERT, FIRST_ROW, OUT, stride_dk, stride_dm, stride_om, stride_on, M,
    F: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_SM = sparse_S(EF) D_(EF)M: one program per block row and BN columns of D. Grid: (L, cdiv(M, BN))."""
    block_row = tl.program_id(0)
    expert = tl.load(EXPERT + block_row)
    if expert >= 0:
        end = tl.load(OFFSETS + expert + 1)
        inside, k = tl.arange(0, BLOCK), tl.arange(0, BK)
        row = tl.load(FIRST_ROW + block_row) + inside
        m = tl.program_id(1) * BN + tl.arange(0, BN)
        data = DATA + block_row.to(tl.int64) * G * (BLOCK * BLOCK) + inside[:, None] * BLOCK + k[None, :]
        dense = D + m.to(tl.int64)[None, :] * stride_dm
        acc = tl.zeros((BLOCK, BN), tl.float32)
        for c0 in range(0, G * BLOCK, BK):
            col = c0 + k
            s_ptr = data + (c0 // BLOCK) * (BLOCK * BLOCK) + c0 % BLOCK
            s = tl.load(s_ptr, mask=(row < end)[:, None] & (col < F)[None, :], other=0.0)
            d_ptr = dense + (expert * F + col).to(tl.int64)[:, None] * stride_dk
            d = tl.load(d_ptr, mask=(col < F)[:, None] & (m < M)[None, :], other=0.0)
            acc = tl.dot(s, d, acc, input_precision=PRECISION)
        out = OUT + row.to(tl.int64)[:, None] * stride_om + m.to(tl.int64)[None, :] * stride_on
        tl.store(out, acc.to(OUT.dtype.element_ty), mask=(row < end)[:, None] & (m < M)[None, :])


@triton.jit
def dsd_transposed_kernel(
    DATA, D, OFFSETS, FIRST_ROW, ROW, COLUMN_OFFSETS, COLUMN_BLOCKS, OUT, stride_dk, stride_dm, stride_om, stride_on, M,
    F: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_(EF)M = sparse^T D_SM: one program per block column and BN columns of D. Grid: (C, cdiv(M, BN))."""
    column = tl.program_id(0)
    expert = column // G
    end = tl.load(OFFSETS + expert + 1)
    inside, k = tl.arange(0, BLOCK), tl.arange(0, BK)
    m = tl.program_id(1) * BN + tl.arange(0, BN)
    dense = D + m.to(tl.int64)[None, :] * stride_dm
    col = (column % G) * BLOCK + inside
    acc = tl.zeros((BLOCK, BN), tl.float32)
    for entry in range(tl.load(COLUMN_OFFSETS + column), tl.load(COLUMN_OFFSETS + column + 1)):
        block = tl.load(COLUMN_BLOCKS + entry)
        first = tl.load(FIRST_ROW + tl.load(ROW + block))
        data = DATA + block.to(tl.int64) * (BLOCK * BLOCK) + inside[:, None] + k[None, :] * BLOCK
        for k0 in range(0, BLOCK, BK):
            row = first + k0 + k
            s = tl.load(data + k0 * BLOCK, mask=(col < F)[:, None] & (row < end)[None, :], other=0.0)
            d_ptr = dense + row.to(tl.int64)[:, None] * stride_dk
            d = tl.load(d_ptr, mask=(row < end)[:, None] & (m < M)[None, :], other=0.0)
            acc = tl.dot(s, d, acc, input_precision=PRECISION)
    out = OUT + (expert * F + col).to(tl.int64)[:, None] * stride_om + m.to(tl.int64)[None, :] * stride_on
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(col < F)[:, None] & (m < M)[None, :])


def sdd(a_SK: Tensor, b_KC: Tensor, topology: BlockTopology) -> Tensor:
    """Return the filled blocks of a @ b, (N, B, B); what lies outside an expert's rows or columns is zero.

    Differentiable, any number of times: its gradients are a `dsd` and a `dds`.

    Args:
        a_SK: (S, K), float32, float16 or bfloat16, any strides.
        b_KC: (K, E*F) in a's dtype, any strides.
        topology: Where the blocks are.

    Raises:
        ValueError: Shapes do not fit the topology, dtypes differ, or the device has no Triton.
    """
    check_shape("a", a_SK, (topology.rows, None))
    check_shape("b", b_KC, (a_SK.shape[1], topology.experts * topology.columns))
    _check_operands(("a", "b"), a_SK, b_KC)
    data_NBB: Tensor = _Sdd.apply(a_SK, b_KC, topology)  # type: ignore[no-untyped-call]
    return data_NBB


def dsd(data_NBB: Tensor, dense: Tensor, topology: BlockTopology, *, transpose: bool = False) -> Tensor:
    """Return sparse @ dense, (S, M), or with `transpose` sparse^T @ dense, (E*F, M).

    What the blocks hold outside an expert's rows or columns is not read. Differentiable, any number of times: its
    gradients are an `sdd` and a `dsd`.

    Args:
        data_NBB: (N, B, B) blocks, as `sdd` returns them.
        dense: (E*F, M), or (S, M) with `transpose`; in the dtype of the blocks, any strides.
        topology: Where the blocks are.
        transpose: Whether the sparse operand is transposed.

    Raises:
        ValueError: Shapes do not fit the topology, dtypes differ, or the device has no Triton.
    """
    check_shape("data", data_NBB, (topology.blocks, topology.block, topology.block))
    check_shape("dense", dense, (topology.rows if transpose else topology.experts * topology.columns, None))
    _check_operands(("data", "dense"), data_NBB, dense)
    out: Tensor = _Dsd.apply(data_NBB, dense, topology, transpose)  # type: ignore[no-untyped-call]
    return out


def dds(dense: Tensor, data_NBB: Tensor, topology: BlockTopology, *, transpose: bool = False) -> Tensor:
    """Return dense @ sparse, (M, E*F), or with `transpose` dense @ sparse^T, (M, S), as a transposed view.

    It is `dsd` seen from the other side: `dense` is (M, S), or (M, E*F) with `transpose`; the rest is said there.
    """
    check_shape("dense", dense, (None, topology.experts * topology.columns if transpose else topology.rows))
    return dsd(data_NBB, dense.t(), topology, transpose=not transpose).t()


class _Sdd(torch.autograd.Function):
    """The product and its autograd rule; the gradient of the blocks counts inside an expert's rows and columns."""

    @staticmethod
    def forward(ctx: Any, a_SK: Tensor, b_KC: Tensor, topology: BlockTopology) -> Tensor:
        ctx.save_for_backward(a_SK, b_KC)
        ctx.topology = topology
        data_NBB = a_SK.new_empty(topology.blocks, topology.block, topology.block)
        sdd_kernel[(topology.blocks,)](
            a_SK, b_KC, topology.offsets_E1, topology.expert_L, topology.first_row_L, topology.row_N,
            topology.column_N, data_NBB, *a_SK.stride(), *b_KC.stride(), a_SK.shape[1],
            F=topology.columns, G=topology.expert_blocks, BLOCK=topology.block,
            **_options(a_SK, block_tile(topology.block, topology.block, a_SK.dtype.itemsize)),
        )  # fmt: skip
        return data_NBB

    @staticmethod
    def backward(ctx: Any, grad_NBB: Tensor) -> tuple[Tensor | None, ...]:
        a_SK, b_KC = ctx.saved_tensors
        da_SK = dsd(grad_NBB, b_KC.t(), ctx.topology) if ctx.needs_input_grad[0] else None
        db_KC = dds(a_SK.t(), grad_NBB, ctx.topology) if ctx.needs_input_grad[1] else None
        return da_SK, db_KC, None


class _Dsd(torch.autograd.Function):
    """The product, transposed or not, and its autograd rule."""

    @staticmethod
    def forward(ctx: Any, data_NBB: Tensor, dense: Tensor, topology: BlockTopology, transpose: bool) -> Tensor:
        ctx.save_for_backward(data_NBB, dense)
        ctx.topology, ctx.transpose = topology, transpose
        data_NBB, rows = data_NBB.contiguous(), topology.experts * topology.columns if transpose else topology.rows
        out = data_NBB.new_zeros(rows, dense.shape[1])
        options = {"F": topology.columns, "G": topology.expert_blocks, "BLOCK": topology.block}
        tile = block_tile(topology.block, WIDTH, data_NBB.dtype.itemsize, halved=not transpose)
        options |= {"BN": tile.n} | _options(data_NBB, tile)
        columns, strides = triton.cdiv(dense.shape[1], tile.n), (*dense.stride(), *out.stride(), dense.shape[1])
        if transpose:
            dsd_transposed_kernel[(topology.offsets_C1.shape[0] - 1, columns)](
                data_NBB, dense, topology.offsets_E1, topology.first_row_L, topology.row_N, topology.offsets_C1,
                topology.block_N, out, *strides, **options,
            )  # fmt: skip
        else:
            dsd_kernel[(topology.expert_L.shape[0], columns)](
                data_NBB, dense, topology.offsets_E1, topology.expert_L, topology.first_row_L, out, *strides, **options
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data_NBB, dense = ctx.saved_tensors
        a, b = (dense, grad) if ctx.transpose else (grad, dense)
        ddata_NBB = sdd(a, b.t(), ctx.topology) if ctx.needs_input_grad[0] else None
        ddense = dsd(data_NBB, grad, ctx.topology, transpose=not ctx.transpose) if ctx.needs_input_grad[1] else None
        return ddata_NBB, ddense, None, None


def _options(data: Tensor, tile: Tile) -> dict[str, Any]:
    precision = product_precision(data.dtype)
    return {"BK": tile.k, "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages}


def _check_operands(names: tuple[str, str], tensor: Tensor, other: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{names[0]} has dtype {tensor.dtype}: expected float32, float16 or bfloat16; cast it")
    check_dtypes(names[0], tensor, {names[1]: other})
    if tensor.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"{names[0]} is on {tensor.device}: expected a GPU; use the dense product, or TRITON_INTERPRET=1 to try it"
        )
