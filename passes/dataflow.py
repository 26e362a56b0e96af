"""What the matcher may assume about ATen operators: which ones treat every position alike.

Vocabulary, used throughout `passes/`:
    row          the features of one position: the last dimension of an activation, or its channels where 1x1
                 convolutions project. Every other dimension counts positions.
    axis         which dimension the row is, counted from the end (-1 for linear layers, -3 for 2D convolutions).
    row-wise     an operator whose output row depends on the same row of its inputs only (pointwise operators, norms
                 and splits over the row, reshapes that keep rows whole).
    static       a value computed from parameters, buffers and constants only, so the same for every input.
    varying      not static.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

# Only the list of positions changes, and only if the row stays whole.
RESHAPES = {
    "view", "reshape", "reshape_as", "view_as", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze",
}  # fmt: skip
_COPIES = {
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "lift_fresh_copy", "type_as",
    "native_dropout", "alpha_dropout", "feature_dropout",
}  # fmt: skip
# Values pass through unchanged (up to a cast): two nodes that differ by these are the same activation.
TRANSPARENT = RESHAPES | _COPIES
# They move rows to other places and leave the values alone.
MOVES = {
    "transpose", "permute", "t", "movedim", "swapaxes", "expand", "expand_as", "repeat", "roll", "flip", "pad",
    "select", "slice", "index", "index_select", "gather", "stack", "cat", "index_put", "_index_put_impl_", "unbind",
    "masked_fill", "masked_scatter", "getitem", "constant_pad_nd", "index_copy", "scatter", "where", "split", "chunk",
    "unsafe_split", "split_with_sizes",
}  # fmt: skip
_SPLITS = {"chunk", "split", "split_with_sizes", "slice", "narrow", "glu", "tensor_split", "unsafe_chunk"}
NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"}
_ROW_REDUCTIONS = {"mean", "sum", "amax", "amin", "softmax", "_softmax", "log_softmax", "var", "std", "norm",
                   "linalg_vector_norm"}  # fmt: skip
# They choose among the neurons of a row: sparse activations.
CHOOSES = {"topk", "kthvalue", "sort"}
_ROW_MOVES = {"scatter", "gather", "cumsum"}
# Pointwise by nature but not tagged so by torch 2.13.
_POINTWISE = {"silu", "gelu", "relu6", "hardswish", "mish", "softplus", "elu", "celu", "selu", "leaky_relu", "prelu",
              "hardtanh", "hardsigmoid", "log_sigmoid", "square", "rrelu", "threshold", "clamp", "clip", "where",
              "relu", "rsub", "softsign", "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "zeros_like",
              "ones_like"}  # fmt: skip
# The operator that stands in for a module that could not be traced (`moeify.tracing.stand_in`).
UNKNOWN = "stand_in"
# Learnt mixing: what they return is another activation than what they read. (A product of two activations is not in
# the list: attention reads projections, and what hyper-connections multiply is the stream.)
MIXES = {"linear", "mm", "addmm", "embedding", "embedding_bag", "multi_head_attention_forward", UNKNOWN}
# They tie the neurons of a row together, so an FFN around them cannot be split into groups of neurons.
REDUCES = NORMS | _ROW_REDUCTIONS | CHOOSES | _ROW_MOVES
# Sums and scalings, with the reshapes: no nonlinearity.
LINEAR = (TRANSPARENT | _SPLITS | {"add", "sub", "neg", "rsub", "cat", "mean", "sum", "getitem", "movedim", "select",
           "unbind", "transpose", "permute", "t", "swapaxes"}) - {"glu"}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """Return the operator's base name ("mul" for aten.mul.Tensor), or "" for what is not an ATen call."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].rstrip("_") or target._schema.name
    return getattr(target, "__name__", "") if node.op == "call_function" else ""


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
    """Return the width of a node's rows, 0 when it has none (a scalar, a list of tensors)."""
    dims = shape(node)
    return dims[axis] if len(dims) >= -axis else 0


def is_row_wise(node: fx.Node, axis: int = -1) -> bool:
    """Whether each output row is computed from the same row of the inputs."""
    name = op_name(node)
    if name == "getitem":
        return is_row_wise(node.all_input_nodes[0], axis)
    if name in _SPLITS | _ROW_REDUCTIONS | CHOOSES | _ROW_MOVES | {"cat"}:
        return _over(node, axis)
    if name in RESHAPES:
        first = node.all_input_nodes[0]
        return axis == -1 and size(first) == size(node) and size(node) > 1
    if name in NORMS:
        return axis == -1 and (name in {"rms_norm", "_fused_rms_norm"} or list(node.args[1]) == [size(node)])  # type: ignore[arg-type]
    if name == "expand_as":
        source = node.all_input_nodes[0]
        return axis == -1 and shape(source)[:-1] == shape(node)[:-1]
    if name == "prelu":
        return is_per_position(node, axis)
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or name in _COPIES or name in _POINTWISE


def is_per_position(node: fx.Node, axis: int) -> bool:
    """Whether a prelu's slopes belong to the row: it counts channels in dimension 1, or has one slope for all."""
    slopes = node.all_input_nodes[1]
    rank = len(shape(node))
    return shape(slopes) in {(), (1,)} or rank + axis == 1


def _over(node: fx.Node, axis: int) -> bool:
    """Whether the `dim` of a split or reduction is the row (its position is read from the schema)."""
    tensors = [n for n in node.all_input_nodes if shape(n)]
    rank = len(shape(tensors[0])) if tensors else 0
    for name, argument in arguments(node):
        if name == "dim":
            dims = argument if isinstance(argument, list | tuple) else [argument]
            return bool(dims) and all(isinstance(d, int) and d - rank * (d >= 0) == axis for d in dims)
    return False


def arguments(node: fx.Node) -> Iterator[tuple[str, object]]:
    """Yield an ATen call's arguments with their names in the schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for position, spec in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            yield spec.name, node.args[position]
        else:
            yield spec.name, node.kwargs.get(spec.name, spec.default_value if spec.has_default_value() else None)


def writes(node: fx.Node) -> bool:
    """Whether an operator changes one of its inputs, so that it counts even if nothing reads its result."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_static(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether a value does not depend on the model's inputs."""
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
    """Walk back over casts, dropout and whole-row reshapes to the node that made the values."""
    while op_name(node) in TRANSPARENT and is_row_wise(node):
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
    """Return the users that consume values: not export's metadata assertions, not the unused parts of a split."""
    return [user for user in node.users if not _is_idle(user)]


def _is_idle(user: fx.Node) -> bool:
    name = op_name(user)
    return name in {"_assert_tensor_metadata", "sym_size"} or (name == "getitem" and not user.users)


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
