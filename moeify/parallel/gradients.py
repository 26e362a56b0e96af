"""What a rank's experts see of their parameters in a forward pass, and what comes back: the mean over all ranks.

The experts of a rank get the gradients of the tokens of all n ranks of its group, summed; every other parameter gets a
mean over ranks from DDP or FSDP. So the experts' are divided by n here, whatever engine is around.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moeify.parallel.mesh import Ranks
from moeify.ranks import told_by_ranks


class LocalWeights:
    """Gives experts their part of the stacked parameters as plain tensors while they run.

    Args:
        ranks: Who shares the experts, and who holds copies of them.
        path: The layer's, for messages.
    """

    def __init__(self, ranks: Ranks, path: str) -> None:
        self.ranks, self.path = ranks, path

    def attach(self, experts: nn.Module) -> None:
        """Let experts see them from the next forward pass on; FSDP's own hooks run before these."""
        experts.register_forward_pre_hook(self._show)
        experts.register_forward_hook(self._hide, always_call=True)

    def _show(self, experts: nn.Module, args: tuple[object, ...]) -> None:
        """Put plain tensors where attributes are looked up before parameters are: every implementation reads them."""
        for module in experts.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module.__dict__[name] = self._seen(parameter, managed=isinstance(experts, FSDPModule))

    def _hide(self, experts: nn.Module, args: tuple[object, ...], output: object) -> None:
        for module in experts.modules():
            for name in module._parameters:
                module.__dict__.pop(name, None)

    def _seen(self, parameter: Tensor, *, managed: bool) -> Tensor:
        """Return what computes in the parameter's place.

        Args:
            parameter: A stack of experts, sharded, or one of an activation's own parameters, the same on all ranks.
            managed: Whether FSDP averages over the copies of the experts.
        """
        ranks = self.ranks
        if isinstance(parameter, DTensor):
            local, group, count = parameter.to_local(), None if managed else ranks.copies, ranks.size
        else:  # each rank has seen the tokens of its own experts only
            local, group, count = parameter, ranks.group, 1
        if not local.requires_grad:
            return local
        if group is not None:
            count *= dist.get_world_size(group)
        seen: Tensor = _Mean.apply(local, count, group, self.path)  # type: ignore[no-untyped-call]
        return seen


class _Context(Protocol):
    count: int
    group: dist.ProcessGroup | None
    path: str


class _Mean(torch.autograd.Function):
    """The tensor itself; its gradient is summed over a group, if there is one, and divided by a count."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, count: int, group: dist.ProcessGroup | None, path: str) -> Tensor:
        ctx.count, ctx.group, ctx.path = count, group, path
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad / ctx.count
        if ctx.group is not None:
            what = f"{ctx.path}: rank {dist.get_rank()} could not add its gradients to those of the other ranks"
            with told_by_ranks(what, ctx.group):
                dist.all_reduce(grad, group=ctx.group)
        return grad, None, None, None
