"""The torch operators behind `moeify.kernels.ops`: schemas, kernels, fake rules and autograd rules.

`moeify::experts` has one output, so that a captured graph shows one node. Its autograd rule runs
`moeify::experts_forward`, which also returns what `moeify::experts_backward` reads: the pre-activation and the routing
layout. Gradients can be differentiated again: a backward pass that is itself recorded runs the reference.
`moeify::quantized_experts` has no gradient.

Operators cannot return None: an empty tensor stands for what is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from moeify.kernels import cpu, reference
from moeify.kernels.inputs import ExpertInputs, Kept

_torch: Any = torch  # for its untyped parts
_LIBRARY = _torch.library.Library("moeify", "FRAGMENT")  # an operator lives as long as the library that defined it
_OPS = _torch.ops.moeify

# In the order of ExpertInputs, then of Kept.
_TENSORS = "Tensor x, Tensor expert_ids, Tensor weights, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
_INPUTS = f"{_TENSORS}, str activation, bool gated"
_KEPT = "Tensor z, Tensor order, Tensor offsets"
_LIBRARY.define(f"experts({_INPUTS}, str implementation) -> Tensor")
_LIBRARY.define(f"experts_forward({_INPUTS}, str implementation) -> (Tensor out, {_KEPT})")
_LIBRARY.define(f"experts_backward(Tensor grad, {_INPUTS}, {_KEPT}, bool[] needs, str implementation) -> Tensor[]")
_LIBRARY.define(f"quantized_experts({_INPUTS}, Tensor up_scale, Tensor down_scale, str implementation) -> Tensor")
_LIBRARY.define("grouped_linear(Tensor x, Tensor w, Tensor? b, Tensor offsets, str implementation) -> Tensor")
_LIBRARY.define(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor w, Tensor? b, Tensor offsets, bool[] needs, "
    "str implementation) -> Tensor[]"
)
_INPUT_COUNT = len(ExpertInputs._fields)
_TENSOR_COUNT = 7  # the inputs before `activation`
T = TypeVar("T")


class _Backend(Protocol):
    """What a module that computes must define: `moeify.kernels.cpu` and `moeify.kernels.gpu.experts` do."""

    def experts_forward(self, inputs: ExpertInputs, keep: bool) -> tuple[Tensor, Kept]: ...
    def experts_backward(
        self, grad_TH: Tensor, inputs: ExpertInputs, kept: Kept, needs: list[bool]
    ) -> list[Tensor]: ...
    def grouped_linear_forward(
        self, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor
    ) -> Tensor: ...
    def grouped_linear_backward(
        self, grad_SN: Tensor, x_SH: Tensor, w_ENH: Tensor, b_EN: Tensor | None, offsets_E1: Tensor, needs: list[bool]
    ) -> list[Tensor]: ...


def _backend(implementation: str, x: Tensor) -> _Backend:
    """Return the module that computes."""
    if implementation == "cpu" or (implementation == "auto" and not _has_kernels(x)):
        return cpu
    from moeify.kernels.gpu import experts
    from moeify.kernels.gpu.target import interpreted

    if x.device.type != "cuda" and not interpreted():
        raise ValueError(f"implementation 'triton' got a tensor on {x.device}: expected a GPU; use 'auto'")
    if x.dtype == torch.float64:
        raise ValueError("implementation 'triton' got float64: expected 16 or 32 bits; use 'auto' or 'reference'")
    return experts


def _has_kernels(x: Tensor) -> bool:
    # Triton is published for Linux alone; its products of float64 exist on few GPUs.
    return x.device.type == "cuda" and x.dtype != torch.float64 and find_spec("triton") is not None


def _kernel(run: Callable[..., T]) -> Callable[..., T]:
    """Give `run` the backend that the operator's last argument names, with autocast off: dtypes are settled by now."""

    def kernel(*args: Any) -> T:
        *arguments, implementation = args
        device, backend = args[0].device, _backend(implementation, args[0])
        if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return run(backend, *arguments)
        with torch.autocast(device.type, enabled=False), _torch.cuda.device_of(args[0]):
            return run(backend, *arguments)

    return kernel


def _experts(backend: _Backend, *inputs: Any) -> Tensor:
    return backend.experts_forward(ExpertInputs(*inputs), keep=False)[0]


def _experts_forward(backend: _Backend, *inputs: Any) -> tuple[Tensor, ...]:
    out, kept = backend.experts_forward(ExpertInputs(*inputs), keep=True)
    return out, *kept


def _experts_backward(backend: _Backend, grad: Tensor, *rest: Any) -> list[Tensor]:
    inputs, (*kept, needs) = ExpertInputs(*rest[:_INPUT_COUNT]), rest[_INPUT_COUNT:]
    return backend.experts_backward(grad, inputs, Kept(*kept), needs)


def _quantized_experts(backend: _Backend, *arguments: Any) -> Tensor:
    *given, up_scale, down_scale = arguments
    inputs = ExpertInputs(*given)
    if backend is not cpu:
        from moeify.kernels.gpu import quantized

        if quantized.has_kernels(inputs):
            return quantized.quantized_experts(inputs, up_scale, down_scale)
    wide = inputs.x_TH if inputs.x_TH.dtype == torch.float64 else inputs.x_TH.float()
    up_bias_EJ, down_bias_EH = (b if b is None else b.to(wide.dtype) for b in inputs.parameters[2:])
    inputs = inputs._replace(x_TH=wide, up_bias_EJ=up_bias_EJ, down_bias_EH=down_bias_EH)
    out = reference.experts(*inputs, up_scale, down_scale)
    return out.to(given[0].dtype)


def _experts_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _experts_forward_fake(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, *_: object) -> tuple[Tensor, ...]:
    choices = ids.shape[0] * ids.shape[1]
    order = ids.new_empty(choices, dtype=torch.int32)
    offsets = ids.new_empty(up.shape[0] + 1, dtype=torch.int32)
    return x.new_empty(x.shape), x.new_empty(choices, up.shape[1]), order, offsets


def _backward_fake(count: int) -> Callable[..., list[Tensor]]:
    """Return the fake rule of a backward pass, for the gradients of the `count` arguments after `grad`."""

    def fake(grad: Tensor, *args: Any) -> list[Tensor]:
        needed = zip(args[:count], args[-2], strict=True)
        return [t.new_empty(t.shape) if needs else grad.new_empty(0) for t, needs in needed]

    return fake


def _grouped_linear_fake(x: Tensor, w: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


class _Experts(torch.autograd.Function):
    """The autograd rule of `moeify::experts`: keeps its inputs and the pre-activation."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, activation, gated, implementation = args
        ctx.settings, ctx.implementation = (activation, gated), implementation
        out, *kept = _OPS.experts_forward(*args)
        ctx.save_for_backward(*tensors, *kept)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # reading it twice breaks activation checkpointing
        tensors, kept = saved[:_TENSOR_COUNT], saved[_TENSOR_COUNT:]
        needs = list(ctx.needs_input_grad[:_TENSOR_COUNT])
        if torch.is_grad_enabled():
            grads = _reference_gradients(lambda *args: reference.experts(*args, *ctx.settings), tensors, needs, grad)
        else:
            grads = _OPS.experts_backward(grad, *tensors, *ctx.settings, *kept, needs, ctx.implementation)
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None


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
    """Return gradients that autograd can differentiate again."""
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if t is not None and needed]
    grads = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return [next(grads) if needed else None for needed in needs]


def _autograd(differentiate: Callable[..., Tensor], operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return differentiate(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return run


_OPERATORS = {
    "experts": (_experts, _experts_fake),
    "experts_forward": (_experts_forward, _experts_forward_fake),
    "experts_backward": (_experts_backward, _backward_fake(_TENSOR_COUNT)),
    "quantized_experts": (_quantized_experts, _experts_fake),
    "grouped_linear": (lambda backend, *args: backend.grouped_linear_forward(*args), _grouped_linear_fake),
    "grouped_linear_backward": (lambda backend, *args: backend.grouped_linear_backward(*args), _backward_fake(4)),
}
for _name, (_run, _fake) in _OPERATORS.items():
    _LIBRARY.impl(_name, _kernel(_run), "CompositeExplicitAutograd")
    _torch.library.register_fake(f"moeify::{_name}", _fake)
_LIBRARY.impl("experts", _autograd(_Experts.apply, _OPS.experts.default), "Autograd")
_LIBRARY.impl("grouped_linear", _autograd(_GroupedLinear.apply, _OPS.grouped_linear.default), "Autograd")
