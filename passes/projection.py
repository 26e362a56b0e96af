"""Which nodes of an ATen graph are projections: products of an activation with one parameter over the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from moeify.passes.dataflow import TRANSPARENT, arguments, data_users, op_name, shape, size

_TRANSPOSES = {"t", "transpose", "permute", "numpy_T", "mT", "swapaxes"}


@dataclass(frozen=True)
class Projection:
    """A matrix product of an activation with a parameter: `source (…, in) → node (…, out)`.

    Attributes:
        node: The node that holds the product (bias included).
        source: The activation that it reads.
        weight: The parameter's name.
        bias: The bias parameter's name, or None.
        in_features: Width read.
        out_features: Width written.
        transposed: The parameter is stored (in, out), as in GPT-2's Conv1D, and not (out, in).
        product: The product itself: `node`, or what `node` adds the bias to.
        axis: The dimension of the row, counted from the end: -1, or for 1x1 convolutions -2 (1D), -3 (2D), -4 (3D).
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool
    product: fx.Node
    axis: int = -1


def find_projections(graph: fx.Graph) -> dict[fx.Node, Projection]:
    """Return every projection of a graph by the node that holds its result, in the graph's order."""
    found: dict[fx.Node, Projection] = {}
    for node in graph.nodes:
        projection = as_projection(node)
        if projection is not None:
            projection = _with_added_bias(projection)
            found[projection.node] = projection
    return found


def as_projection(node: fx.Node) -> Projection | None:
    """Return the projection that a node computes, or None; a bias that another node adds is not looked for."""
    given = dict(arguments(node))
    match op_name(node):
        case "linear":
            return _product(node, given["input"], given["weight"], given["bias"], stored_out_in=True)
        case "addmm" if given["beta"] == given["alpha"] == 1:
            return _product(node, given["mat1"], given["mat2"], given["self"], stored_out_in=False)
        case "mm" | "matmul":
            return _product(node, node.args[0], node.args[1], None, stored_out_in=False)
        case "einsum":
            return _einsum(node, given)
        case "conv1d" | "conv2d" | "conv3d" as name:
            return _convolution(node, given, int(name[4]))
    return None


def _product(
    node: fx.Node, source: object, weight: object, bias: object, *, stored_out_in: bool, axis: int = -1
) -> Projection | None:
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    found = _parameter(weight)
    bias_found = _parameter(bias) if isinstance(bias, fx.Node) else None
    if found is None or len(shape(weight)) != 2 - (axis + 1) or (bias is not None and bias_found is None):
        return None
    name, flipped = found
    bias_name = bias_found[0] if bias_found else None
    transposed = stored_out_in == flipped
    return Projection(
        node, source, name, bias_name, size(source, axis), size(node, axis), transposed, product=node, axis=axis
    )


def _convolution(node: fx.Node, given: Mapping[str, Any], rank: int) -> Projection | None:
    """Return a convolution that looks at one position only."""
    kernel = shape(given["weight"])[2:]
    plain = all(set(_numbers(given[name])) <= {value} for name, value in (("stride", 1), ("padding", 0)))
    if set(kernel) != {1} or not plain or given["groups"] != 1:
        return None
    return _product(node, given["input"], given["weight"], given["bias"], stored_out_in=True, axis=-1 - rank)


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, str):  # padding="same" pads nothing around one position
        return [0]
    return list(value) if isinstance(value, list | tuple) else [value]


def _einsum(node: fx.Node, given: Mapping[str, Any]) -> Projection | None:
    """Return an einsum that contracts the last letter of an activation with a matrix."""
    equation, operands = str(given["equation"]).replace(" ", ""), given["tensors"]
    inputs, _, result = equation.partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or len(letters) != 2 or not result:
        return None
    (x, w), (source, weight) = letters, operands
    if len(w) != 2 or not x or result[:-1] != x[:-1]:
        return None
    match (w[0], w[1]):
        case (contracted, kept) if contracted == x[-1] and kept == result[-1] != contracted:
            return _product(node, source, weight, None, stored_out_in=False)
        case (kept, contracted) if contracted == x[-1] and kept == result[-1] != contracted:
            return _product(node, source, weight, None, stored_out_in=True)
    return None


def _with_added_bias(projection: Projection) -> Projection:
    """Take `x @ w + b` as one projection, where `b` is a parameter as wide as the result."""
    users = data_users(projection.product)
    if projection.bias is not None or projection.axis != -1 or len(users) != 1 or op_name(users[0]) != "add":
        return projection
    add = users[0]
    others = [n for n in add.all_input_nodes if n is not projection.product]
    if add.kwargs or len(others) != 1 or shape(others[0]) != (projection.out_features,):
        return projection
    bias = _parameter(others[0])
    return replace(projection, node=add, bias=bias[0]) if bias else projection


def _parameter(node: fx.Node) -> tuple[str, bool] | None:
    """Return (name, transposed) of the parameter behind casts and transposes, None when it is something else."""
    flipped = False
    while node.op == "call_function":
        name = op_name(node)
        if name in _TRANSPOSES and len(shape(node)) == 2:
            flipped = not flipped
        elif name not in TRANSPARENT or shape(node) != shape(node.all_input_nodes[0]):
            return None
        node = node.all_input_nodes[0]
    return (str(node.target), flipped) if node.op == "get_attr" else None
