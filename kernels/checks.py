"""What the expert operators accept, checked once at the door."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moeify.kernels.activations import find_activation

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_EJH: Tensor,
    down_EHI: Tensor,
    up_bias_EJ: Tensor | None,
    down_bias_EH: Tensor | None,
    activation: str,
    gated: bool,
    implementation: str,
) -> None:
    """Raise ValueError unless the arguments of `experts` fit together."""
    find_activation(activation)
    _check_implementation(implementation)
    for name, tensor, dims in (
        ("x", x_TH, 2),
        ("expert_ids", expert_ids_TK, 2),
        ("up", up_EJH, 3),
        ("down", down_EHI, 3),
    ):
        _check_dims(name, tensor, dims)
    _check_not_empty("down", down_EHI)
    experts, hidden, inner = down_EHI.shape
    rows = 2 * inner if gated else inner
    _check_shape("x", x_TH, (x_TH.shape[0], hidden))
    _check_shape("expert_ids", expert_ids_TK, (x_TH.shape[0], expert_ids_TK.shape[1]))
    if expert_ids_TK.shape[1] == 0:
        raise ValueError("expert_ids has shape (T, 0): expected at least one choice per token; skip the layer instead")
    _check_shape("weights", weights_TK, tuple(expert_ids_TK.shape))
    _check_shape("up", up_EJH, (experts, rows, hidden))
    if up_bias_EJ is not None:
        _check_shape("up_bias", up_bias_EJ, (experts, rows))
    if down_bias_EH is not None:
        _check_shape("down_bias", down_bias_EH, (experts, hidden))
    if expert_ids_TK.is_floating_point() or expert_ids_TK.dtype == torch.bool:
        raise ValueError(f"expert_ids has dtype {expert_ids_TK.dtype}: expected integers; pass the indices of topk")
    _check_float("x", x_TH)
    _check_float("weights", weights_TK)
    others = {"up": up_EJH, "down": down_EHI, "up_bias": up_bias_EJ, "down_bias": down_bias_EH}
    _check_dtypes(x_TH, **others)
    _check_devices(x_TH, expert_ids=expert_ids_TK, weights=weights_TK, **others)


def check_grouped_linear(
    x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, implementation: str
) -> None:
    """Raise ValueError unless the arguments of `grouped_linear` fit together."""
    _check_implementation(implementation)
    _check_dims("x", x_SH, 2)
    _check_dims("w", w_ENH, 3)
    _check_not_empty("w", w_ENH)
    _check_shape("x", x_SH, (x_SH.shape[0], w_ENH.shape[2]))
    _check_shape("offsets", offsets_E1, (w_ENH.shape[0] + 1,))
    if b_EN is not None:
        _check_shape("b", b_EN, tuple(w_ENH.shape[:2]))
    if offsets_E1.dtype != torch.int32:
        raise ValueError(
            f"offsets has dtype {offsets_E1.dtype}: expected torch.int32; use routing_layout(...).offsets_E1"
        )
    _check_float("x", x_SH)
    _check_dtypes(x_SH, w=w_ENH, b=b_EN)
    _check_devices(x_SH, w=w_ENH, b=b_EN, offsets=offsets_E1)


def check_offsets(bounds: list[int], rows: int) -> None:
    """Raise ValueError unless `bounds` cut `rows` rows into slices. For hosts that know them: a GPU is not asked."""
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > rows:
        where = next((e for e, (a, b) in enumerate(pairwise(bounds)) if not 0 <= a <= b <= rows), 0)
        raise ValueError(
            f"offsets of expert {where} are {bounds[where]} and {bounds[where + 1]}: expected offsets that start at 0, "
            f"never decrease and stay within the {rows} rows of x; use routing_layout(...).offsets_E1"
        )


def _check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def _check_dims(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {dims} dimensions; reshape it")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected {shape}; check it against the other arguments"
        )


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}: expected a float of 16, 32 or 64 bits; cast it")


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected an expert and a width at least; skip the layer instead"
        )


def _check_dtypes(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, x has {x.dtype}: expected one dtype; cast one or use autocast"
            )


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: expected one device; move one of them")
