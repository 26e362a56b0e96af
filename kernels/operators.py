"""The torch operators behind `moeify.kernels.ops`: schemas, kernels, fake rules and autograd rules.

`moeify::experts` has one output, so that a captured graph shows one node. Its autograd rule runs
`moeify::experts_forward`, which also returns what `moeify::experts_backward` reads: the pre-activation and the routing
layout. Gradients can be differentiated again: a backward pass that is itself recorded runs the reference.

Operators cannot return None: what is not kept or not needed is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moeify.kernels import cpu, reference

_torch_library: Any = torch.library  # untyped
_LIBRARY = _torch_library.Library("moeify", "FRAGMENT")  # an operator lives as long as the library that defined it
_OPS: Any = torch.ops.moeify
_cuda: Any = torch.cuda  # untyped

_INPUTS = "Tensor x, Tensor expert_ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
_FFN = "str activation, bool gated"
_LIBRARY.define(f"experts({_INPUTS}, {_FFN}, bool recompute, str implementation) -> Tensor")
_LIBRARY.define(
    f"experts_forward({_INPUTS}, {_FFN}, bool keep, str implementation) "
    "-> (Tensor out, Tensor z, Tensor order, Tensor offsets)"
)
_LIBRARY.define(
    f"experts_backward(Tensor grad, {_INPUTS}, Tensor z, Tensor order, Tensor offsets, {_FFN}, bool[] needs, "
    "str implementation) -> Tensor[]"
)
_LIBRARY.define("grouped_linear(Tensor x, Tensor w, Tensor? b, Tensor offsets, str implementation) -> Tensor")
_LIBRARY.define(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor w, Tensor? b, Tensor offsets, bool[] needs, "
    "str implementation) -> Tensor[]"
)


def _backend(implementation: str, x: Tensor) -> Any:
    """Return the module that computes; `cpu` and `triton_experts` have the same functions."""
    if implementation == "cpu" or (implementation == "auto" and not _has_kernels(x)):
        return cpu
    from moeify.kernels import triton_experts
    from moeify.kernels.triton_target import interpreted

    if x.device.type != "cuda" and not interpreted():
        raise ValueError(f"implementation 'triton' got a tensor on {x.device}: expected a GPU; use 'auto'")
    if x.dtype == torch.float64:
        raise ValueError("implementation 'triton' got float64: expected 16 or 32 bits; use 'auto' or 'reference'")
    return triton_experts


def _has_kernels(x: Tensor) -> bool:
    # Triton is published for Linux alone; its products of float64 exist on few GPUs.
    return x.device.type == "cuda" and x.dtype != torch.float64 and find_spec("triton") is not None


def _kernel(name: str) -> Callable[..., Any]:
    """Call `name` of the backend that the last argument names, with autocast off: dtypes are settled by now."""

    def run(*args: Any) -> Any:
        device = args[0].device
        function = getattr(_backend(args[-1], args[0]), name)
        if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return function(*args[:-1])
        with torch.autocast(device.type, enabled=False), _cuda.device_of(args[0]):
            return function(*args[:-1])

    return run


def _experts_kernel(*args: Any) -> Tensor:
    *inputs, _, implementation = args
    out: Tensor = _kernel("experts_forward")(*inputs, False, implementation)[0]
    return out


def _experts_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _experts_forward_fake(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, *args: Any) -> tuple[Tensor, ...]:
    pairs, keep = ids.shape[0] * ids.shape[1], args[-2]
    z = x.new_empty(pairs if keep else 0, up.shape[1])
    order = ids.new_empty(pairs, dtype=torch.int32)
    return x.new_empty(x.shape), z, order, ids.new_empty(up.shape[0] + 1, dtype=torch.int32)


def _backward_fake(count: int) -> Callable[..., list[Tensor]]:
    """Gradients of the first `count` arguments after grad; the list of needs is the last argument but one."""

    def fake(grad: Tensor, *args: Any) -> list[Tensor]:
        needed = zip(args[:count], args[-2], strict=True)
        return [t.new_empty(t.shape) if needs else grad.new_empty(0) for t, needs in needed]

    return fake


def _grouped_linear_fake(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


class _Experts(torch.autograd.Function):
    """The autograd rule of `moeify::experts`: keeps x and, unless `recompute`, the pre-activation."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, activation, gated, recompute, implementation = args
        ctx.settings = activation, gated
        ctx.implementation = implementation
        out, *kept = _OPS.experts_forward(*inputs, activation, gated, not recompute, implementation)
        ctx.save_for_backward(*inputs, *kept)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # reading it twice breaks activation checkpointing
        inputs, kept = saved[:7], saved[7:]
        needs = list(ctx.needs_input_grad[:7])
        if torch.is_grad_enabled():
            grads = _reference_gradients(lambda *args: reference.experts(*args, *ctx.settings), inputs, needs, grad)
        else:
            grads = _OPS.experts_backward(grad, *inputs, *kept, *ctx.settings, needs, ctx.implementation)
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    """The autograd rule of `moeify::grouped_linear`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, ctx.implementation = args
        ctx.save_for_backward(*inputs)
        y: Tensor = _OPS.grouped_linear(*args)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
        if torch.is_grad_enabled():
            grads = _reference_gradients(reference.grouped_linear, inputs, needs, grad)
        else:
            grads = _OPS.grouped_linear_backward(grad, *inputs, needs, ctx.implementation)
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None


def _reference_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], needs: list[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients that autograd can differentiate again."""
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if t is not None and needed]
    grads = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


def _autograd(function: Any, operator: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


_IMPLEMENTATIONS = {
    "experts": (_experts_kernel, _experts_fake),
    "experts_forward": (_kernel("experts_forward"), _experts_forward_fake),
    "experts_backward": (_kernel("experts_backward"), _backward_fake(7)),
    "grouped_linear": (_kernel("grouped_linear_forward"), _grouped_linear_fake),
    "grouped_linear_backward": (_kernel("grouped_linear_backward"), _backward_fake(4)),
}
for _name, (_run, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    _torch_library.register_fake(f"moeify::{_name}", _fake)
_LIBRARY.impl("experts", _autograd(_Experts, _OPS.experts.default), "Autograd")
_LIBRARY.impl("grouped_linear", _autograd(_GroupedLinear, _OPS.grouped_linear.default), "Autograd")
