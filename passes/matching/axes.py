"""Which dimension of an activation holds features: a projection over positions (a token-mixing MLP) is no FFN."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from moeify.passes.matching.dataflow import shape
from moeify.passes.matching.operators import Trait, has, op_name

_HOPS = 64  # a block has fewer operators


def reads_features(source: fx.Node, axis: int, projections: Collection[fx.Node]) -> bool:
    """Whether dimension `axis` of `source` counts features and not positions.

    It is followed back through changes of the dimensions to the nearest operator that knows: a norm, a projection, a
    convolution, an embedding. Where none is found the answer is yes.

    Args:
        source: The activation that a projection reads.
        axis: The dimension that the projection contracts, counted from the end.
        projections: Nodes that are projections; their features lie in the last dimension (channels: the second).
    """
    node, moved = source, False
    for _ in range(_HOPS):
        rank = len(shape(node))
        position = rank + axis
        if has(node, Trait.CHANNELS_FIRST):
            return position == 1
        if node in projections or has(node, Trait.NORM) or op_name(node) == "embedding":
            return axis == -1
        if node.op == "placeholder":
            return not moved or axis == -1 or rank > 3
        inputs = [n for n in node.all_input_nodes if shape(n)]
        # A norm's weight may be the first factor; the activation is the one of the product's shape.
        inputs.sort(key=lambda n: shape(n) != shape(node))
        before = _dimension_before(node, inputs[0], position) if inputs else None
        if before is None:
            return True
        moved = moved or before != position
        node = inputs[0]
        axis = before - len(shape(node))
    return True


def _dimension_before(node: fx.Node, source: fx.Node, position: int) -> int | None:
    """Return which dimension of `source` became dimension `position` of `node`, None when it was made otherwise."""
    if has(node, Trait.TRANSPOSE):
        return _order(node, source)[position]
    old, new = shape(source), shape(node)
    if len(old) == len(new):
        return position
    if old[: position + 1] == new[: position + 1]:
        return position
    from_end = position - len(new)
    if old[from_end:] == new[from_end:]:
        return from_end + len(old)
    return None


def _order(node: fx.Node, source: fx.Node) -> list[int]:
    """Return the order in which a transposition puts the dimensions: it is tried on dimensions of known sizes."""
    sizes = range(2, 2 + len(shape(source)))
    marked = torch.empty(tuple(sizes), device="meta")
    moved = node.target(*fx.map_arg(node.args, lambda _: marked), **node.kwargs)  # type: ignore[operator]
    return [sizes.index(size) for size in moved.shape]
