"""What a conversion costs: parameters, active parameters, checkpoint bytes and FLOPs per token, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from moeify.checkpoint.tensor_info import ITEMSIZE
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import stored_tensors
from moeify.conversion.restructure import read
from moeify.passes.matching.projection import as_projection
from moeify.plan import Plan


class Cost(NamedTuple):
    """One model's numbers.

    Attributes:
        parameters: All of them, tied ones once.
        active: Those that one token meets (embeddings count whole, as is usual).
        bytes: Bytes of the checkpoint's tensors.
        flops: Floating-point operations per token in matrix products with weights; attention scores, which depend on
            the length of the context, are not counted.
    """

    parameters: int
    active: int
    bytes: int
    flops: int


def dense_cost(dense: DenseCheckpoint) -> Cost:
    """Count a dense checkpoint; no weight is read."""
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    found = [p for node in dense.graph_module.graph.nodes if (p := as_projection(node))]
    rows = [p.node.meta["val"].numel() // p.out_features for p in found]
    products = sum(n * p.in_features * p.out_features for n, p in zip(rows, found, strict=True))
    return Cost(parameters, parameters, dense.nbytes, 2 * products // max(rows, default=1))


def moe_cost(dense: DenseCheckpoint, plan: Plan) -> Cost:
    """Count the converted checkpoint; no weight is read."""
    before, changes = dense_cost(dense), list(_changes(dense, plan))
    parameters = sum(change.size for change in changes)
    nbytes = Fraction(before.bytes, max(before.parameters, 1)) * parameters + sum(change.nbytes for change in changes)
    return Cost(
        before.parameters + parameters,
        before.active + int(sum(change.size * change.met for change in changes)),
        before.bytes + int(nbytes),
        before.flops + 2 * int(sum(change.size * change.met for change in changes if change.is_matrix)),
    )


class _Change(NamedTuple):
    """A tensor more or less: parameters, the share of them that one token meets, or the bytes of a buffer."""

    size: int = 0
    met: Fraction = Fraction(1)
    is_matrix: bool = False
    nbytes: int = 0


def _changes(dense: DenseCheckpoint, plan: Plan) -> Iterator[_Change]:
    met = Fraction(plan.config.top_k, plan.config.experts)
    for site in plan.sites:
        yield from (_of_dense(read(dense.model, name), -1) for name in site.reads)
        for tensor in stored_tensors(plan, site):
            size, start = prod(tensor.shape), tensor.start
            if tensor.copied is not None:
                yield _of_dense(read(dense.model, tensor.copied), 1)
            elif start is not None and start.dtype is not None:  # a parameter has the dtype of the dense weights
                yield _Change(nbytes=size * ITEMSIZE[start.dtype])
            elif start is not None:
                yield _Change(size, is_matrix=len(start.shape) == 2)
            else:
                is_matrix = tensor.blocks[0].columns is not None
                yield _Change(size, met if tensor.routed else Fraction(1), is_matrix)


def _of_dense(tensor: Tensor, sign: int) -> _Change:
    if isinstance(tensor, nn.Parameter):
        return _Change(sign * tensor.numel(), is_matrix=tensor.dim() > 1)
    return _Change(nbytes=sign * tensor.numel() * tensor.element_size())
