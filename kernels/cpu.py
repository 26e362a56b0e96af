"""Expert computation on CPU: sorted slices, one matrix product per expert and projection, written where it belongs.

Only the pre-activation z is kept for the backward pass; the router's gradient needs no expert output, because
<dO, Y> = <dO, A W2^T> = <dO W2, A> (SonicMoE, arXiv:2512.14080).

Shape legend: T tokens, K choices per token, S = T*K pairs in sorted order, E experts, H hidden, I intermediate,
J = 2*I if gated else I, N any width, R rows of one expert. A trailing 1 is one (R1) or plus one (E1).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.activations import Activation, find_activation
from moeify.kernels.layout import invert, sort_by_expert


def experts_forward(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EJH: Tensor,
    down_EHI: Tensor,
    up_bias_EJ: Tensor | None,
    down_bias_EH: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(out_TH, z_SJ, order_S, offsets_E1)`; the pre-activation z has no rows unless `keep`."""
    act, dtype = find_activation(activation), _compute_dtype(x_TH)
    order_S, offsets_E1 = sort_by_expert(expert_ids_TK, up_EJH.shape[0])
    token_S = order_S // expert_ids_TK.shape[1]
    z_SJ = torch.zeros(order_S.shape[0] if keep else 0, up_EJH.shape[1], dtype=dtype)
    y_SH = torch.zeros(order_S.shape[0], x_TH.shape[1], dtype=dtype)
    for e, rows in _slices(offsets_E1):
        x_RH = x_TH.index_select(0, token_S[rows]).to(dtype)
        z_RJ = _linear(x_RH, up_EJH[e], _row(up_bias_EJ, e), out=z_SJ[rows] if keep else None)
        _linear(_activate(z_RJ, act, gated), down_EHI[e], _row(down_bias_EH, e), out=y_SH[rows])
    out_TH = combine(y_SH, weights_TK, invert(order_S).view_as(weights_TK))
    return out_TH.to(x_TH.dtype), z_SJ.to(x_TH.dtype), order_S, offsets_E1


def experts_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EJH: Tensor,
    down_EHI: Tensor,
    up_bias_EJ: Tensor | None,
    down_bias_EH: Tensor | None,
    z_SJ: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the seven inputs of the forward pass; an empty tensor for each that `needs` leaves out.

    A `z_SJ` without rows is computed again from x.
    """
    act, dtype, kept = find_activation(activation), _compute_dtype(x_TH), z_SJ.shape[0] == order_S.shape[0]
    empty = x_TH.new_empty(0)
    token_S = order_S // weights_TK.shape[1]
    weight_S1 = weights_TK.reshape(-1, 1).index_select(0, order_S).to(dtype)
    dx_SH = torch.zeros(order_S.shape[0] if needs[0] else 0, x_TH.shape[1], dtype=dtype)
    dweight_S = torch.zeros(order_S.shape[0], dtype=dtype)
    dup_EJH, ddown_EHI, dup_bias_EJ, ddown_bias_EH = (
        torch.zeros_like(parameter) if parameter is not None and needed else empty
        for parameter, needed in zip((up_EJH, down_EHI, up_bias_EJ, down_bias_EH), needs[3:], strict=True)
    )
    for e, rows in _slices(offsets_E1):
        x_RH = x_TH.index_select(0, token_S[rows]).to(dtype)
        dy_RH = grad_TH.index_select(0, token_S[rows]).to(dtype)
        z_RJ = z_SJ[rows].to(dtype) if kept else _linear(x_RH, up_EJH[e], _row(up_bias_EJ, e))
        da_RI = dy_RH @ down_EHI[e].to(dtype)
        a_RI = _activate(z_RJ, act, gated)
        dweight_S[rows] = (da_RI * a_RI).sum(-1)
        if down_bias_EH is not None:
            dweight_S[rows] += dy_RH @ down_bias_EH[e].to(dtype)
        dz_RJ = _activate_backward(da_RI.mul_(weight_S1[rows]), z_RJ, act, gated)
        dy_RH *= weight_S1[rows]
        if needs[0]:
            torch.mm(dz_RJ, up_EJH[e].to(dtype), out=dx_SH[rows])
        if needs[3]:
            _store(dup_EJH[e], dz_RJ.t(), x_RH)
        if needs[4]:
            _store(ddown_EHI[e], dy_RH.t(), a_RI)
        if needs[5]:
            dup_bias_EJ[e] = dz_RJ.sum(0)
        if needs[6]:
            ddown_bias_EH[e] = dy_RH.sum(0)
    inverse_TK = invert(order_S).view_as(weights_TK)
    dweights_TK = dweight_S[inverse_TK].to(weights_TK.dtype) if needs[2] else empty
    dx_TH = combine(dx_SH, None, inverse_TK).to(x_TH.dtype) if needs[0] else empty
    return [dx_TH, empty, dweights_TK, dup_EJH, ddown_EHI, dup_bias_EJ, ddown_bias_EH]


def grouped_linear_forward(x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] - 1 of x go through w[e], b[e]; rows past the last offset give zeros."""
    dtype = _compute_dtype(x_SH)
    y_SN = torch.zeros(x_SH.shape[0], w_ENH.shape[1], dtype=dtype)
    for e, rows in _slices(offsets_E1):
        _linear(x_SH[rows].to(dtype), w_ENH[e], _row(b_EN, e), out=y_SN[rows])
    return y_SN.to(x_SH.dtype)


def grouped_linear_backward(
    grad_SN: Tensor, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Gradients of the four inputs of the forward pass; an empty tensor for each that `needs` leaves out."""
    dtype, empty = _compute_dtype(x_SH), x_SH.new_empty(0)
    dx_SH = torch.zeros_like(x_SH, dtype=dtype) if needs[0] else empty
    dw_ENH = torch.zeros_like(w_ENH) if needs[1] else empty
    db_EN = torch.zeros_like(b_EN) if b_EN is not None and needs[2] else empty
    for e, rows in _slices(offsets_E1):
        dy_RN = grad_SN[rows].to(dtype)
        if needs[0]:
            torch.mm(dy_RN, w_ENH[e].to(dtype), out=dx_SH[rows])
        if needs[1]:
            _store(dw_ENH[e], dy_RN.t(), x_SH[rows].to(dtype))
        if needs[2]:
            db_EN[e] = dy_RN.sum(0)
    return [dx_SH.to(x_SH.dtype), dw_ENH, db_EN, empty]


def combine(y_SH: Tensor, weights_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    """Sum per token of the sorted rows of its K choices, weighted unless `weights_TK` is None."""
    weights_TK = None if weights_TK is None else weights_TK.to(y_SH.dtype)
    return F.embedding_bag(inverse_TK, y_SH, mode="sum", per_sample_weights=weights_TK)


def _compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs have no fast fp16 product: it runs at a few GFLOP/s, two orders below fp32.
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _slices(offsets_E1: Tensor) -> Iterator[tuple[int, slice]]:
    for e, (start, end) in enumerate(pairwise(offsets_E1.tolist())):
        if end > start:
            yield e, slice(start, end)


def _row(bias_EN: Tensor | None, e: int) -> Tensor | None:
    return None if bias_EN is None else bias_EN[e]


def _linear(x_RH: Tensor, w_NH: Tensor, b_N: Tensor | None, out: Tensor | None = None) -> Tensor:
    y_RN = torch.mm(x_RH, w_NH.to(x_RH.dtype).t(), out=out)
    return y_RN if b_N is None else y_RN.add_(b_N)


def _store(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _activate(z_RJ: Tensor, act: Activation, gated: bool) -> Tensor:
    if not gated:
        return act.forward(z_RJ)
    gate_RI, up_RI = z_RJ.chunk(2, dim=-1)
    return act.forward(gate_RI).mul_(up_RI)


def _activate_backward(da_RI: Tensor, z_RJ: Tensor, act: Activation, gated: bool) -> Tensor:
    if not gated:
        return act.backward(da_RI, z_RJ)
    gate_RI, up_RI = z_RJ.chunk(2, dim=-1)
    return torch.cat([act.backward(da_RI * up_RI, gate_RI), da_RI * act.forward(gate_RI)], dim=-1)
