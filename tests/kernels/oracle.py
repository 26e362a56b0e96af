"""An independent computation of experts: float64, one choice at a time, nothing shared with the library.

The activations are written from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # x, ids, weights, up, down, up_bias, down_bias: tensors, or None for an absent bias

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
}


def experts(inputs: Inputs, activation: str, gated: bool) -> Tensor:
    x, ids, weights, up, down = (inputs[name] for name in ("x", "ids", "weights", "up", "down"))
    up_bias, down_bias = inputs["up_bias"], inputs["down_bias"]
    rows = []
    for t in range(x.shape[0]):
        total: Tensor = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if not 0 <= e < up.shape[0]:
                continue
            z = up[e] @ x[t]
            if up_bias is not None:
                z = z + up_bias[e]
            half = z.shape[0] // 2
            a = ACTIVATIONS[activation](z[:half]) * z[half:] if gated else ACTIVATIONS[activation](z)
            y = down[e] @ a
            if down_bias is not None:
                y = y + down_bias[e]
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def make_inputs(
    tokens: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    experts: int,
    *,
    gated: bool,
    bias: bool,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    ids: Tensor | None = None,
) -> Inputs:
    """Random inputs of realistic size, so that a relative error means something."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * intermediate if gated else intermediate

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    if ids is None:
        ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k]
        if ids.shape[1] < top_k:
            ids = torch.randint(0, experts, (tokens, top_k), generator=g)
    return {
        "x": randn(tokens, hidden),
        "ids": ids,
        "weights": torch.rand(tokens, top_k, generator=g, dtype=torch.float64).to(dtype),
        "up": randn(experts, rows, hidden, scale=hidden**-0.5),
        "down": randn(experts, hidden, intermediate, scale=intermediate**-0.5),
        "up_bias": randn(experts, rows, scale=0.3) if bias else None,
        "down_bias": randn(experts, hidden, scale=0.3) if bias else None,
    }


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Fresh leaves in `dtype`, each wanting a gradient where it can have one."""
    return {
        name: t if t is None or not t.is_floating_point() else t.detach().to(dtype).clone().requires_grad_()
        for name, t in inputs.items()
    }


def gradients(out: Tensor, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    wanted = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    if not out.requires_grad:  # no choice was computed
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    grads = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), grads, strict=True)}
