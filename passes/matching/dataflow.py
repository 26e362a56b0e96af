"""How values flow through a traced graph: what treats every position alike, and what depends on the inputs.

Vocabulary, used throughout `matching/`:
    features       the values of one position: the last dimension of an activation, or its channels where 1x1
                   convolutions project. Every other dimension counts positions.
    axis           which dimension holds the features, counted from the end (-1 for linear layers, -3 for 2D
                   convolutions).
    position-wise  said of an operator whose result at a position depends on the same position of its inputs only.
    static         said of a value that is computed from parameters, buffers and constants only: it is the same for
                   every input.
    varying        not static.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx

from moeify.passes.matching.operators import TRANSPARENT, Trait, has, op_name


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the traced shape of a node's value, () when it is not one tensor.

    A size that depends on data is a negative number, the same wherever the same size stands.
    """
    value = node.meta.get("val")
    return tuple(_known(dim) for dim in value.shape) if isinstance(value, torch.Tensor) else ()


def _known(dim: int | torch.SymInt) -> int:
    # Comparing symbolic sizes would add guards to the trace, or raise.
    return dim if isinstance(dim, int) else -1 - abs(hash(str(dim)))


def size(node: fx.Node, axis: int = -1) -> int:
    """Return how many features a node's value has, 0 when it has none (a scalar, a list of tensors)."""
    dims = shape(node)
    return dims[axis] if len(dims) >= -axis else 0


def is_position_wise(node: fx.Node, axis: int = -1) -> bool:
    """Whether the result at each position is computed from the same position of the inputs."""
    name = op_name(node)
    if name == "getitem":
        return is_position_wise(node.all_input_nodes[0], axis)
    if has(node, Trait.ALONG):
        return _works_along(node, axis)
    if has(node, Trait.RESHAPE):
        first = node.all_input_nodes[0]
        return axis == -1 and size(first) == size(node) and size(node) > 1
    if has(node, Trait.NORM):
        return axis == -1 and arguments(node)["normalized_shape"] == [size(node.all_input_nodes[0])]
    if name == "expand_as":
        return axis == -1 and shape(node.all_input_nodes[0])[:-1] == shape(node)[:-1]
    if name == "prelu":  # it counts channels in dimension 1, or has one slope for all
        slopes = shape(node.all_input_nodes[1])
        return slopes in {(), (1,)} or len(shape(node)) + axis == 1
    return has(node, Trait.POINTWISE | Trait.COPY)


def _works_along(node: fx.Node, axis: int) -> bool:
    """Whether the argument `dim` of a split or reduction names the features."""
    tensors = [n for n in node.all_input_nodes if shape(n)]
    rank = len(shape(tensors[0])) if tensors else 0
    given = arguments(node).get("dim")
    dims = given if isinstance(given, list | tuple) else [given]
    return bool(dims) and all(isinstance(d, int) and d - rank * (d >= 0) == axis for d in dims)


def arguments(node: fx.Node) -> dict[str, object]:
    """Return an ATen call's arguments by their names in the schema, defaults included."""
    specs = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
    defaults = {spec.name: spec.default_value if spec.has_default_value() else None for spec in specs}
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def writes(node: fx.Node) -> bool:
    """Whether an operator changes one of its inputs, so that it counts even if nothing reads its result."""
    if node.target is torch.ops.aten.detach_.default:  # it changes no value; a tensor that the code writes down has one
        return False
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_static(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a value does not depend on the model's inputs; `memo` keeps what is known."""
    pending = [node]
    while pending:
        top = pending[-1]
        if top.op != "call_function":
            memo[top] = top.op == "get_attr"
        elif top not in memo:
            missing = [n for n in top.all_input_nodes if n not in memo]
            if missing:
                pending += missing
                continue
            memo[top] = all(memo[n] for n in top.all_input_nodes)
        pending.pop()
    return memo[node]


def same_activation(node: fx.Node) -> fx.Node:
    """Walk back over casts, dropout and reshapes that keep the features to the node that made the values."""
    while has(node, TRANSPARENT) and is_position_wise(node):
        node = node.all_input_nodes[0]
    return node


def ancestors(node: fx.Node) -> Collection[fx.Node]:
    """Return a node and all that it is computed from."""
    seen: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        top = pending.pop()
        if top not in seen:
            seen[top] = None
            pending.extend(top.all_input_nodes)
    return seen


def last_matrix(product: fx.Node) -> fx.Node:
    """Return the last factor of a product: the weight, where it is a projection."""
    return [n for n in product.all_input_nodes if len(shape(n)) > 1][-1]


def data_users(node: fx.Node) -> list[fx.Node]:
    """Return the users that consume values: not export's checks of metadata, not the unused parts of a split."""
    return [user for user in node.users if not _is_idle(user)]


def _is_idle(user: fx.Node) -> bool:
    return has(user, Trait.IDLE) or (op_name(user) == "getitem" and not user.users)


def module_stack(node: fx.Node) -> list[str]:
    """Return the paths of the modules around a node, outermost first; a second call of a module has the same path."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path.split("@")[0] for path, _ in stack.values()]


def innermost_module(nodes: Iterable[fx.Node]) -> str:
    """Return the path of the innermost module around all nodes, "" where there is none."""
    common = ""
    for paths in zip(*(module_stack(node) for node in nodes), strict=False):
        if len(set(paths)) > 1:
            break
        common = paths[0]
    return common
