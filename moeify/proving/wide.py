"""A layer in float64, whatever its weights are stored in.

Shape legend: T tokens, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from moeify.layers import MoELayer
from moeify.layers.implementations import LOOP
from moeify.measure import name_of

_SUM = 5  # decimals of what the weights of a token's experts sum to
_ROUNDING = 1e-6  # of such a sum in float32


def first_tensor(output: object) -> Tensor | None:
    """Return a module's output, without what it gives beside it."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) else None


class _Widening(TorchFunctionMode):
    """Float64 wherever a float64 tensor meets others: weights are widened one at a time, while they are used.

    Attributes:
        narrowed: Whether a function has made another dtype of float64.
    """

    narrowed = False

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place or not any(_is_wide(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        result = func(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})
        self.narrowed |= isinstance(result, Tensor) and result.is_floating_point() and not _is_wide(result)
        return result


def _is_wide(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _widened(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def in_float64(module: nn.Module, x: Tensor) -> tuple[Tensor | None, bool]:
    """Return what a module gives for x in float64, and whether it narrows; None if it does not compute in float64."""

    def run(call: Callable[[Tensor], object]) -> tuple[Tensor | None, bool]:
        try:
            with _Widening() as widening:
                y = first_tensor(call(x.double()))
        except (RuntimeError, TypeError, ValueError):  # a kernel or a device without it
            return None, True
        return y if _is_wide(y) else None, widening.narrowed

    found, narrowed = run(module)
    if found is not None:
        return found, narrowed
    tensors = (*module.named_parameters(), *module.named_buffers())  # it casts tokens to the dtype of its weights
    weights = {name: t.double() if t.is_floating_point() else t for name, t in tensors}
    return run(lambda wide: functional_call(module, weights, (wide,)))


def rounded_to(layer: nn.Module, size: int) -> str | None:
    """Return the dtype to which its activation or its weights were rounded: scaled for shards or beside shared experts.

    Args:
        layer: The MoE layer.
        size: How many values the parameters of the dense FFN have.

    Returns:
        None where they are what they were, or multiplied by a power of two.
    """
    if isinstance(layer, MoELayer) and layer.rounded:
        return "float32"
    weights = [parameter for parameter in layer.get_submodule("experts").parameters() if parameter.dim() == 3]
    if not weights:
        return None  # a list of experts, which others write: copies
    if isinstance(layer, MoELayer):
        shards, shared = layer.config.granularity, layer.config.shared_experts
        factors = {shards, 1 + shared, *(1 + len(range(shard, shared, shards)) for shard in range(shards))}
    else:
        factors = {round(size * weights[0].shape[0] / sum(weight.numel() for weight in weights))}
    return name_of(weights[0].dtype) if any(factor & (factor - 1) for factor in factors) else None


@contextmanager
def as_a_loop(layer: nn.Module) -> Iterator[None]:
    """Let stacked experts run one by one: the other implementations want their weights in the dtype of the tokens."""
    experts: Any = layer.get_submodule("experts")
    if not hasattr(experts, "config"):
        yield
        return
    config, experts.config = experts.config, SimpleNamespace(_experts_implementation=LOOP)
    try:
        yield
    finally:
        experts.config = config


@contextmanager
def exact_weights(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Take the rounding out of the weights of a token's experts: stock routers compute them in float32 whatever comes.

    What they sum to is taken as the number of a few decimals that it is up to this rounding, such as 1. Yields the
    weights that were seen; none if the experts are not called as transformers calls them, with ids and weights.
    """
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
        weights = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            return None
        seen.append(weights)
        weights_TK = weights.double()
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        meant_T1 = sum_T1.round(decimals=_SUM)
        close_T1 = (sum_T1 - meant_T1).abs() <= _ROUNDING * meant_T1
        exact_TK = torch.where(close_T1, weights_TK * (meant_T1 / sum_T1), weights_TK)
        if "top_k_weights" in kwargs:
            return args, {**kwargs, "top_k_weights": exact_TK}
        return (*args[:2], exact_TK, *args[3:]), kwargs

    handle = layer.get_submodule("experts").register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
