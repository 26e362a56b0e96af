"""Which nodes of an ATen graph are projections: products of an activation with one parameter over the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from moeify.passes.matching.dataflow import arguments, data_users, shape, size
from moeify.passes.matching.operators import TRANSPARENT, Trait, has, op_name


@dataclass(frozen=True)
class Projection:
    """A matrix product of an activation with a parameter: `source (…, in) → node (…, out)`.

    Attributes:
        node: The node that holds the result (bias included).
        source: The activation that it reads.
        weight: The parameter's name.
        bias: The bias parameter's name, or None.
        in_features: How many features it reads.
        out_features: How many features it writes.
        transposed: The parameter is stored (in, out), as in GPT-2's Conv1D, and not (out, in).
        product: The product itself: `node`, or the node to whose value `node` adds the bias.
        axis: The dimension of the features, counted from the end: -1; for 1x1 convolutions -2 (1D), -3 (2D), -4 (3D).
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
    given = arguments(node)
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
    found, width = _parameter(weight), size(node, axis)
    if found is None or len(shape(weight)) != 2 - (axis + 1):
        return None
    bias_name = _bias(bias, width)
    if bias is not None and bias_name is None:
        return None
    name, flipped = found
    transposed = stored_out_in == flipped
    return Projection(node, source, name, bias_name, size(source, axis), width, transposed, product=node, axis=axis)


def _bias(value: object, out_features: int) -> str | None:
    """Return the name of the parameter that is a bias, None when the value is something else."""
    found = _parameter(value) if isinstance(value, fx.Node) and shape(value) == (out_features,) else None
    return found[0] if found else None


def _convolution(node: fx.Node, given: Mapping[str, object], rank: int) -> Projection | None:
    """Return a convolution that looks at one position only."""
    weight = given["weight"]
    kernel = shape(weight)[2:] if isinstance(weight, fx.Node) else ()
    plain = _is_all(given["stride"], 1) and _is_all(given["padding"], 0)
    if set(kernel) != {1} or not plain or given["groups"] != 1:
        return None
    return _product(node, given["input"], weight, given["bias"], stored_out_in=True, axis=-1 - rank)


def _is_all(given: object, value: int) -> bool:
    """Whether an argument of a convolution has one value in every dimension."""
    if isinstance(given, str):  # padding="same" pads nothing around one position
        return True
    return set(given) <= {value} if isinstance(given, list | tuple) else given == value


def _einsum(node: fx.Node, given: Mapping[str, object]) -> Projection | None:
    """Return an einsum that contracts the last letter of an activation with a matrix."""
    equation, operands = str(given["equation"]).replace(" ", ""), given["tensors"]
    inputs, _, result = equation.partition("->")
    letters = inputs.split(",")
    if (
        not isinstance(operands, list | tuple)
        or len(operands) != 2
        or len(letters) != 2
        or not letters[0]
        or not result
    ):
        return None
    positions, contracted, kept = letters[0][:-1], letters[0][-1], result[-1]
    others_stay = result[:-1] == positions and contracted not in positions and kept not in letters[0]
    if not others_stay or letters[1] not in {contracted + kept, kept + contracted}:
        return None
    return _product(node, operands[0], operands[1], None, stored_out_in=letters[1] == kept + contracted)


def _with_added_bias(projection: Projection) -> Projection:
    """Take `x @ w + b` as one projection, where `b` is a parameter with one value for each feature of the result."""
    users = data_users(projection.product)
    if projection.bias is not None or projection.axis != -1 or len(users) != 1 or op_name(users[0]) != "add":
        return projection
    add = users[0]
    others = [n for n in add.all_input_nodes if n is not projection.product]
    if add.kwargs or len(others) != 1:
        return projection
    bias = _bias(others[0], projection.out_features)
    return replace(projection, node=add, bias=bias) if bias else projection


def _parameter(node: fx.Node) -> tuple[str, bool] | None:
    """Return (name, transposed) of the parameter behind casts and transposes, None when it is something else."""
    flipped = False
    while node.op == "call_function":
        if has(node, Trait.TRANSPOSE) and len(shape(node)) == 2:
            flipped = not flipped
        elif not has(node, TRANSPARENT) or shape(node) != shape(node.all_input_nodes[0]):
            return None
        node = node.all_input_nodes[0]
    return (str(node.target), flipped) if node.op == "get_attr" else None
