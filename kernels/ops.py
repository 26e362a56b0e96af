"""The expert computation: what layers and graphs call.

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, N any number of columns. A trailing 1 is plus one: offsets_E1 is (E + 1,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels import (
    checks,
    operators,  # noqa: F401 (defines torch.ops.moeify)
    reference,
)
from moeify.kernels.inputs import ExpertInputs
from moeify.kernels.layout import RoutingLayout
from moeify.kernels.quantized import Quantized


def experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EJH: Tensor,
    down_EHI: Tensor,
    up_bias_EJ: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
    implementation: str = "auto",
) -> Tensor:
    """Return, for each token, the weighted sum of what its experts give: Σ_k weights[t, k] * FFN_ids[t, k](x[t]).

    The FFN is `down @ act(up @ x + up_bias) + down_bias`; with a gate, `down @ (act(gate) * up) + down_bias`, where
    `up_EJH` holds the gate rows, then the up rows. Differentiable, more than once, in every float argument. Under
    autocast the products run in its dtype.

    Args:
        x_TH: (T, H) tokens, any float dtype.
        expert_ids_TK: (T, K) integers; an id outside [0, E) contributes zero.
        weights_TK: (T, K) routing weights, any float dtype.
        up_EJH: (E, J, H) in x's dtype.
        down_EHI: (E, H, I) in x's dtype.
        up_bias_EJ: (E, J) in x's dtype, or None.
        down_bias_EH: (E, H) in x's dtype, or None; the routing weight multiplies it too.
        activation: A name in `moeify.kernels.activations.ACTIVATIONS`.
        gated: Whether the FFN is a gated linear unit.
        implementation: "auto" (by device), "reference", "cpu" (any device, but waits for it) or "triton".

    Returns:
        (T, H) in x's dtype.

    Raises:
        ValueError: Shapes, dtypes or names do not fit together.
    """
    dtype = x_TH.dtype
    x_TH, up_EJH, down_EHI, up_bias_EJ, down_bias_EH = _autocast(x_TH, up_EJH, down_EHI, up_bias_EJ, down_bias_EH)
    inputs = ExpertInputs(
        x_TH, expert_ids_TK, weights_TK, up_EJH, down_EHI, up_bias_EJ, down_bias_EH, activation, gated
    )
    checks.check_experts(inputs, implementation)
    if implementation == "reference":
        return reference.experts(*inputs).to(dtype)
    out_TH: Tensor = torch.ops.moeify.experts(*inputs, implementation)
    return out_TH.to(dtype)


def quantized_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up: Quantized,
    down: Quantized,
    up_bias_EJ: Tensor | None = None,
    down_bias_EH: Tensor | None = None,
    *,
    activation: str,
    gated: bool,
    implementation: str = "auto",
) -> Tensor:
    """Compute what `experts` does with quantized weights, (E, J, H) and (E, H, I), and without gradients.

    Rows that meet weights in e4m3 are rounded to e4m3 too, with a scale for every 128 columns. The other arguments are
    those of `experts`. On CPU, and where a GPU has no products of e4m3, the reference computes it.

    Returns:
        (T, H) in x's dtype.

    Raises:
        ValueError: Shapes, dtypes or names do not fit together, or a gradient is asked for.
    """
    given = (x_TH, expert_ids_TK, weights_TK, up.values, down.values, up_bias_EJ, down_bias_EH)
    inputs = ExpertInputs(*given, activation, gated)
    checks.check_quantized(inputs, up, down, implementation)
    if implementation == "reference":
        return reference.experts(*inputs, up.scales, down.scales)
    out_TH: Tensor = torch.ops.moeify.quantized_experts(*inputs, up.scales, down.scales, implementation)
    return out_TH


def grouped_linear(
    x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, implementation: str = "auto"
) -> Tensor:
    """Apply one linear layer per expert to rows that are already sorted by expert.

    Args:
        x_SH: (S, H) rows; expert e owns rows offsets[e] .. offsets[e + 1] - 1.
        w_ENH: (E, N, H) in x's dtype, any strides.
        b_EN: (E, N) in x's dtype, or None.
        offsets_E1: int32 (E + 1,), as `RoutingLayout.offsets_E1`: from 0, never decreasing, at most S. Values are
            checked where the host sees them; the Triton kernels do not wait for them.
        implementation: As for `experts`.

    Returns:
        (S, N) in x's dtype (autocast's under autocast); rows past the last offset are zero. Differentiable.

    Raises:
        ValueError: Shapes, dtypes or offsets do not fit together.
    """
    x_SH, w_ENH, b_EN = _autocast(x_SH, w_ENH, b_EN)
    checks.check_grouped_linear(x_SH, w_ENH, b_EN, offsets_E1, implementation)
    if implementation == "reference":
        return reference.grouped_linear(x_SH, w_ENH, b_EN, offsets_E1)
    y_SN: Tensor = torch.ops.moeify.grouped_linear(x_SH, w_ENH, b_EN, offsets_E1, implementation)
    return y_SN


def dispatch(x_TH: Tensor, layout: RoutingLayout) -> Tensor:
    """Copy each token to the K sorted rows that need it: (T, H) -> (S, H). Differentiable, without float atomics."""
    x_TKH = x_TH[:, None].expand(-1, layout.top_k, -1)
    return x_TKH.reshape(-1, x_TH.shape[1]).index_select(0, layout.order_S)


def combine(y_SH: Tensor, weights_TK: Tensor, layout: RoutingLayout) -> Tensor:
    """Sum each token's K sorted rows, weighted: (S, H), (T, K) -> (T, H) in y's dtype. Differentiable."""
    y_TKH = y_SH.index_select(0, layout.inverse_S).view(*weights_TK.shape, y_SH.shape[1])
    return (y_TKH * weights_TK[..., None].to(y_SH.dtype)).sum(1)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast to autocast's dtype where F.linear would: everything but float64."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))
