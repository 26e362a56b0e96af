"""Rows sent between the ranks of a group, differentiable, with errors that name the layer and the rank.

Shape legend: n ranks, S rows sent, R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from moeify.errors import MoeifyError
from moeify.ranks import told_by_ranks


@dataclass(frozen=True)
class Link:
    """What a layer's exchanges need.

    Attributes:
        group: The ranks that share the experts of the layer.
        paths: The layers of the model.
        number: The place of the layer among them.
    """

    group: dist.ProcessGroup
    paths: tuple[str, ...]
    number: int

    @property
    def path(self) -> str:
        """The layer's path."""
        return self.paths[self.number] or "the MoE layer"

    @property
    def ranks(self) -> list[int]:
        """The ranks of the group, as the whole job counts them."""
        return dist.get_process_group_ranks(self.group)

    def told(self) -> AbstractContextManager[None]:
        """Turn an error of torch's into one line: when a rank ends, this is all that the others see."""
        what = f"{self.path}: rank {dist.get_rank()} could not exchange tokens with ranks {self.ranks}"
        return told_by_ranks(what, self.group)

    def stop(self, why: str) -> NoReturn:
        """Raise what the first of the ranks that stop says; all ranks know that one does, and call this."""
        said = [""] * dist.get_world_size(self.group)
        with self.told():
            dist.all_gather_object(said, why, group=self.group)
        raise MoeifyError(next(f"rank {rank}: {text}" for rank, text in zip(self.ranks, said, strict=True) if text))

    def even(self, x: Tensor) -> Tensor:
        """Send the ranks equal numbers of rows of (S, …), and return theirs; a graph may hold it."""
        if torch.compiler.is_compiling():
            every = funcol.all_to_all_single_autograd if x.requires_grad else funcol.all_to_all_single
            return every(x, None, None, self.group)
        ranks = dist.get_world_size(self.group)
        rows = [x.shape[0] // ranks] * ranks
        return self.exchange(x, rows, rows)

    def swap(self, x: Tensor) -> Tensor:
        """Send row r of (n, …) to the r-th rank, and return what each rank sent here; not differentiable."""
        got = torch.empty_like(x)
        with self.told():
            dist.all_to_all_single(got, x, group=self.group)
        return got

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send rows to the ranks, in their order, and return the rows of all ranks, in their order.

        Args:
            x: (S, …).
            sent: Rows for each rank; they sum to S.
            received: Rows from each rank; they sum to R.

        Returns:
            (R, …).

        Raises:
            MoeifyError: The ranks could not exchange them.
        """
        got: Tensor = _Exchange.apply(x, self, sent, received)  # type: ignore[no-untyped-call]
        return got


class _Context(Protocol):
    back: tuple[Link, Sequence[int], Sequence[int]]


class _Exchange(torch.autograd.Function):
    """Backward sends the gradients the same ways back."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, link: Link, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.back = link, received, sent
        got = x.new_empty((sum(received), *x.shape[1:]))
        with link.told():
            dist.all_to_all_single(got, x.contiguous(), list(received), list(sent), group=link.group)
        return got

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        link, sent, received = ctx.back
        return link.exchange(grad, sent, received), None, None, None
