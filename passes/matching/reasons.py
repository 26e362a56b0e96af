"""Why a match stopped, in the words of whoever wrote the model."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx

from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.operators import Trait, has, op_name

_HOPS = 48  # operators between two projections
# What an operator with a trait does that no activation of an FFN does; the first that fits is said.
_BY_TRAIT: tuple[tuple[Trait, str], ...] = (
    (Trait.RESHAPE, "`{name}` groups or joins the features of a position (heads of an attention?)"),
    (Trait.TRANSPOSE, "`{name}` moves dimensions (features with positions, or heads)"),
    (Trait.CONVOLUTION, "it is computed from `{name}`, which mixes neighboring positions"),
    (
        Trait.REDUCTION,
        "`{name}` is taken over another dimension than the features (positions, groups or experts)",
    ),
    (Trait.UNKNOWN, "it is computed from a module that could not be traced"),
)
_BY_NAME: dict[str, str] = {
    "batch_norm": "`{name}` normalizes over positions in training",
    "prelu": "`{name}` has a slope for each position, not for each feature",
    "embedding": "it reads rows of a table, `{name}`, not only projections",
    "scaled_dot_product_attention": "it is the output projection of an attention, `{name}`",
}

# How torch's own ways to compute a weight name what they compute it from, and what takes them away again.
_PARAMETRIZED = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.original\d*$")
_FOLDS: tuple[tuple[str, str, str], ...] = (
    ("_orig", "_mask", "prune.remove"),
    ("_orig", "_u", "remove_spectral_norm"),
    ("_g", "_v", "remove_weight_norm"),
)


def stopped_at(node: fx.Node, static: dict[fx.Node, bool]) -> str:
    """Say why a walk back from a projection cannot go through `node`.

    Args:
        node: Where the walk stopped.
        static: What is known of which nodes depend on the inputs.
    """
    if node.op == "placeholder":
        return f"it reads an input of the model, `{re.sub(r'^part[0-9]+_', '', node.name)}`, not only projections"
    if op_name(node) == "getitem":
        return stopped_at(node.all_input_nodes[0], static)
    if has(node, Trait.PRODUCT):
        return _product(node, static)
    if has(node, Trait.RESHAPE) and _follows_softmax(node, static):
        return "a softmax among groups of its intermediate values: codes, or classes"
    by_trait = (text for trait, text in _BY_TRAIT if has(node, trait))
    by_name = _BY_NAME.get(op_name(node), "it is computed from `{name}`, which is not position-wise")
    return next(by_trait, by_name).format(name=node.name or node.target)


def _product(node: fx.Node, static: dict[fx.Node, bool]) -> str:
    weight = flow.last_matrix(node)
    if not flow.is_static(weight, static):
        return f"it is computed from `{node.name}`, a product of two activations: an attention"
    bias = flow.arguments(node).get("self" if op_name(node) == "addmm" else "bias")
    if weight.op != "get_attr":
        return f"`{node.name}` multiplies by a computed weight{_folded(weight)}"
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return f"`{node.name}` adds a computed bias{_folded(bias)}"
    return f"`{node.name}` multiplies by {weight.target} of shape {flow.shape(weight)}, which is not one matrix"


def _folded(value: fx.Node) -> str:
    """Say how a computed weight becomes a plain one, which is all that can be converted."""
    held = {str(n.target) for n in flow.ancestors(value) if n.op == "get_attr"}
    for name in sorted(held):
        if match := _PARAMETRIZED.search(name):
            return f": fold it in with torch.nn.utils.parametrize.remove_parametrizations(module, {match[1]!r})"
        for suffix, other, fold in _FOLDS:
            stem = name.removesuffix(suffix)
            if name.endswith(suffix) and stem + other in held:
                return f": fold it in with torch.nn.utils.{fold}(module, {stem.rpartition('.')[2]!r})"
    return " (a parametrization? merge it first)"


def _follows_softmax(node: fx.Node, static: dict[fx.Node, bool]) -> bool:
    """Whether a node only rearranges or scales what a softmax gave."""
    for _ in range(_HOPS):
        varying = [n for n in node.all_input_nodes if not flow.is_static(n, static)]
        if len(varying) != 1 or has(node, Trait.PRODUCT):
            return False
        (node,) = varying
        if "softmax" in op_name(node):
            return True
    return False


def other_size(down: fx.Node, hidden: int, size: int, products: Collection[fx.Node]) -> str:
    """Say of a projection that does not lead back to the hidden size what it may be, from what reads it.

    Args:
        down: The node that holds its result.
        hidden: The hidden size that an FFN would lead back to.
        size: How many features it writes.
        products: The nodes that are projections.
    """
    text = f"it projects to {size} features, not back to the hidden size {hidden}"
    pending, seen = [down], {down}
    while pending and len(seen) < _HOPS:
        for user in flow.data_users(pending.pop(0)):
            of_activations = has(user, Trait.PRODUCT) and not has(user, Trait.MIX) and user not in products
            if of_activations or has(user, Trait.ATTENTION | Trait.STACKED):
                return f"{text}: part of an attention"
            if user.op == "output":
                return f"{text}: a head"
            if user not in seen and user not in products:
                seen.add(user)
                pending.append(user)
    return f"{text}: no FFN"
