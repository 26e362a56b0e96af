"""Which dimension of an activation holds features, and where an operator leaves a dimension.

A projection over positions (a token-mixing MLP) is no FFN. A product that sums over another dimension than the
features, such as the streams of hyper-connections, leaves the features of a residual stream alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from moeify.passes.matching.dataflow import arguments, shape
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


def axis_before(node: fx.Node, source: fx.Node, axis: int | None) -> int | None:
    """Return which dimension of `source`, an input of `node`, became its dimension `axis`; both from the end."""
    if axis is None or not shape(node) or not shape(source):
        return axis  # of each of a list of tensors
    if op_name(node) == "einsum":
        letters, result = _einsum(source, node)
        return letters.index(result[axis]) - len(letters) if result[axis] in letters else None
    if has(node, Trait.PRODUCT) and axis == (-1 if source is _factors(node)[0] else -2):
        return None  # it is the other factor's
    found = _dimension_before(node, source, len(shape(node)) + axis)
    return None if found is None else found - len(shape(source))


def axis_after(node: fx.Node, user: fx.Node, axis: int | None) -> int | None:
    """Return which dimension of `user` its input's dimension `axis` became; both from the end, None for no one."""
    if axis is None or not shape(node) or not shape(user):
        return axis
    if sums_over(node, user, axis):
        return None
    if op_name(user) == "einsum":
        letters, result = _einsum(node, user)
        return result.index(letters[axis]) - len(result)
    position = len(shape(node)) + axis
    if has(user, Trait.TRANSPOSE):
        return _order(user, node).index(position) - len(shape(user))
    if has(user, Trait.PRODUCT):
        vector = min(len(shape(n)) for n in _factors(user)) == 1  # the result has a dimension less
        return axis + 1 if vector and axis < -1 else axis
    after = _same_dimension(shape(node), shape(user), position)
    same = after is not None and shape(user)[after] == shape(node)[position]
    return after - len(shape(user)) if after is not None and same else None


def sums_over(node: fx.Node, user: fx.Node, axis: int) -> bool:
    """Whether `user`, a product or a reduction, sums over dimension `axis` (from the end) of its input `node`."""
    if op_name(user) == "einsum":
        letters, result = _einsum(node, user)
        return letters[axis] not in result
    if op_name(user) == "linear":
        return axis == -1
    if has(user, Trait.PRODUCT):
        return axis == (-min(2, len(shape(node))) if node is _factors(user)[1] else -1)
    dims = arguments(user).get("dim") if op_name(user) in {"sum", "mean"} else ()
    given = dims if isinstance(dims, list | tuple) else [dims]
    return any(dim is None or dim in {axis, len(shape(node)) + axis} for dim in given)


def _factors(product: fx.Node) -> list[fx.Node]:
    """Return the two factors of a product."""
    given = [n for n in product.args if isinstance(n, fx.Node)]
    return given[:2] if op_name(product) == "linear" else given[-2:]


def _einsum(operand: fx.Node, node: fx.Node) -> tuple[str, str]:
    """Return the letters of one operand of an einsum and those of its result, with a digit for each dimension of `...`.

    Digits are counted from the end, as dimensions are broadcast.
    """
    given = arguments(node)
    operands, equation = given["tensors"], str(given["equation"]).replace(" ", "")
    assert isinstance(operands, list | tuple)
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:
        once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
        result = "".join(["..." * ("..." in inputs), *once])
    ranks = [len(shape(n)) - len(term.replace("...", "")) for n, term in zip(operands, terms, strict=True)]
    place = list(operands).index(operand)
    return (terms[place].replace("...", _digits(ranks[place])), result.replace("...", _digits(max(ranks))))


def _digits(count: int) -> str:
    return "9876543210"[-count:] if count else ""


def _dimension_before(node: fx.Node, source: fx.Node, position: int) -> int | None:
    """Return which dimension of `source` became dimension `position` of `node`, None when it was made otherwise."""
    if has(node, Trait.TRANSPOSE):
        return _order(node, source)[position]
    return _same_dimension(shape(node), shape(source), position)


def _same_dimension(one: tuple[int, ...], other: tuple[int, ...], position: int) -> int | None:
    """Return which dimension of a shape is dimension `position` of the other, which has the same values in it."""
    if len(one) == len(other):
        return position
    if one[: position + 1] == other[: position + 1]:
        return position
    from_end = position - len(one)
    if one[from_end:] == other[from_end:]:
        return from_end + len(other)
    return None


def _order(node: fx.Node, source: fx.Node) -> list[int]:
    """Return the order in which a transposition puts the dimensions: it is tried on dimensions of known sizes."""
    sizes = range(2, 2 + len(shape(source)))
    marked = torch.empty(tuple(sizes), device="meta")
    moved = node.target(*fx.map_arg(node.args, lambda _: marked), **node.kwargs)  # type: ignore[operator]
    return [sizes.index(size) for size in moved.shape]
