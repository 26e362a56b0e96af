"""Matrix products over rows sorted by expert, in Triton: those that an FFN and its gradients need.

The dataflow is SonicMoE's (arXiv:2512.14080). Rules kept by every kernel: int32 metadata and int64 addresses; fp32
accumulators, one `tl.dot` per accumulator and iteration (two chained into one are miscompiled for sm_100 by Triton 3.6
to 3.8); arithmetic in fp32; no atomics. Rows past the end of an expert read its last row again or another expert's, so
inner loops need masks only where a width is not a multiple of the tile (EVEN says that the summed one is). Addresses in
loops are a 64-bit base per tile plus 32-bit offsets within it. HIDDEN is a constant, which saves registers; `depth` is
not, for the compiler would unroll its loop whole.

Where TMA is set, weights (and dense rows) are tensor descriptors instead of pointers: hardware copies whole blocks, and
reads zeros past the edges. A descriptor of weights has an expert a layer.

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, M and N tiles of the output, K (in BK) the dimension that is summed.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from moeify.kernels.gpu.math import activate, swizzle


@triton.jit
def load_weight(
    W, base, tile, expert, k0, col, depth, n_mask,
    K_MAJOR: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return the block (BK, BN) of an expert's weight at row `k0` and column `col`, zero past `depth`."""
    if TMA:
        w = W.load([expert, col, k0]).reshape(BN, BK).T if K_MAJOR else W.load([expert, k0, col]).reshape(BK, BN)
    elif not EVEN:
        k_mask = (tl.arange(0, BK) < depth - k0)[:, None]
        w = tl.load(base + tile, mask=k_mask & n_mask if MASKED else k_mask, other=0.0)
    elif MASKED:
        w = tl.load(base + tile, mask=n_mask, other=0.0)
    else:
        w = tl.load(base + tile)
    return w


@triton.jit
def multiply(
    X, x_tile, x_row, W, expert, col, depth, stride_we, stride_wk, stride_wn,
    N: tl.constexpr, PAIR: tl.constexpr, K_MAJOR: tl.constexpr, EVEN: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return X W_E (BM, BN), where X is read at `X + x_tile` or, by descriptor, from `x_row` on; the weight at `col`.

    With PAIR also the product with the weight N columns further on, which shares the loads of X.
    """
    MASKED: tl.constexpr = N % BN != 0 and not K_MAJOR
    k = tl.arange(0, BK)
    n = tl.arange(0, BN)
    n_mask = (n < N - col)[None, :]
    if N % BN and K_MAJOR:
        n = tl.minimum(n, N - 1 - col)  # the last column again instead of a mask in the loop
    first, first_tile, second = W, n, W
    if not W_TMA:
        first = W + expert.to(tl.int64) * stride_we + col.to(tl.int64) * stride_wn
        second = first + tl.full((), N, tl.int64) * stride_wn
        first_tile = k[:, None] * stride_wk + n[None, :] * stride_wn
    acc = tl.zeros((BM, BN), tl.float32)
    other = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, depth, BK):
        if X_TMA:
            x = X.load([x_row, k0])
        elif EVEN:
            x = tl.load(X + x_tile)
        else:
            x = tl.load(X + x_tile, mask=(k < depth - k0)[None, :], other=0.0)
        w = load_weight(W, first, first_tile, expert, k0, col, depth, n_mask, K_MAJOR, MASKED, EVEN, W_TMA, BN, BK)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if PAIR:
            w = load_weight(
                W, second, first_tile, expert, k0, col + N, depth, n_mask, K_MAJOR, MASKED, EVEN, W_TMA, BN, BK
            )
            other = tl.dot(x, w, other, input_precision=PRECISION)
        if not X_TMA:
            X += BK
        if not W_TMA:
            first += BK * stride_wk
            second += BK * stride_wk
    return acc, other


@triton.jit(do_not_specialize=["tiles"])
def up_kernel(
    X, W, BIAS, ORDER, OFFSETS, TILE_EXPERT, TILE_ROW, Z, A, tiles, stride_x, stride_we, stride_wn, stride_wk, stride_b,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, K_MAJOR: tl.constexpr, TMA: tl.constexpr,
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
        gate, up = multiply(
            X, token[:, None] * stride_x + tl.arange(0, BK)[None, :], 0, W, expert, pid_n * BN, HIDDEN,
            stride_we, stride_wk, stride_wn, INTERMEDIATE, GATED, K_MAJOR, EVEN, False, TMA, BM, BN, BK, PRECISION,
        )  # fmt: skip
        col = pid_n * BN + tl.arange(0, BN)
        live = col < INTERMEDIATE
        if HAS_BIAS:
            bias_ptr = BIAS + expert.to(tl.int64) * stride_b + col
            gate += tl.load(bias_ptr, mask=live, other=0.0)[None, :].to(tl.float32)
            if GATED:
                up += tl.load(bias_ptr + INTERMEDIATE, mask=live, other=0.0)[None, :].to(tl.float32)
        mask = (row < end)[:, None] & live[None, :]
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
def _rows_tile(
    P, W, BIAS, OFFSETS, TILE_ROW, Y, expert, pid_m, pid_n, stride_p, stride_we, stride_wk, stride_wn, stride_b,
    depth, N: tl.constexpr, HAS_BIAS: tl.constexpr, K_MAJOR: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of what `rows_kernel` computes."""
    end = tl.load(OFFSETS + expert + 1)
    first = tl.load(TILE_ROW + pid_m)
    m = tl.arange(0, BM)
    p_tile = tl.minimum(m, end - 1 - first)[:, None] * stride_p + tl.arange(0, BK)[None, :]
    acc, _ = multiply(
        P if TMA else P + first.to(tl.int64) * stride_p, p_tile, first, W, expert, pid_n * BN, depth,
        stride_we, stride_wk, stride_wn, N, False, K_MAJOR, EVEN, TMA, TMA, BM, BN, BK, PRECISION,
    )  # fmt: skip
    col = pid_n * BN + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(BIAS + expert.to(tl.int64) * stride_b + col, mask=col < N, other=0.0)[None, :].to(tl.float32)
    y_ptr = Y + (first + m).to(tl.int64)[:, None] * N + col[None, :]
    tl.store(y_ptr, acc.to(Y.dtype.element_ty), mask=(first + m < end)[:, None] & (col < N)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def rows_kernel(
    P, W, BIAS, OFFSETS, TILE_EXPERT, TILE_ROW, Y, tiles, stride_p, stride_we, stride_wk, stride_wn, stride_b,
    depth, N: tl.constexpr, HAS_BIAS: tl.constexpr, K_MAJOR: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Y_SN = P_S W_E + bias, with W_E (depth, N) by strides: the down projection, dX, and any grouped linear layer.

    Grid: (tiles * cdiv(N, BN),). With PERSISTENT, the number of experts, any number of programs take tiles by turns:
    both loops are one, in which the loads of the next tile come before the stores of this one.
    """
    tiles_n = tl.cdiv(N, BN)
    if PERSISTENT:
        live = live_tiles(OFFSETS, PERSISTENT, BM)
        for tile in tl.range(tl.program_id(0), live * tiles_n, tl.num_programs(0), flatten=True):
            pid_m, pid_n = swizzle(tile, live, tiles_n, GROUP_M)
            _rows_tile(
                P, W, BIAS, OFFSETS, TILE_ROW, Y, tl.load(TILE_EXPERT + pid_m), pid_m, pid_n,
                stride_p, stride_we, stride_wk, stride_wn, stride_b,
                depth, N, HAS_BIAS, K_MAJOR, TMA, EVEN, BM, BN, BK, PRECISION,
            )  # fmt: skip
    else:
        pid_m, pid_n = swizzle(tl.program_id(0), tiles, tiles_n, GROUP_M)
        expert = tl.load(TILE_EXPERT + pid_m)
        if expert >= 0:
            _rows_tile(
                P, W, BIAS, OFFSETS, TILE_ROW, Y, expert, pid_m, pid_n,
                stride_p, stride_we, stride_wk, stride_wn, stride_b,
                depth, N, HAS_BIAS, K_MAJOR, TMA, EVEN, BM, BN, BK, PRECISION,
            )  # fmt: skip


@triton.jit
def live_tiles(OFFSETS, EXPERTS: tl.constexpr, BM: tl.constexpr):
    """Return how many tiles of BM rows the experts' rows need; the tile map has these before the dead ones."""
    WIDE: tl.constexpr = triton.next_power_of_2(EXPERTS)
    e = tl.arange(0, WIDE)
    rows = tl.load(OFFSETS + e + 1, mask=e < EXPERTS, other=0) - tl.load(OFFSETS + e, mask=e < EXPERTS, other=0)
    return tl.sum((rows + BM - 1) // BM)


@triton.jit
def _through_activation(
    da, s, live, Z, DZ, AS, first, m, col,
    INTERMEDIATE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dZ and s * A of BN columns from `col` on; return their part of ds = <dA', A>.

    A wide tile is finished in parts of 32 columns, whose numbers fit into registers one after the other.
    """
    if BN >= 64:
        HALF: tl.constexpr = BN // 2
        left, right = tl.split(da.reshape(BM, 2, HALF).permute(0, 2, 1))  # columns that each thread holds: no copy
        ds = _through_activation(left, s, live, Z, DZ, AS, first, m, col, INTERMEDIATE, ACTIVATION, GATED, BM, HALF)
        ds += _through_activation(
            right, s, live, Z, DZ, AS, first, m, col + HALF, INTERMEDIATE, ACTIVATION, GATED, BM, HALF
        )
    else:
        n = tl.arange(0, BN)
        mask = live[:, None] & (n < INTERMEDIATE - col)[None, :]
        width = 2 * INTERMEDIATE if GATED else INTERMEDIATE
        base = first.to(tl.int64) * width + col
        tile = m[:, None] * width + n[None, :]
        gate = tl.load(Z + base + tile, mask=mask, other=0.0).to(tl.float32)
        a, slope = activate(gate, ACTIVATION)
        if GATED:
            up = tl.load(Z + base + INTERMEDIATE + tile, mask=mask, other=0.0).to(tl.float32)
            tl.store(DZ + base + INTERMEDIATE + tile, (s * da * a).to(DZ.dtype.element_ty), mask=mask)
            a *= up
            slope *= up
        tl.store(DZ + base + tile, (s * da * slope).to(DZ.dtype.element_ty), mask=mask)
        as_ptr = AS + first.to(tl.int64) * INTERMEDIATE + col + (m[:, None] * INTERMEDIATE + n[None, :])
        tl.store(as_ptr, (s * a).to(AS.dtype.element_ty), mask=mask)
        ds = tl.sum(tl.where(mask, da * a, 0.0), 1)
    return ds


@triton.jit(do_not_specialize=["tiles"])
def down_backward_kernel(
    DO, W, Z, WEIGHTS, ORDER, OFFSETS, TILE_EXPERT, TILE_ROW, DZ, AS, DS, tiles,
    stride_do, stride_we, stride_wk, stride_wn,
    depth, INTERMEDIATE: tl.constexpr, TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    K_MAJOR: tl.constexpr, TMA: tl.constexpr,
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
        col = pid_n * BN
        do_tile = (choice // TOP_K).to(tl.int64)[:, None] * stride_do + tl.arange(0, BK)[None, :]
        da, _ = multiply(
            DO, do_tile, 0, W, expert, col, depth,
            stride_we, stride_wk, stride_wn, INTERMEDIATE, False, K_MAJOR, EVEN, False, TMA, BM, BN, BK, PRECISION,
        )  # fmt: skip
        live = row < end
        s = tl.load(WEIGHTS + choice).to(tl.float32)[:, None]
        ds = _through_activation(da, s, live, Z, DZ, AS, first, m, col, INTERMEDIATE, ACTIVATION, GATED, BM, BN)
        tl.store(DS + row.to(tl.int64) * tiles_n + pid_n, ds, mask=live)


@triton.jit
def load_rows(base, tile, cols, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """Return a block (rows, columns) of sorted rows; zeros past WIDTH and, unless ALL are live, in dead rows."""
    if ALL and WIDTH % BLOCK == 0:
        x = tl.load(base + tile)
    elif ALL:
        x = tl.load(base + tile, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(base + tile, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def weights_kernel(
    L, R, L_TILES, R_TILES, OFFSETS, DW, stride_l, stride_r, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DW_EMN[e] = sum over the rows r of expert e of L[r]^T R[r]; an expert without rows gets zeros.

    Whole blocks of rows need no masks; the last one, which may have fewer, comes after the loop.
    L_TILES and R_TILES are descriptors of L and R if TMA. Grid: (cdiv(M, BM) * cdiv(N, BN), E).
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    expert = tl.program_id(1)
    start = tl.load(OFFSETS + expert)
    end = tl.load(OFFSETS + expert + 1)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    l_tile = k[:, None] * stride_l + m[None, :]
    r_tile = k[:, None] * stride_r + n[None, :]
    l_base = L + start.to(tl.int64) * stride_l
    r_base = R + start.to(tl.int64) * stride_r
    acc = tl.zeros((BM, BN), tl.float32)
    last = end - (end - start) % BK
    for r0 in range(start, last, BK):
        if TMA:
            left = L_TILES.load([r0, pid_m * BM])
            right = R_TILES.load([r0, pid_n * BN])
        else:
            left = load_rows(l_base, l_tile, m, None, M, BM, True)
            right = load_rows(r_base, r_tile, n, None, N, BN, True)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        l_base += BK * stride_l
        r_base += BK * stride_r
    if last < end:
        live = k < end - last
        left = load_rows(l_base, l_tile, m, live, M, BM, False)
        right = load_rows(r_base, r_tile, n, live, N, BN, False)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    dw_ptr = DW + expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(dw_ptr, acc.to(DW.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def gather_kernel(
    X, ORDER, VALID, OUT, stride_x, N: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """OUT_SN[r] = X_TN[token of row r]; rows from VALID[0] on are not written. Grid: (cdiv(S, BM), cdiv(N, BN))."""
    first = tl.program_id(0) * BM
    valid = tl.load(VALID)
    if first < valid:
        row = first + tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        live = row < valid
        token = (tl.load(ORDER + row, mask=live, other=0) // TOP_K).to(tl.int64)
        mask = live[:, None] & (n < N)[None, :]
        x = tl.load(X + token[:, None] * stride_x + n[None, :], mask=mask)
        tl.store(OUT + row.to(tl.int64)[:, None] * N + n[None, :], x, mask=mask)


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
