"""Block-sparse products in Triton: sdd (sparse = dense x dense), dsd (dense = sparse x dense) and dds.

Transposed operands are views: pass `a.t()`. A transposed sparse operand is `transpose=True`.

Shape legend: S sorted rows, E experts, F columns per expert, B block size, N blocks, G block columns of one expert,
K summed dimension, M free dimension of the dense operand.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.topology import BlockTopology


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
            s = tl.load(data + (c0 // BLOCK) * (BLOCK * BLOCK) + c0 % BLOCK)
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
    acc = tl.zeros((BLOCK, BN), tl.float32)
    for entry in range(tl.load(COLUMN_OFFSETS + column), tl.load(COLUMN_OFFSETS + column + 1)):
        block = tl.load(COLUMN_BLOCKS + entry)
        first = tl.load(FIRST_ROW + tl.load(ROW + block))
        data = DATA + block.to(tl.int64) * (BLOCK * BLOCK) + inside[:, None] + k[None, :] * BLOCK
        for k0 in range(0, BLOCK, BK):
            row = first + k0 + k
            s = tl.load(data + k0 * BLOCK)
            d_ptr = dense + row.to(tl.int64)[:, None] * stride_dk
            d = tl.load(d_ptr, mask=(row < end)[:, None] & (m < M)[None, :], other=0.0)
            acc = tl.dot(s, d, acc, input_precision=PRECISION)
    col = (column % G) * BLOCK + inside
    out = OUT + (expert * F + col).to(tl.int64)[:, None] * stride_om + m.to(tl.int64)[None, :] * stride_on
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(col < F)[:, None] & (m < M)[None, :])


def sdd(a_SK: Tensor, b_KC: Tensor, topology: BlockTopology) -> Tensor:
    """Return the filled blocks of a @ b, (N, B, B) in a's dtype; what lies outside an expert's rows or columns is zero.

    Args:
        a_SK: (S, K), any strides.
        b_KC: (K, E*F), any strides.
        topology: where the blocks are.

    Raises:
        ValueError: shapes that do not fit the topology.
    """
    _check("a", a_SK, (topology.rows, a_SK.shape[1]))
    _check("b", b_KC, (a_SK.shape[1], topology.experts * topology.columns))
    data_NBB = a_SK.new_empty(topology.blocks, topology.block, topology.block)
    sdd_kernel[(topology.blocks,)](
        a_SK, b_KC, topology.offsets_E1, topology.expert_L, topology.first_row_L, topology.row_N, topology.column_N,
        data_NBB, *a_SK.stride(), *b_KC.stride(), a_SK.shape[1],
        F=topology.columns, G=topology.expert_blocks, BLOCK=topology.block, BK=32, **_options(a_SK, topology),
    )  # fmt: skip
    return data_NBB


def dsd(data_NBB: Tensor, dense: Tensor, topology: BlockTopology, *, transpose: bool = False) -> Tensor:
    """Return sparse @ dense, (S, M), or with `transpose` sparse^T @ dense, (E*F, M), in the dtype of the data.

    Args:
        data_NBB: (N, B, B) blocks, as `sdd` returns them.
        dense: (E*F, M), or (S, M) with `transpose`; any strides.
        topology: where the blocks are.
        transpose: whether the sparse operand is transposed.

    Raises:
        ValueError: shapes that do not fit the topology.
    """
    width = topology.experts * topology.columns
    _check("data", data_NBB, (topology.blocks, topology.block, topology.block))
    _check("dense", dense, (topology.rows if transpose else width, dense.shape[1]))
    out = data_NBB.new_zeros(width if transpose else topology.rows, dense.shape[1])
    _dsd(data_NBB.contiguous(), dense, out, topology, transpose)
    return out


def dds(dense: Tensor, data_NBB: Tensor, topology: BlockTopology, *, transpose: bool = False) -> Tensor:
    """Return dense @ sparse, (M, E*F), or with `transpose` dense @ sparse^T, (M, S): `dsd` seen from the other side.

    Args:
        dense: (M, S), or (M, E*F) with `transpose`; any strides.
        data_NBB: (N, B, B) blocks, as `sdd` returns them.
        topology: where the blocks are.
        transpose: whether the sparse operand is transposed.

    Raises:
        ValueError: shapes that do not fit the topology.
    """
    width = topology.experts * topology.columns
    _check("data", data_NBB, (topology.blocks, topology.block, topology.block))
    _check("dense", dense, (dense.shape[0], width if transpose else topology.rows))
    out = data_NBB.new_zeros(dense.shape[0], topology.rows if transpose else width)
    _dsd(data_NBB.contiguous(), dense.t(), out.t(), topology, not transpose)
    return out


def _dsd(data_NBB: Tensor, dense: Tensor, out: Tensor, topology: BlockTopology, transpose: bool) -> None:
    options = _options(data_NBB, topology)
    options |= {"F": topology.columns, "G": topology.expert_blocks, "BLOCK": topology.block, "BN": 64}
    options["BK"] = min(topology.block, 32)
    columns = triton.cdiv(dense.shape[1], 64)
    strides = (*dense.stride(), *out.stride(), dense.shape[1])
    if transpose:
        dsd_transposed_kernel[(topology.offsets_C1.shape[0] - 1, columns)](
            data_NBB, dense, topology.offsets_E1, topology.first_row_L, topology.row_N, topology.offsets_C1,
            topology.block_N, out, *strides, **options,
        )  # fmt: skip
    else:
        dsd_kernel[(topology.expert_L.shape[0], columns)](
            data_NBB, dense, topology.offsets_E1, topology.expert_L, topology.first_row_L, out, *strides, **options
        )


def _options(data: Tensor, topology: BlockTopology) -> dict[str, object]:
    tf32 = data.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "num_warps": 8 if topology.block > 64 else 4, "num_stages": 3}


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}; build the topology for these rows")
