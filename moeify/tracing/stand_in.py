"""Stand-ins for modules that do not trace, so that the module around them does.

A stand-in returns a guess: a value in the shape of the first activation that it gets, made by an operator of its own
(`moeify::stand_in`). The passes treat that operator as learned mixing that may hold a router, so a guess can hide an
FFN but cannot make one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Result: TypeAlias = Callable[[Tensor], object]

# What modules with an attention return. Tuples come first: code that wants a tensor fails on a tuple, but code that
# wants a tuple may take a tensor apart.
RESULTS: tuple[Result, ...] = (
    lambda x: (x, None),
    lambda x: (x,),
    lambda x: x,
    lambda x: (x, None, None),
)


@contextmanager
def standing_in(modules: Iterable[nn.Module], result: Result) -> Iterator[None]:
    """Let modules return `result` of a value of which nothing is known but its shape."""

    def forward(*args: object, **kwargs: object) -> object:
        leaves = pytree.tree_leaves((args, kwargs))
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return result(_operator()(first))

    with ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(forward_replaced(module, forward))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let a module run another forward inside the block; a forward that it holds itself is put back afterwards."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@cache
def _operator() -> Callable[[Tensor], Tensor]:
    @torch.library.custom_op("moeify::stand_in", mutates_args=())
    def stand_in(x: Tensor) -> Tensor:
        return x.clone()

    stand_in.register_fake(torch.empty_like)
    return stand_in
