"""Why a match stopped, in the words of whoever wrote the model."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx

from moeify.passes import dataflow as flow

_PRODUCTS = {"linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "einsum"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "convolution"}
_TRANSPOSES = {"transpose", "permute", "t", "numpy_T", "mT", "movedim", "swapaxes"}
_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "bmm", "baddbmm", "einsum"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "softmax", "_softmax", "log_softmax", "var", "std", "norm", "cumsum",
               "linalg_vector_norm", "topk", "sort"}  # fmt: skip
_HOPS = 48  # operators between two projections


def stopped_at(node: fx.Node, static: dict[fx.Node, bool]) -> str:
    """Say why a walk back from a projection cannot go through `node`.

    Args:
        node: What the walk met.
        static: What is known of which nodes depend on the inputs.
    """
    name = flow.op_name(node)
    if node.op == "placeholder":
        return f"it reads an input of the model, `{re.sub(r'^part[0-9]+_', '', node.name)}`, not only projections"
    if name == "getitem":
        return stopped_at(node.all_input_nodes[0], static)
    if name in _PRODUCTS:
        return _product(node, static)
    if name in flow.RESHAPES:
        return f"`{node.name}` groups or joins the features of a position (heads of an attention?)"
    if name in _TRANSPOSES:
        return f"`{node.name}` moves dimensions (features with positions, or heads)"
    if name in _CONVOLUTIONS:
        return f"behind it stands `{node.name}`, which mixes neighbouring positions"
    if name in _REDUCTIONS:
        return f"`{node.name}` is taken over another dimension than the features (positions, groups or experts)"
    match name:
        case flow.UNKNOWN:
            return "behind it stands a module that could not be traced"
        case "batch_norm":
            return f"`{node.name}` normalises over positions in training"
        case "prelu":
            return f"`{node.name}` has a slope for each position, not for each feature"
        case "embedding":
            return f"it reads rows of a table, `{node.name}`, not only projections"
        case "scaled_dot_product_attention":
            return f"behind it stands an attention, `{node.name}`: its output projection"
        case _:
            return f"behind it stands `{node.name or node.target}`, which is not position-wise"


def _product(node: fx.Node, static: dict[fx.Node, bool]) -> str:
    weight = flow.last_matrix(node)
    if not flow.is_static(weight, static):
        return f"behind it stands `{node.name}`, a product of two activations: an attention"
    if weight.op == "get_attr":
        return f"`{node.name}` multiplies by {weight.target} of shape {flow.shape(weight)}, which is not one matrix"
    return f"`{node.name}` multiplies by a computed weight (a parametrization? merge it first)"


def other_width(down: fx.Node, hidden: int, width: int, products: Collection[fx.Node]) -> str:
    """Say of a projection to another width what it may be, from what reads it.

    Args:
        down: The node that holds its result.
        hidden: The width that an FFN would lead back to.
        width: The width that it leads to.
        products: The nodes that are projections.
    """
    text = f"it projects to width {width}, not back to {hidden}"
    pending, seen = [down], {down}
    while pending and len(seen) < _HOPS:
        for user in flow.data_users(pending.pop(0)):
            name = flow.op_name(user)
            if name in _ATTENTION or (name == "matmul" and user not in products):
                return f"{text}: part of an attention"
            if user.op == "output":
                return f"{text}: a head"
            if user not in seen and user not in products:
                seen.add(user)
                pending.append(user)
    return f"{text}: no FFN"
