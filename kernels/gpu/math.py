"""Device functions that several Triton kernels share. Everything is computed in fp32."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Order tiles so that programs running at the same time share rows and columns in L2."""
    width = GROUP_M * tiles_n
    first_m = (pid // width) * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (pid % width) % size_m, (pid % width) // size_m


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return act(x) and act'(x); the compiler drops the one that is not used."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = x * s
        d = s + y * (1 - s)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = x * s
        d = s + 1.702 * y * (1 - s)
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * s
        d = s + 1.5957691216057308 * (1 + 0.134145 * x * x) * y * (1 - s)
    elif ACTIVATION == "gelu":
        s = 0.5 * (1 + tl.erf(0.7071067811865476 * x))
        y = x * s
        d = s + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
        d = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        y = tl.where(x <= 0, 0.0, x * x)
        d = tl.where(x <= 0, 0.0, 2 * x)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
        d = y * (1 - y)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        y = 2 * tl.sigmoid(2 * x) - 1
        d = 1 - y * y
    return y, d
