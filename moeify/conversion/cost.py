"""What a conversion costs: parameters, active parameters, checkpoint bytes and FLOPs per token, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import prod
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from moeify.checkpoint.tensor_info import ITEMSIZE
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import CopiedTensor, LayerTensor, StackedTensor, StartTensor
from moeify.conversion.restructure import read
from moeify.conversion.stored_layout import stored_tensors
from moeify.passes.matching.projection import as_projection
from moeify.plan import Plan

Numbers: TypeAlias = tuple[Fraction, Fraction, Fraction, Fraction]  # changes of the numbers of a `Cost`


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
    before = dense_cost(dense)
    itemsize = Fraction(before.bytes, max(before.parameters, 1))
    numbers: Iterable[Fraction | int] = before
    for site in plan.sites:
        old = [_of_dense(read(dense.model, name), itemsize) for name in site.reads]
        new = [_of_new(tensor, dense.model, plan, itemsize) for tensor in stored_tensors(plan, site)]
        added, removed = ([sum(column) for column in zip(*changes, strict=True)] for changes in (new, old))
        numbers = [n + plus - minus for n, plus, minus in zip(numbers, added, removed, strict=True)]
    return Cost(*map(int, numbers))


def _of_new(tensor: LayerTensor, model: nn.Module, plan: Plan, itemsize: Fraction) -> Numbers:
    """Return what a tensor of a new layer adds to each number of `Cost`."""
    match tensor:
        case CopiedTensor(source=source):
            return _of_dense(read(model, source), itemsize)
        case StackedTensor(shape=shape, routed=routed):
            met = Fraction(plan.config.top_k, plan.config.experts) if routed else Fraction(1)
            return _of_parameter(prod(shape), itemsize, met, is_matrix=tensor.blocks[0].columns is not None)
        case StartTensor(start=start):
            size = prod(start.shape)
            if start.dtype is None:  # a parameter, in the dtype of the dense weights
                return _of_parameter(size, itemsize, Fraction(1), is_matrix=len(start.shape) == 2)
            return _of_buffer(size * ITEMSIZE[start.dtype])


def _of_dense(tensor: Tensor, itemsize: Fraction) -> Numbers:
    if isinstance(tensor, nn.Parameter):
        return _of_parameter(tensor.numel(), itemsize, Fraction(1), is_matrix=tensor.dim() > 1)
    return _of_buffer(tensor.numel() * tensor.element_size())


def _of_parameter(size: int, itemsize: Fraction, met: Fraction, *, is_matrix: bool) -> Numbers:
    return (Fraction(size), size * met, size * itemsize, 2 * size * met * is_matrix)


def _of_buffer(nbytes: int) -> Numbers:
    return (Fraction(0), Fraction(0), Fraction(nbytes), Fraction(0))
