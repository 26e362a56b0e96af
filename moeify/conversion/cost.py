"""What a conversion costs: parameters, active parameters, checkpoint bytes and FLOPs per token, before and after."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import NamedTuple

from moeify.checkpoint.tensor_info import ITEMSIZE
from moeify.config import MoEConfig
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import CopiedTensor, LayerTensor, StackedTensor
from moeify.conversion.stored_layout import stored_tensors
from moeify.passes.matching.projection import as_projection
from moeify.plan import Plan, Site


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


def moe_cost(dense: Cost, plan: Plan) -> Cost:
    """Count the converted model.

    Args:
        dense: The dense model's numbers.
        plan: What is converted.
    """
    itemsize = Fraction(dense.bytes, max(dense.parameters, 1))
    numbers: list[Fraction] = [Fraction(number) for number in dense]
    for site in plan.sites:
        new = [_numbers(tensor, plan.config, itemsize) for tensor in stored_tensors(plan, site)]
        changes = zip(*new, [-number for number in _replaced(site, itemsize)], strict=True)
        numbers = [number + sum(change) for number, change in zip(numbers, changes, strict=True)]
    return Cost(*map(int, numbers))


def _numbers(tensor: LayerTensor, config: MoEConfig, itemsize: Fraction) -> tuple[Fraction, ...]:
    """Return what a new tensor adds to each number of `Cost`."""
    if isinstance(tensor, CopiedTensor):
        return (Fraction(0),) * 4  # the dense model had it too
    if isinstance(tensor, StackedTensor):
        met = Fraction(config.top_k, config.experts) if tensor.routed else 1
        return _of_parameter(prod(tensor.shape), itemsize, met, is_matrix=tensor.blocks[0].columns is not None)
    size, dtype = prod(tensor.start.shape), tensor.start.dtype
    if dtype is not None:  # a buffer
        return (Fraction(0), Fraction(0), Fraction(size * ITEMSIZE[dtype]), Fraction(0))
    return _of_parameter(size, itemsize, 1, is_matrix=len(tensor.start.shape) == 2)


def _replaced(site: Site, itemsize: Fraction) -> list[Fraction]:
    """Return what the dense FFN of a site contributes to each number of `Cost`."""
    sizes = {}
    for rows, inputs in (*((up, site.hidden) for up in site.ups), (site.down, site.intermediate)):
        sizes[rows.parameter] = _of_parameter(rows.out_features * inputs, itemsize, 1, is_matrix=True)
        if rows.bias:
            sizes[rows.bias] = _of_parameter(rows.out_features, itemsize, 1, is_matrix=False)
    return [sum(column, Fraction(0)) for column in zip(*sizes.values(), strict=True)]


def _of_parameter(size: int, itemsize: Fraction, met: Fraction | int, *, is_matrix: bool) -> tuple[Fraction, ...]:
    active = Fraction(size * met)
    return (Fraction(size), active, size * itemsize, 2 * active if is_matrix else Fraction(0))
