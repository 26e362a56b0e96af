"""What the matcher may assume about ATen operators: which ones treat every position alike, and which ones project.

Vocabulary, used throughout `passes/`:
    row          the last dimension of an activation; every earlier dimension counts positions.
    row-wise     an operator whose output row depends on the same row of its inputs only (pointwise operators, norms
                 and splits over the last dimension, reshapes that keep rows whole).
    static       a value computed from parameters, buffers and constants only, so the same for every input.
    projection   a matrix product of an activation with one parameter over the row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten

# Values pass through unchanged (up to a cast): two nodes that differ by these are the same activation.
TRANSPARENT = {
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "view", "reshape", "_unsafe_view",
    "flatten", "unflatten", "squeeze", "unsqueeze", "lift_fresh_copy", "type_as", "native_dropout", "alpha_dropout",
    "feature_dropout",
}  # fmt: skip
_SPLITS = {"chunk", "split", "split_with_sizes", "slice", "narrow", "glu", "tensor_split", "unsafe_chunk", "select"}
_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"}
_ROW_REDUCTIONS = {"mean", "sum", "amax", "amin", "softmax", "_softmax", "log_softmax", "var", "std", "linalg_vector_norm",
                   "norm", "cat"}  # fmt: skip
# Pointwise by nature but not tagged so by torch 2.13.
_POINTWISE = {"silu", "gelu", "relu6", "hardswish", "mish", "softplus", "elu", "celu", "selu", "leaky_relu", "prelu",
              "hardtanh", "hardsigmoid", "log_sigmoid", "square", "rrelu", "threshold", "clamp", "clip", "celu",
              "where", "relu", "type_as", "rsub"}  # fmt: skip
REDUCES = _NORMS | (_ROW_REDUCTIONS - {"cat"})
LINEAR = TRANSPARENT | _SPLITS | {"add", "sub", "neg", "rsub", "cat", "mean", "sum"} - {"glu"}


def op_name(node: fx.Node) -> str:
    """Return the operator's base name ("mul" for aten.mul.Tensor), or "" for what is not an ATen call."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].rstrip("_") or target._schema.name
    return getattr(target, "__name__", "") if node.op == "call_function" else ""


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the traced shape of a node's value, () when it is not one tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def width(node: fx.Node) -> int:
    """Return the size of the last dimension, 0 when there is none."""
    return int(shape(node)[-1]) if shape(node) else 0


def is_row_wise(node: fx.Node) -> bool:
    """Whether each output row is computed from the same row of the inputs."""
    name = op_name(node)
    if not name:
        return False
    if name == "getitem" or name in _SPLITS:
        return name == "getitem" or _over_last_dimension(node)
    if name in {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}:
        first = node.all_input_nodes[0]
        return width(first) == width(node) and width(node) > 1
    if name in _NORMS:
        return name in {"rms_norm", "_fused_rms_norm"} or list(node.args[1]) == [width(node)]  # type: ignore[arg-type]
    if name in _ROW_REDUCTIONS:
        return _over_last_dimension(node)
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or name in TRANSPARENT or name in _POINTWISE


def _over_last_dimension(node: fx.Node) -> bool:
    """Whether the `dim` of a split or reduction is the last one (its position is read from the schema)."""
    rank = len(shape(node.all_input_nodes[0])) if node.all_input_nodes else 0
    for argument, spec in zip(_bound(node), node.target._schema.arguments, strict=False):  # type: ignore[union-attr]
        if spec.name == "dim" and argument is not None:
            dims = argument if isinstance(argument, list | tuple) else [argument]
            return all(d in (-1, rank - 1) for d in dims)
    return op_name(node) == "glu"


def _bound(node: fx.Node) -> Iterator[object]:
    """Yield the call's arguments in schema order, defaults included."""
    for position, spec in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            yield node.args[position]
        else:
            yield node.kwargs.get(spec.name, spec.default_value if spec.has_default_value() else None)


def is_static(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a value does not depend on the model's inputs."""
    if node not in memo:
        if node.op == "get_attr":
            memo[node] = True
        elif node.op == "call_function":
            memo[node] = all(is_static(arg, memo) for arg in node.all_input_nodes)
        else:
            memo[node] = False
    return memo[node]


def same_activation(node: fx.Node) -> fx.Node:
    """Walk back over casts, dropout and whole-row reshapes to the node that made the values."""
    while op_name(node) in TRANSPARENT and is_row_wise(node):
        node = node.all_input_nodes[0]
    return node


def data_users(node: fx.Node) -> list[fx.Node]:
    """Return the users that consume values (export's metadata assertions do not)."""
    return [user for user in node.users if op_name(user) != "_assert_tensor_metadata"]


def module_stack(node: fx.Node) -> list[str]:
    """Return the paths of the modules around a node, outermost first; a second call of a module has the same path."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path.split("@")[0] for path, _ in stack.values()]


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
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool


def as_projection(node: fx.Node) -> Projection | None:
    """Return the projection that a node computes, or None."""
    match op_name(node):
        case "linear":
            source, weight, bias, stored_out_in = node.args[0], node.args[1], _arg(node, 2), True
        case "addmm" if not node.kwargs:
            bias, source, weight = node.args[:3]
            stored_out_in = False
        case "mm" | "matmul":
            source, weight, bias, stored_out_in = node.args[0], node.args[1], None, False
        case _:
            return None
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    found = _parameter(weight)
    bias_name = _parameter(bias)[0] if isinstance(bias, fx.Node) and _parameter(bias) else None
    if found is None or len(shape(weight)) != 2 or (bias is not None and bias_name is None):
        return None
    name, flipped = found
    return Projection(node, source, name, bias_name, width(source), width(node), stored_out_in == flipped)


def _arg(node: fx.Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else None


def _parameter(node: fx.Node) -> tuple[str, bool] | None:
    """Return (name, transposed) of the parameter behind casts and transposes, None when it is something else."""
    flipped = False
    while node.op == "call_function":
        name = op_name(node)
        if name in {"t", "transpose", "permute", "numpy_T", "mT"}:
            flipped = not flipped
        elif name not in TRANSPARENT or shape(node) != shape(node.all_input_nodes[0]):
            return None
        node = node.all_input_nodes[0]
    return (str(node.target), flipped) if node.op == "get_attr" else None
