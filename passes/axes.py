"""Which dimension of an activation holds features: a projection over positions (a token-mixing MLP) is no FFN."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from moeify.passes import dataflow as flow

_HOPS = 64  # a block has fewer operators
_CHANNELS_FIRST = {"conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm"}


def reads_features(source: fx.Node, axis: int, projections: Collection[fx.Node]) -> bool:
    """Whether dimension `axis` of `source` counts features and not positions.

    Followed back through moves of dimensions to the nearest operator that knows: a norm, a projection, a convolution,
    an embedding. Where none is found the answer is yes.

    Args:
        source: What a projection reads.
        axis: The dimension that it contracts, counted from the end.
        projections: Nodes that are projections; their features lie in the last dimension (channels: the second).
    """
    node, moved = source, False
    for _ in range(_HOPS):
        rank, name = len(flow.shape(node)), flow.op_name(node)
        position = rank + axis
        if name in _CHANNELS_FIRST:
            return position == 1
        if node in projections or name in flow.NORMS | {"embedding"}:
            return axis == -1
        if node.op == "placeholder":
            return not moved or axis == -1 or rank > 3
        inputs = [n for n in node.all_input_nodes if flow.shape(n)]
        # A norm's weight may be the first factor; the activation is the one of the product's shape.
        inputs.sort(key=lambda n: flow.shape(n) != flow.shape(node))
        before = _dimension_before(node, inputs[0], position) if inputs else None
        if before is None:
            return True
        moved = moved or before != position
        node = inputs[0]
        axis = before - len(flow.shape(node))
    return True


def _dimension_before(node: fx.Node, source: fx.Node, position: int) -> int | None:
    """Where dimension `position` of `node` came from in `source`, None when it was made by something else."""
    given = dict(flow.arguments(node))
    old, new = flow.shape(source), flow.shape(node)
    match flow.op_name(node):
        case "transpose" | "swapaxes":
            pair = [int(str(d)) % len(new) for d in list(given.values())[1:3]]
            return {pair[0]: pair[1], pair[1]: pair[0]}.get(position, position)
        case "permute":
            return int(node.args[1][position]) % len(old)  # type: ignore[index, arg-type]
        case "t":
            return 1 - position
    if len(old) == len(new):
        return position
    if old[: position + 1] == new[: position + 1]:
        return position
    from_end = position - len(new)
    if old[from_end:] == new[from_end:]:
        return from_end + len(old)
    return None
