"""Put the losses of the sparse layers into the graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moeify.layers import MoELayer
from moeify.passes.base import PassResult
from moeify.routing.balance import layer_losses, weighted_sum
from moeify.routing.record import Routing


@dataclass(frozen=True)
class InsertLosses:
    """Add the balancing and z-losses of the sparse layers, with their coefficients.

    Before:
        %moe    = mlp(%x)
        return (%logits,)

    After:
        %both   = call_with_loss(%mlp, %x)
        %moe    = getitem(%both, 0)
        %loss   = getitem(%both, 1)
        return ((%logits,), %loss)

    With `attach`, the graph stays as it is and the layers add the losses to the gradients in backward, so that a
    training script need not know of them.

    Refuses: nothing; a graph without sparse layers is left as it is.

    Attributes:
        attach: Carry the losses in backward instead of returning them.
    """

    attach: bool = False

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place: it returns a pair then, what it returned before and the sum of the losses, ()."""
        calls = moe_calls(graph_module)
        if self.attach:
            for node in calls:
                layer: Any = graph_module.get_submodule(str(node.target))
                layer.config = layer.router.config = replace(layer.config, attach_losses=True)
        elif calls:
            _return(graph_module.graph, [_with_loss(graph_module.graph, node) for node in calls])
            graph_module.recompile()
        return PassResult(graph_module, modified=bool(calls))


def moe_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that call a sparse layer."""
    nodes = graph_module.graph.find_nodes(op="call_module")
    return [node for node in nodes if isinstance(graph_module.get_submodule(str(node.target)), MoELayer)]


def call_with_loss(
    layer: MoELayer, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a layer; return its output and the sum of its losses, each times its coefficient.

    Args:
        layer: Router and experts.
        x: (…, H).
        token_ids: (B, L), or None.
        mask: (B, at least L), 0 for padding, or None.

    Returns:
        (…, H) and ().
    """
    kept: list[Routing] = []
    handle = layer.router.register_forward_hook(lambda module, args, routing: kept.append(routing))
    try:
        out: Tensor = layer(x, token_ids, mask)
    finally:
        handle.remove()
    loss = None
    if isinstance(kept[0], Routing):  # soft routing has nothing to balance
        sequences = x.shape[0] if x.dim() == 3 else 1
        mask_T, _ = layer.model_inputs.tokens(x, token_ids, mask)
        loss = weighted_sum(layer_losses(kept[0], layer.config, mask_T=mask_T, sequences=sequences), layer.config)
    return out, x.new_zeros(()) if loss is None else loss


def _with_loss(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Replace a call by one that returns the loss too; return the loss."""
    with graph.inserting_before(node):
        layer = graph.get_attr(str(node.target))
        both = graph.call_function(call_with_loss, (layer, *node.args), dict(node.kwargs))
        out, loss = graph.call_function(getitem, (both, 0)), graph.call_function(getitem, (both, 1))
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return loss


def _return(graph: fx.Graph, losses: list[fx.Node]) -> None:
    output = graph.output_node()
    with graph.inserting_before(output):
        total = losses[0]
        for loss in losses[1:]:
            total = graph.call_function(torch.ops.aten.add.Tensor, (total, loss))
    returned = output.args[0]
    codegen: Any = graph._codegen
    if hasattr(codegen, "pytree_info"):  # the calling convention of an exported program
        output.args = ((*returned, total),)  # type: ignore[misc]
        spec = pytree.treespec_tuple([codegen.pytree_info.out_spec, pytree.treespec_leaf()])
        graph.set_codegen(type(codegen)(codegen.pytree_info._replace(out_spec=spec)))
    else:
        output.args = ((returned, total),)
