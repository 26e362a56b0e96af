"""Matrix products over rows sorted by expert, in Triton: those that an FFN and its gradients need.

The dataflow is SonicMoE's (arXiv:2512.14080). Rules kept by every kernel: int32 metadata and int64 addresses; fp32
accumulators, one `tl.dot` per accumulator and iteration (two chained into one are miscompiled for sm_100 by Triton 3.6
to 3.8); arithmetic in fp32; no atomics. Rows past the end of an expert read its last row again, so inner loops need
masks only where a width is not a multiple of the tile (EVEN says that the summed one is). Addresses in loops are a
64-bit base per tile plus 32-bit offsets within it. HIDDEN is a constant, which saves registers; `depth` is not, for the
compiler would unroll its loop whole.

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, M and N tiles of the output, K (in BK) the dimension that is summed.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from moeify.kernels.gpu.math import activate, swizzle


@triton.jit
def up_kernel(
    X, W, BIAS, ORDER, OFFSETS, TILE_EXPERT, TILE_ROW, Z, A, tiles, stride_x, stride_we, stride_wn, stride_wk, stride_b,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A_SI = act(Z) or act(gate) * up, where Z_SJ = X[token] W_EJH^T + bias. Z is written if KEEP.

    Grid: (tiles * cdiv(INTERMEDIATE, BN),).
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tiles, tl.cdiv(INTERMEDIATE, BN), GROUP_M)
    expert = tl.load(TILE_EXPERT + pid_m)
    if expert >= 0:
        end = tl.load(OFFSETS + expert + 1)
        row = tl.load(TILE_ROW + pid_m) + tl.arange(0, BM)
        token = (tl.load(ORDER + tl.minimum(row, end - 1)) // TOP_K).to(tl.int64)
        col = pid_n * BN + tl.arange(0, BN)
        n = tl.minimum(tl.arange(0, BN), INTERMEDIATE - 1 - pid_n * BN) if INTERMEDIATE % BN else tl.arange(0, BN)
        k = tl.arange(0, BK)
        x_ptr = X + token[:, None] * stride_x + k[None, :]
        gate_base = W + expert.to(tl.int64) * stride_we + (pid_n * BN).to(tl.int64) * stride_wn
        up_base = gate_base + tl.full((), INTERMEDIATE, tl.int64) * stride_wn
        w_tile = n[None, :] * stride_wn + k[:, None] * stride_wk
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, HIDDEN, BK):
            x = tl.load(x_ptr) if EVEN else tl.load(x_ptr, mask=k[None, :] < HIDDEN - k0, other=0.0)
            gate_ptr = gate_base + w_tile
            w = tl.load(gate_ptr) if EVEN else tl.load(gate_ptr, mask=k[:, None] < HIDDEN - k0, other=0.0)
            gate = tl.dot(x, w, gate, input_precision=PRECISION)
            if GATED:
                up_ptr = up_base + w_tile
                u = tl.load(up_ptr) if EVEN else tl.load(up_ptr, mask=k[:, None] < HIDDEN - k0, other=0.0)
                up = tl.dot(x, u, up, input_precision=PRECISION)
                up_base += BK * stride_wk
            x_ptr += BK
            gate_base += BK * stride_wk
        if HAS_BIAS:
            bias_ptr = BIAS + expert.to(tl.int64) * stride_b + pid_n * BN + n
            gate += tl.load(bias_ptr)[None, :].to(tl.float32)
            if GATED:
                up += tl.load(bias_ptr + INTERMEDIATE)[None, :].to(tl.float32)
        mask = (row < end)[:, None] & (col < INTERMEDIATE)[None, :]
        row64 = row.to(tl.int64)[:, None]
        if KEEP:
            z_ptr = Z + row64 * (2 * INTERMEDIATE if GATED else INTERMEDIATE) + col[None, :]
            tl.store(z_ptr, gate.to(Z.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(z_ptr + INTERMEDIATE, up.to(Z.dtype.element_ty), mask=mask)
        a, _ = activate(gate, ACTIVATION)
        if GATED:
            a *= up
        tl.store(A + row64 * INTERMEDIATE + col[None, :], a.to(A.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    P, W, BIAS, OFFSETS, TILE_EXPERT, TILE_ROW, Y, tiles, stride_p, stride_we, stride_wk, stride_wn, stride_b,
    depth, N: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y_SN = P_S W_E + bias, with W_E (depth, N) by strides: the down projection, dX, and any grouped linear layer.

    Grid: (tiles * cdiv(N, BN),).
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP_M)
    expert = tl.load(TILE_EXPERT + pid_m)
    if expert >= 0:
        end = tl.load(OFFSETS + expert + 1)
        first = tl.load(TILE_ROW + pid_m)
        m = tl.arange(0, BM)
        row = first + m
        col = pid_n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        p_base = P + first.to(tl.int64) * stride_p
        p_tile = tl.minimum(m, end - 1 - first)[:, None] * stride_p + k[None, :]
        w_base = W + expert.to(tl.int64) * stride_we + (pid_n * BN).to(tl.int64) * stride_wn
        w_tile = k[:, None] * stride_wk + tl.arange(0, BN)[None, :] * stride_wn
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, depth, BK):
            p_ptr = p_base + p_tile
            p = tl.load(p_ptr) if EVEN else tl.load(p_ptr, mask=k[None, :] < depth - k0, other=0.0)
            w_ptr = w_base + w_tile
            if not EVEN:
                w = tl.load(w_ptr, mask=(k[:, None] < depth - k0) & (col[None, :] < N), other=0.0)
            elif N % BN:
                w = tl.load(w_ptr, mask=col[None, :] < N, other=0.0)
            else:
                w = tl.load(w_ptr)
            acc = tl.dot(p, w, acc, input_precision=PRECISION)
            p_base += BK
            w_base += BK * stride_wk
        if HAS_BIAS:
            acc += tl.load(BIAS + expert.to(tl.int64) * stride_b + col, mask=col < N, other=0.0)[None, :].to(tl.float32)
        mask = (row < end)[:, None] & (col < N)[None, :]
        y_ptr = Y + first.to(tl.int64) * N + pid_n * BN + (m[:, None] * N + tl.arange(0, BN)[None, :])
        tl.store(y_ptr, acc.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def down_backward_kernel(
    DO, W, Z, WEIGHTS, ORDER, OFFSETS, TILE_EXPERT, TILE_ROW, DZ, AS, DS, tiles,
    stride_do, stride_we, stride_wk, stride_wn,
    depth, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From dA' = dO[token] W_EHI, before the routing weight s: dZ, s * A, and partial sums of ds = <dA', A>.

    A is computed again from Z. DS is (S, cdiv(INTERMEDIATE, BN)): one partial sum per tile, to be summed in order.
    Grid: (tiles * cdiv(INTERMEDIATE, BN),).
    """
    tiles_n = tl.cdiv(INTERMEDIATE, BN)
    pid_m, pid_n = swizzle(tl.program_id(0), tiles, tiles_n, GROUP_M)
    expert = tl.load(TILE_EXPERT + pid_m)
    if expert >= 0:
        end = tl.load(OFFSETS + expert + 1)
        first = tl.load(TILE_ROW + pid_m)
        m = tl.arange(0, BM)
        row = first + m
        choice = tl.load(ORDER + tl.minimum(row, end - 1))
        col = pid_n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        do_ptr = DO + (choice // TOP_K).to(tl.int64)[:, None] * stride_do + k[None, :]
        w_base = W + expert.to(tl.int64) * stride_we + (pid_n * BN).to(tl.int64) * stride_wn
        w_tile = k[:, None] * stride_wk + tl.arange(0, BN)[None, :] * stride_wn
        da = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, depth, BK):
            do = tl.load(do_ptr) if EVEN else tl.load(do_ptr, mask=k[None, :] < depth - k0, other=0.0)
            w_ptr = w_base + w_tile
            if not EVEN:
                w = tl.load(w_ptr, mask=(k[:, None] < depth - k0) & (col[None, :] < INTERMEDIATE), other=0.0)
            elif INTERMEDIATE % BN:
                w = tl.load(w_ptr, mask=col[None, :] < INTERMEDIATE, other=0.0)
            else:
                w = tl.load(w_ptr)
            da = tl.dot(do, w, da, input_precision=PRECISION)
            do_ptr += BK
            w_base += BK * stride_wk
        live = row < end
        mask = live[:, None] & (col < INTERMEDIATE)[None, :]
        s = tl.load(WEIGHTS + choice).to(tl.float32)[:, None]
        width = 2 * INTERMEDIATE if GATED else INTERMEDIATE
        base = first.to(tl.int64) * width + pid_n * BN
        tile = m[:, None] * width + tl.arange(0, BN)[None, :]
        gate = tl.load(Z + base + tile, mask=mask, other=0.0).to(tl.float32)
        a, slope = activate(gate, ACTIVATION)
        if GATED:
            up = tl.load(Z + base + INTERMEDIATE + tile, mask=mask, other=0.0).to(tl.float32)
            tl.store(DZ + base + INTERMEDIATE + tile, (s * da * a).to(DZ.dtype.element_ty), mask=mask)
            a *= up
            slope *= up
        tl.store(DZ + base + tile, (s * da * slope).to(DZ.dtype.element_ty), mask=mask)
        as_tile = m[:, None] * INTERMEDIATE + tl.arange(0, BN)[None, :]
        as_ptr = AS + first.to(tl.int64) * INTERMEDIATE + pid_n * BN + as_tile
        tl.store(as_ptr, (s * a).to(AS.dtype.element_ty), mask=mask)
        ds = tl.sum(tl.where(mask, da * a, 0.0), 1)
        tl.store(DS + row.to(tl.int64) * tiles_n + pid_n, ds, mask=live)


@triton.jit
def weights_kernel(
    L, R, ORDER, OFFSETS, DW, stride_l, stride_r,
    M: tl.constexpr, N: tl.constexpr, GATHER_L: tl.constexpr, GATHER_R: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DW_EMN[e] = sum over the rows r of expert e of L[r]^T R[r]; an expert without rows gets zeros.

    Rows of L or R are tokens to be gathered where GATHER says so. Grid: (cdiv(M, BM) * cdiv(N, BN), E).
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    expert = tl.program_id(1)
    start = tl.load(OFFSETS + expert)
    end = tl.load(OFFSETS + expert + 1)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for r0 in range(start, end, BK):
        row = r0 + tl.arange(0, BK)
        live = row < end
        row_l = row.to(tl.int64)
        row_r = row_l
        if GATHER_L or GATHER_R:
            token = (tl.load(ORDER + row, mask=live, other=0) // TOP_K).to(tl.int64)
            if GATHER_L:
                row_l = token
            else:
                row_r = token
        l_mask = live[None, :] & (m < M)[:, None] if M % BM else live[None, :]
        r_mask = live[:, None] & (n < N)[None, :] if N % BN else live[:, None]
        left = tl.load(L + row_l[None, :] * stride_l + m[:, None], mask=l_mask, other=0.0)
        right = tl.load(R + row_r[:, None] * stride_r + n[None, :], mask=r_mask, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    dw_ptr = DW + expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(dw_ptr, acc.to(DW.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def bias_kernel(
    L, WEIGHTS, ORDER, OFFSETS, DB, stride_l,
    N: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, TOP_K: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """DB_EN[e] = sum over the rows r of expert e of L[r], or of weight * L[token]. Grid: (cdiv(N, BN), E)."""
    expert = tl.program_id(1)
    end = tl.load(OFFSETS + expert + 1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BK, BN), tl.float32)
    for r0 in range(tl.load(OFFSETS + expert), end, BK):
        row = r0 + tl.arange(0, BK)
        live = row < end
        source = row
        if GATHER or WEIGHTED:
            choice = tl.load(ORDER + row, mask=live, other=0)
            if GATHER:
                source = choice // TOP_K
        mask = live[:, None] & (n < N)[None, :]
        value = tl.load(L + source.to(tl.int64)[:, None] * stride_l + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(WEIGHTS + choice, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += value
    tl.store(DB + expert.to(tl.int64) * N + n, tl.sum(acc, 0).to(DB.dtype.element_ty), mask=n < N)


@triton.jit
def combine_kernel(
    Y, WEIGHTS, INVERSE, VALID, OUT,
    N: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """OUT_TN[t] = sum over k of weight * Y_SN[inverse[t, k]], but for rows from VALID[0] on. Grid: (T, cdiv(N, BN))."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    valid = tl.load(VALID)
    acc = tl.zeros((BN,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(INVERSE + token * TOP_K + k)
        width = tl.where(row < valid, N, 0)
        value = tl.load(Y + row.to(tl.int64) * N + n, mask=n < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(WEIGHTS + token * TOP_K + k).to(tl.float32)
            value *= tl.where(row < valid, weight, 0.0)
        acc += value
    tl.store(OUT + token * N + n, acc.to(OUT.dtype.element_ty), mask=n < N)
