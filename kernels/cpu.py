"""Expert computation on CPU: choices sorted by expert, and one matrix product per expert and projection.

A slice is the sorted rows of one expert; a chunk is some whole slices. Elementwise work is done once per chunk, while
it is in cache, and temporaries are as large as one chunk. Only the pre-activation z is kept for the backward pass; the
router's gradient needs no expert output, because <dO, Y> = <dO, A W2^T> = <dO W2, A> (SonicMoE, arXiv:2512.14080).

Shape legend: T tokens, K choices per token, S = T*K choices sorted by expert, E experts, H hidden size, I intermediate
size, J = 2*I if gated else I, N any number of columns, R rows of one chunk. A trailing 1 is one (R1) or plus one (E1).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from moeify.kernels.activations import Activation, find_activation
from moeify.kernels.checks import check_offsets
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import invert, sort_by_expert
from moeify.kernels.pages import AVAILABLE, Pages, fresh_pages

CHUNK_ROWS = 512
MANY_ROWS = 64
LARGE = 4 << 20  # bytes of an output from which it is worth its cost to choose its pages
MOSTLY = 8  # to zero a page that is there takes a seventh of the time in which the system finds another
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # absent from builds without it
_GROUPED: Any = getattr(torch, "_grouped_mm", None)
_PAGES = Pages()  # of large gradients
FEW_ROWS = range(2, 5)  # in fp32 MKL is up to twice as fast with so few rows on the other side
FEW_CHOICES = 64  # up to this many, sorting a Python list is faster than calling the operators that sort


@dataclass(frozen=True)
class Chunk:
    """Whole slices that are computed together: their rows, their experts, and how many rows each expert has."""

    rows: slice
    experts: list[int]
    sizes: list[int]

    def slices(self, x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert with its rows of two tensors of this chunk."""
        return zip(self.experts, x.split_with_sizes(self.sizes), y.split_with_sizes(self.sizes), strict=True)


def experts_forward(inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Kept]:
    """Return the output (T, H) and what the backward pass reads; the pre-activation has no rows unless `keep`."""
    x_TH, expert_ids_TK, weights_TK, up_EJH, down_EHI, up_bias_EJ, down_bias_EH, activation, gated = inputs
    act, dtype = find_activation(activation), _compute_dtype(x_TH)
    order_S, token_S, inverse_S, offsets_E1, bounds = _sort(expert_ids_TK, inputs.experts)
    inverse_TK = inverse_S.view_as(weights_TK)
    if not keep and _takes_groups(inputs, bounds):
        y_SH = _grouped(x_TH.index_select(0, token_S), inputs, act, offsets_E1[1:])
        return combine(y_SH, weights_TK, inverse_TK), Kept(x_TH, order_S, offsets_E1)
    choices, rows_J = order_S.shape[0], up_EJH.shape[1]
    z_SJ = _rows(x_TH, choices if keep else 0, bounds[-1], rows_J)
    y_SH = _rows(x_TH, choices, bounds[-1], x_TH.shape[1])
    for chunk in _chunks(bounds, CHUNK_ROWS):
        x_RH = x_TH.index_select(0, token_S[chunk.rows]).to(dtype)
        z_RJ = z_SJ[chunk.rows] if keep else x_RH.new_empty(len(x_RH), rows_J)
        _linear(x_RH, up_EJH, up_bias_EJ, chunk, out=z_RJ)
        _linear(_activate(z_RJ, act, gated), down_EHI, down_bias_EH, chunk, out=y_SH[chunk.rows])
    out_TH = combine(y_SH, weights_TK, inverse_TK)
    return out_TH.to(x_TH.dtype), Kept(z_SJ.to(x_TH.dtype), order_S, offsets_E1)


def _takes_groups(inputs: ExpertInputs, bounds: list[int]) -> bool:
    """Whether torch's grouped product computes a few choices in less time than a product for each expert.

    It makes all products of a projection in one call, where calls take the time, but goes through idle experts too. It
    knows no bias, and wants rows in steps of 16 bytes. In fp32 there are faster products for two to four rows of an
    expert, and for many.
    """
    x, up, down = inputs.x_TH, inputs.up_EJH, inputs.down_EHI
    sizes = [b - a for a, b in pairwise(bounds)]
    if bounds[-1] != inputs.expert_ids_TK.numel() or bounds[-1] > CHUNK_ROWS or _GROUPED is None:
        return False
    if 2 * sum(map(bool, sizes)) < inputs.experts:
        return False
    if inputs.up_bias_EJ is not None or inputs.down_bias_EH is not None or x.device.type != "cpu":
        return False
    if x.dtype == torch.float32 and any(size in FEW_ROWS or size >= MANY_ROWS for size in sizes):
        return False
    return x.dtype in {torch.float32, torch.bfloat16} and all(
        t.is_contiguous() and t.shape[2] * t.itemsize % 16 == 0 for t in (up, down)
    )


def _grouped(x_SH: Tensor, inputs: ExpertInputs, act: Activation, ends_E: Tensor) -> Tensor:
    z_SJ = _GROUPED(x_SH, inputs.up_EJH.transpose(1, 2), ends_E)
    y_SH: Tensor = _GROUPED(_activate(z_SJ, act, inputs.gated), inputs.down_EHI.transpose(1, 2), ends_E)
    return y_SH


def experts_backward(grad_TH: Tensor, inputs: ExpertInputs, kept: Kept, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of the seven tensors of `inputs`, an empty tensor for each that `needs` leaves out."""
    x_TH, _, weights_TK, up_EJH, down_EHI, _, down_bias_EH, activation, gated = inputs
    act, dtype, order_S = find_activation(activation), _compute_dtype(x_TH), kept.order_S
    bounds, empty = kept.offsets_E1.tolist(), x_TH.new_empty(0)
    token_S = order_S // inputs.top_k
    weight_S1 = weights_TK.reshape(-1, 1).index_select(0, order_S).to(dtype)
    dx_SH = _rows(x_TH, order_S.shape[0], bounds[-1], x_TH.shape[1]) if needs[0] else empty
    dweight_S = torch.zeros(order_S.shape[0], dtype=dtype, device=x_TH.device)
    dup_EJH, ddown_EHI, dup_bias_EJ, ddown_bias_EH = (
        _gradient(parameter, bounds) if parameter is not None and needed else empty
        for parameter, needed in zip(inputs.parameters, needs[3:], strict=True)
    )
    for chunk in _chunks(bounds, CHUNK_ROWS):
        rows = chunk.rows
        x_RH = x_TH.index_select(0, token_S[rows]).to(dtype)
        dy_RH = grad_TH.index_select(0, token_S[rows]).to(dtype)
        da_RI = _times(dy_RH, down_EHI, chunk, out=x_RH.new_empty(len(x_RH), down_EHI.shape[2]))
        a_RI, dz_RJ, dweight_S[rows] = _activate_backward(kept.z_SJ[rows].to(dtype), da_RI, weight_S1[rows], act, gated)
        if down_bias_EH is not None:
            dweight_S[rows] += _dots(dy_RH, down_bias_EH, chunk)
        dy_RH *= weight_S1[rows]
        if needs[0]:
            _times(dz_RJ, up_EJH, chunk, out=dx_SH[rows])
        if needs[3]:
            _outer(dz_RJ, x_RH, chunk, out=dup_EJH)
        if needs[4]:
            _outer(dy_RH, a_RI, chunk, out=ddown_EHI)
        if needs[5]:
            _sums(dz_RJ, chunk, out=dup_bias_EJ)
        if needs[6]:
            _sums(dy_RH, chunk, out=ddown_bias_EH)
    inverse_TK = invert(order_S).view_as(weights_TK)
    dweights_TK = dweight_S[inverse_TK].to(weights_TK.dtype) if needs[2] else empty
    dx_TH = combine(dx_SH, None, inverse_TK).to(x_TH.dtype) if needs[0] else empty
    return [dx_TH, empty, dweights_TK, dup_EJH, ddown_EHI, dup_bias_EJ, ddown_bias_EH]


def grouped_linear_forward(x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor) -> Tensor:
    """Compute what `moeify.kernels.ops.grouped_linear` says."""
    bounds = offsets_E1.tolist()
    check_offsets(bounds, x_SH.shape[0])
    y_SN = _rows(x_SH, x_SH.shape[0], bounds[-1], w_ENH.shape[1])
    for chunk in _chunks(bounds, x_SH.shape[0]):
        _linear(x_SH[chunk.rows].to(y_SN.dtype), w_ENH, b_EN, chunk, out=y_SN[chunk.rows])
    return y_SN.to(x_SH.dtype)


def grouped_linear_backward(
    grad_SN: Tensor, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of the four inputs of the forward pass, an empty tensor for each that `needs` leaves out."""
    bounds, empty = offsets_E1.tolist(), x_SH.new_empty(0)
    dx_SH = _rows(x_SH, x_SH.shape[0], bounds[-1], x_SH.shape[1]) if needs[0] else empty
    dw_ENH = _gradient(w_ENH, bounds) if needs[1] else empty
    db_EN = _gradient(b_EN, bounds) if b_EN is not None and needs[2] else empty
    for chunk in _chunks(bounds, x_SH.shape[0]):
        dy_RN = grad_SN[chunk.rows].to(_compute_dtype(x_SH))
        if needs[0]:
            _times(dy_RN, w_ENH, chunk, out=dx_SH[chunk.rows])
        if needs[1]:
            _outer(dy_RN, x_SH[chunk.rows].to(dy_RN.dtype), chunk, out=dw_ENH)
        if needs[2]:
            _sums(dy_RN, chunk, out=db_EN)
    return [dx_SH.to(x_SH.dtype), dw_ENH, db_EN, empty]


def combine(y_SH: Tensor, weights_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    """Sum the sorted rows of each token's K choices, weighted unless `weights_TK` is None."""
    tokens, top_k = inverse_TK.shape
    bags_T = torch.arange(0, tokens * top_k, top_k, dtype=inverse_TK.dtype, device=inverse_TK.device)
    weights_S = None if weights_TK is None else weights_TK.reshape(-1).to(y_SH.dtype)
    # The functional form checks and reshapes for longer than a decoded token takes to combine.
    return torch.embedding_bag(y_SH, inverse_TK.view(-1), bags_T, False, 0, False, weights_S)[0]


def _sort(expert_ids_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Return `order_S`, the token of each row, `inverse_S`, `offsets_E1` (`RoutingLayout`), and the last as a list."""
    top_k = expert_ids_TK.shape[1]
    if expert_ids_TK.numel() > FEW_CHOICES:
        order_S, offsets_E1 = sort_by_expert(expert_ids_TK, experts)
        return order_S, order_S // top_k, invert(order_S), offsets_E1, offsets_E1.tolist()
    ids = [e if 0 <= e < experts else experts for e in expert_ids_TK.flatten().tolist()]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    ids.sort()
    bounds = [bisect_left(ids, e) for e in range(experts + 1)]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    lists = order, [choice // top_k for choice in order], inverse, bounds
    order_S, token_S, inverse_S, offsets_E1 = (
        torch.tensor(numbers, dtype=torch.int32, device=expert_ids_TK.device) for numbers in lists
    )
    return order_S, token_S, inverse_S, offsets_E1, bounds


def _compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs have no fast fp16 product: it runs at a few GFLOP/s, two orders below fp32.
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _rows(x: Tensor, rows: int, valid: int, columns: int) -> Tensor:
    """Return room for sorted rows; those past `valid` belong to no expert and are zero."""
    return _room((rows, columns), _compute_dtype(x), x.device, [slice(valid, rows)])


def _gradient(parameter: Tensor, bounds: list[int]) -> Tensor:
    """Return room for the gradient of stacked experts; that of an expert without rows is zero."""
    idle = [slice(e, e + 1) for e, (start, end) in enumerate(pairwise(bounds)) if start == end]
    return _room(parameter.shape, parameter.dtype, parameter.device, idle, again=True)


def _room(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, unused: list[slice], *, again: bool = False
) -> Tensor:
    """Return a tensor to be written everywhere but in the `unused` ranges of its first dimension, which are zero.

    Where most of a large one is unused, it lies in fresh pages of the system: they are zero, and cost nothing until
    they are written. Other large ones that are made `again` in every step use their pages again.
    """
    used = shape[0] - sum(rows.stop - rows.start for rows in unused)
    size = prod(shape) * dtype.itemsize if AVAILABLE and device.type == "cpu" else 0
    if size > LARGE and MOSTLY * used < shape[0]:
        return torch.frombuffer(fresh_pages(size), dtype=dtype).view(*shape)
    hold = again and size > LARGE
    out = _PAGES.tensor(shape, dtype) if hold else torch.empty(shape, dtype=dtype, device=device)
    for rows in unused:
        if rows.stop > rows.start:  # writing nothing takes as long as a small product
            out[rows] = 0
    return out


def _chunks(bounds: list[int], limit: int) -> Iterator[Chunk]:
    """Yield runs of whole slices: at most `limit` rows each, or a single slice that has more."""
    first, experts, sizes = 0, list[int](), list[int]()
    for e, (start, end) in enumerate(pairwise(bounds)):
        if end == start:
            continue
        if experts and end - first > limit:
            yield Chunk(slice(first, start), experts, sizes)
            first, experts, sizes = start, [], []
        experts.append(e)
        sizes.append(end - start)
    if experts:
        yield Chunk(slice(first, bounds[-1]), experts, sizes)


def _linear(x_RH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, chunk: Chunk, out: Tensor) -> Tensor:
    """Write each slice times its expert's transposed weight, plus bias; return `out`."""
    w_EHN, few = w_ENH.transpose(1, 2), FEW_ROWS if x_RH.dtype == torch.float32 else ()
    for e, x, y in chunk.slices(x_RH, out):
        if x.shape[0] in few:
            y.copy_(torch.mm(_cast(w_ENH[e], x), x.t()).t())
        else:
            _multiply(x, _cast(w_EHN[e], x), out=y)
        if b_EN is not None:
            y += b_EN[e]
    return out


def _times(dy_RN: Tensor, w_ENH: Tensor, chunk: Chunk, out: Tensor) -> Tensor:
    """Write each slice times its expert's weight; return `out`."""
    for e, dy, dx in chunk.slices(dy_RN, out):
        _multiply(dy, _cast(w_ENH[e], dy), out=dx)
    return out


def _multiply(x: Tensor, w_HN: Tensor, out: Tensor) -> None:
    """Write x @ w; in fp32, many rows go to oneDNN, a tenth faster than MKL on AMD."""
    if x.dtype == torch.float32 and x.shape[0] >= MANY_ROWS and x.device.type == "cpu" and _ONEDNN is not None:
        out.copy_(_ONEDNN(x, w_HN.t(), None, "none", [], ""))
    else:
        torch.mm(x, w_HN, out=out)


def _outer(dy_RN: Tensor, x_RH: Tensor, chunk: Chunk, out: Tensor) -> None:
    """Write the gradient of each expert's weight: its slice of dy, transposed, times its slice of x."""
    for e, dy, x in chunk.slices(dy_RN, x_RH):
        if out.dtype == x.dtype:
            torch.mm(dy.t(), x, out=out[e])
        else:
            out[e] = torch.mm(dy.t(), x)


def _sums(dy_RN: Tensor, chunk: Chunk, out: Tensor) -> None:
    """Write the gradient of each expert's bias."""
    for e, dy in zip(chunk.experts, dy_RN.split_with_sizes(chunk.sizes), strict=True):
        out[e] = dy.sum(0)


def _dots(dy_RN: Tensor, b_EN: Tensor, chunk: Chunk) -> Tensor:
    """Return the product of each row with its expert's bias."""
    parts = zip(chunk.experts, dy_RN.split_with_sizes(chunk.sizes), strict=True)
    return torch.cat([torch.mv(dy, _cast(b_EN[e], dy)) for e, dy in parts])


def _cast(w: Tensor, x: Tensor) -> Tensor:
    return w if w.dtype == x.dtype else w.to(x.dtype)


def _activate(z_RJ: Tensor, act: Activation, gated: bool) -> Tensor:
    if not gated:
        return act.forward(z_RJ)
    gate_RI, up_RI = z_RJ.chunk(2, dim=-1)
    return act.forward(gate_RI).mul_(up_RI)


def _activate_backward(
    z_RJ: Tensor, da_RI: Tensor, weight_R1: Tensor, act: Activation, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(a_RI, dz_RJ, dweight_R)`; `da_RI`, the gradient of the unweighted activation, is overwritten."""
    gate, up = z_RJ.chunk(2, dim=-1) if gated else (z_RJ, None)
    h = act.forward(gate)
    a = h if up is None else h * up
    dweight = (da_RI * a).sum(-1)
    da_RI *= weight_R1
    if up is None:
        return a, act.backward(da_RI, gate), dweight
    dz_RJ = torch.empty_like(z_RJ)
    dgate, dup = dz_RJ.chunk(2, dim=-1)
    torch.mul(da_RI, h, out=dup)
    dgate.copy_(act.backward(da_RI.mul_(up), gate))
    return a, dz_RJ, dweight
