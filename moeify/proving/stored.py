"""The stored tensors of a converted checkpoint beside what its plan makes of the dense one, value by value.

Running a model shows the experts that its tokens chose, and of a method with noise only how far it jumps. This shows
the rest: every expert, in every layer, and all that a conversion copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from moeify.checkpoint.shards import Compute, OutTensor, SourceRows
from moeify.checkpoint.source import Source
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.output_tensors import output_tensors
from moeify.plan import Plan

_PIECES = 4  # kept, because the experts of a layer consist of the same ones


def altered_tensors(dense: Source, moe: Source, plan: Plan, cast_to: str | None) -> tuple[str, ...]:
    """Return the names of tensors that are missing or hold other values than a conversion would write.

    Args:
        dense: The dense checkpoint; if it is not the kind of model that the plan was made for, nothing is compared.
        moe: The converted one.
        plan: The plan that lies beside it.
        cast_to: safetensors name of the dtype that it was told to store, if any.

    Raises:
        CheckpointError: The dense checkpoint lacks a tensor.
    """
    checkpoint = DenseCheckpoint(dense)
    if not all(name in checkpoint.names.of for site in plan.sites for name in site.parameters):
        return ()

    @lru_cache(maxsize=_PIECES)
    def value(part: SourceRows | Compute) -> Tensor:
        return dense.read(part.source_name) if isinstance(part, SourceRows) else part()

    def pieces(tensor: OutTensor) -> Iterator[Tensor]:
        for part in tensor.parts:
            rows = part.rows if isinstance(part, SourceRows) else None
            piece = value(SourceRows(part.source_name) if isinstance(part, SourceRows) else part)
            yield piece if rows is None else piece[slice(*rows)]

    def same(tensor: OutTensor) -> bool:
        stored = moe.tensors.get(tensor.name)
        if stored is None or stored.shape != tensor.shape:
            return False
        found, start = moe.read(tensor.name).flatten(), 0
        for piece in pieces(tensor):
            held = found[start : start + piece.numel()]
            start += piece.numel()
            if not _same_values(held, piece.flatten()):
                return False
        return start == found.numel()

    return tuple(
        tensor.name for tensor in output_tensors(checkpoint, plan, cast_to, lambda _: None) if not same(tensor)
    )


def _same_values(held: Tensor, expected: Tensor) -> bool:
    """Return whether they are equal in the dtype that is stored; NaN equals NaN."""
    expected = expected.to(held.dtype)
    return torch.equal(held, expected) or bool(((held == expected) | (held.isnan() & expected.isnan())).all())
