"""The stored tensors of a converted checkpoint beside what its plan makes of the dense one, value by value.

Running a model shows the experts that its tokens chose, and of a method with noise only how far it jumps. This shows
the rest: every expert, in every layer, and all that a conversion copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from moeify.checkpoint.gguf_writer import part_values
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

    value = lru_cache(maxsize=_PIECES)(partial(part_values, dense))
    expected = output_tensors(checkpoint, plan, cast_to, lambda _: None)
    return tuple(tensor.name for tensor in expected if not _is_stored(tensor, moe, value))


def _is_stored(tensor: OutTensor, moe: Source, value: Callable[[SourceRows | Compute], Tensor]) -> bool:
    """Return whether a checkpoint holds a tensor, one part after the other."""
    stored = moe.tensors.get(tensor.name)
    if stored is None or stored.shape != tensor.shape:
        return False
    found, start = moe.read(tensor.name).flatten(), 0
    for part in tensor.parts:
        piece = value(part).flatten()
        if not _same_values(found[start : start + piece.numel()], piece):
            return False
        start += piece.numel()
    return start == found.numel()


def _same_values(held: Tensor, expected: Tensor) -> bool:
    """Return whether they are equal in the dtype that is stored; NaN equals NaN."""
    expected = expected.to(held.dtype)
    return torch.equal(held, expected) or bool(((held == expected) | (held.isnan() & expected.isnan())).all())
