"""What the expert operators accept. They check it once, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from moeify.kernels.activations import find_activation
from moeify.kernels.inputs import ExpertInputs
from moeify.kernels.quantized import Quantized

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_experts(inputs: ExpertInputs, implementation: str) -> None:
    """Raise ValueError unless the arguments of `experts` fit together."""
    x_TH, expert_ids_TK, weights_TK, up_EJH, down_EHI, up_bias_EJ, down_bias_EH, activation, gated = inputs
    find_activation(activation)
    _check_implementation(implementation)
    check_shape("x", x_TH, (None, None))
    check_shape("expert_ids", expert_ids_TK, (x_TH.shape[0], None))
    check_shape("up", up_EJH, (None, None, None))
    check_shape("down", down_EHI, (None, None, None))
    _check_not_empty("down", down_EHI)
    experts, hidden, intermediate = down_EHI.shape
    rows = 2 * intermediate if gated else intermediate
    check_shape("x", x_TH, (None, hidden))
    if expert_ids_TK.shape[1] == 0:
        raise ValueError("expert_ids has shape (T, 0): expected at least one choice per token; skip the layer instead")
    check_shape("weights", weights_TK, tuple(expert_ids_TK.shape))
    check_shape("up", up_EJH, (experts, rows, hidden))
    check_shape("up_bias", up_bias_EJ, (experts, rows))
    check_shape("down_bias", down_bias_EH, (experts, hidden))
    if expert_ids_TK.is_floating_point() or expert_ids_TK.dtype == torch.bool:
        raise ValueError(f"expert_ids has dtype {expert_ids_TK.dtype}: expected integers; pass the indices of topk")
    _check_float("x", x_TH)
    _check_float("weights", weights_TK)
    others = {"up": up_EJH, "down": down_EHI, "up_bias": up_bias_EJ, "down_bias": down_bias_EH}
    check_dtypes("x", x_TH, others)
    _check_devices(x_TH, {"expert_ids": expert_ids_TK, "weights": weights_TK} | others)


def check_quantized(inputs: ExpertInputs, up: Quantized, down: Quantized, implementation: str) -> None:
    """Raise ValueError unless the arguments of `quantized_experts` fit together."""
    x_TH, whole = inputs.x_TH, []
    for name, weight in (("up", up), ("down", down)):
        scale = f"the scale of {name}"
        if weight.values.dtype not in {torch.float8_e4m3fn, torch.uint8}:
            raise ValueError(
                f"{name} has dtype {weight.values.dtype}: expected float8_e4m3fn, or uint8 for packed int4; quantize it"
            )
        check_shape(name, weight.values, (None, None, None))
        check_shape(scale, weight.scales, (weight.values.shape[0], None, None))
        if 0 in weight.block:
            raise ValueError(
                f"{scale} has shape {tuple(weight.scales.shape)}: expected one for each, 128 or all of {weight.rows} "
                f"rows, and for 32, 64, 128, … or all of {weight.columns} columns; check how it was quantized"
            )
        _check_devices(x_TH, {name: weight.values, scale: weight.scales})
        whole.append(x_TH.new_empty(()).expand(weight.values.shape[0], weight.rows, weight.columns))
    check_experts(inputs._replace(up_EJH=whole[0], down_EHI=whole[1]), implementation)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise ValueError("quantized experts have no gradient: expected inputs that want none; use torch.no_grad()")


def check_grouped_linear(
    x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, implementation: str
) -> None:
    """Raise ValueError unless the arguments of `grouped_linear` fit together."""
    _check_implementation(implementation)
    check_shape("w", w_ENH, (None, None, None))
    _check_not_empty("w", w_ENH)
    check_shape("x", x_SH, (None, w_ENH.shape[2]))
    check_shape("offsets", offsets_E1, (w_ENH.shape[0] + 1,))
    check_shape("b", b_EN, tuple(w_ENH.shape[:2]))
    if offsets_E1.dtype != torch.int32:
        raise ValueError(
            f"offsets has dtype {offsets_E1.dtype}: expected torch.int32; use routing_layout(...).offsets_E1"
        )
    _check_float("x", x_SH)
    check_dtypes("x", x_SH, {"w": w_ENH, "b": b_EN})
    _check_devices(x_SH, {"w": w_ENH, "b": b_EN, "offsets": offsets_E1})


def check_offsets(bounds: list[int], rows: int) -> None:
    """Raise ValueError unless `bounds` cut `rows` rows into slices; for code that has them on the host anyway."""
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > rows:
        where = next((e for e, (a, b) in enumerate(pairwise(bounds)) if not 0 <= a <= b <= rows), 0)
        raise ValueError(
            f"offsets of expert {where} are {bounds[where]} and {bounds[where + 1]}: expected offsets that start at 0, "
            f"never decrease and stay within the {rows} rows of x; use routing_layout(...).offsets_E1"
        )


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless a tensor (None fits) has this shape, in which None stands for any size."""
    if tensor is None:
        return
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(n is not None and n != size for n, size in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {found}: expected ({wanted}); check it against the other arguments")


def check_dtypes(first: str, x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors have the dtype of the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}, {first} has {x.dtype}: expected one dtype; cast one or use autocast"
            )


def _check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}: expected a float of 16, 32 or 64 bits; cast it")


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected at least one expert and one row; skip the layer instead"
        )


def _check_devices(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: expected one device; move one of them")
