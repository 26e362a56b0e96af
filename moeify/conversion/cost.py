"""What a conversion costs: parameters, active parameters, checkpoint bytes and FLOPs per token, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from moeify.checkpoint.tensor_info import ITEMSIZE
from moeify.contract.found import FoundLayer, find_layers
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import extra_tensors, stored_tensors
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
    """Count a checkpoint as it is; no weight is read."""
    if layers := find_layers(dense.model):
        return model_cost(dense.model, layers, dense.source.nbytes)
    parameters = sum(parameter.numel() for parameter in dense.model.parameters())
    found = [p for node in dense.graph_module.graph.nodes if (p := as_projection(node))]
    rows = [p.node.meta["val"].numel() // p.out_features for p in found]
    tokens = max((n for n in rows if isinstance(n, int)), default=1)
    met = [n if isinstance(n, int) else tokens for n in rows]  # where the data say how many, at most every token
    products = sum(n * p.in_features * p.out_features for n, p in zip(met, found, strict=True))
    return Cost(parameters, parameters, dense.source.nbytes, 2 * products // tokens)


def model_cost(model: nn.Module, layers: Mapping[str, FoundLayer], nbytes: int) -> Cost:
    """Count a model that has MoE layers, without tracing it: a token meets top_k of their experts.

    Args:
        model: With or without values.
        layers: Its MoE layers.
        nbytes: Bytes of the checkpoint's tensors.
    """
    met = {id(p): Fraction(layer.top_k or 1, layer.num_experts)
           for layer in layers.values() for part in layer.experts for p in part.parameters()}  # fmt: skip
    sizes = {id(p): p.numel() for p in model.parameters()}
    computing = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    matrices = [p for module in computing for name, p in module.named_parameters(recurse=False)
                if p.dim() > 1 and "bias" not in name]  # fmt: skip
    return Cost(
        parameters=sum(sizes.values()),
        active=int(sum(size * met.get(key, 1) for key, size in sizes.items())),
        bytes=nbytes,
        flops=2 * int(sum(p.numel() * met.get(id(p), 1) for p in matrices)),
    )


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


def least_bytes(dense: DenseCheckpoint, plan: Plan, dtype: str | None = None) -> int:
    """Return the bytes of the experts' weights alone, from the plan: no tensor is listed.

    Args:
        dense: The dense checkpoint.
        plan: What is converted.
        dtype: The safetensors name of the dtype to store them in; None for the source's.
    """
    copies = Fraction(plan.config.experts, plan.config.granularity)
    total = 0
    for site in plan.sites:
        rows = sum(len(range(up.start, up.stop, up.step)) for up in site.ups) + site.intermediate
        total += rows * site.hidden * ITEMSIZE[dtype or dense.info(site.down.parameter).dtype]
    return int(copies * total)


class _Change(NamedTuple):
    """A tensor more or less: parameters, the share of them that one token meets, or bytes besides theirs."""

    size: int = 0
    met: Fraction = Fraction(1)
    is_matrix: bool = False
    nbytes: int = 0


def _changes(dense: DenseCheckpoint, plan: Plan) -> Iterator[_Change]:
    met = Fraction(plan.config.top_k, plan.config.experts)
    for site in plan.sites:
        dtype = dense.info(site.down.parameter).dtype
        yield from (_of_dense(read(dense.model, name), -1) for name in site.reads)
        for tensor in stored_tensors(plan, site):
            size, start = prod(tensor.shape), tensor.start
            if tensor.copied is not None:
                yield _of_dense(read(dense.model, tensor.copied), 1)
            elif start is not None and start.dtype is not None:  # a parameter has the dtype of the dense weights
                yield _Change(nbytes=size * ITEMSIZE[start.dtype])
            elif start is not None:
                longer = ITEMSIZE[start.stored(dtype)] - ITEMSIZE[dtype]
                yield _Change(size, is_matrix=len(start.shape) == 2, nbytes=size * longer)
            else:
                is_matrix = tensor.blocks[0].columns is not None
                yield _Change(size, met if tensor.routed else Fraction(1), is_matrix)

    for tensor in extra_tensors(plan, dense.config, dense.names.of):
        # A head of its own is multiplied as often as the tied one.
        yield _Change(prod(tensor.shape) if tensor.start else read(dense.model, str(tensor.copied)).numel())


def _of_dense(tensor: Tensor, sign: int) -> _Change:
    if isinstance(tensor, nn.Parameter):
        return _Change(sign * tensor.numel(), is_matrix=tensor.dim() > 1)
    return _Change(nbytes=sign * tensor.numel() * tensor.element_size())
