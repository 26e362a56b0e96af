"""Let a graph return the losses of its MoE layers."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from moeify.layers import MoELayer
from moeify.passes.base import PassError, Rewrite
from moeify.routing.balance import layer_losses, weighted_sum
from moeify.routing.record import Routing


@dataclass(frozen=True)
class InsertLosses(Rewrite):
    """Return the balancing losses and z-losses of the MoE layers beside the result, with their coefficients.

    Before:
        %moe    = mlp(%x)
        return (%logits,)

    After:
        %both   = call_with_loss(%mlp, %x)
        %moe    = getitem(%both, 0)
        %loss   = getitem(%both, 1)
        return ((%logits,), %loss)

    The graph returns a pair then: what it returned before, and the sum of the losses, ().

    Refuses: nothing; a graph without MoE layers is left as it is.
    """

    def rewrite(self, draft: fx.GraphModule) -> bool:
        """Let each layer return its loss, and add them up."""
        losses = [_with_loss(draft.graph, node) for node in moe_calls(draft)]
        if losses:
            _return(draft.graph, losses)
        return bool(losses)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that no layer keeps its loss to itself."""
        if moe_calls(graph_module):
            raise PassError(f"{self}: a layer is still called without its loss")


def moe_calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that call an MoE layer."""
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
        losses = layer_losses(kept[0], layer.config, mask_T=mask_T, sequences=sequences)
        loss = weighted_sum(losses, layer.config, layer.loss_share)
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
    """Return a pair: the result, and the sum of the losses."""
    output = graph.output_node()
    with graph.inserting_before(output):
        total = losses[0]
        for loss in losses[1:]:
            total = graph.call_function(torch.ops.aten.add.Tensor, (total, loss))
    returned, codegen = output.args[0], graph._codegen
    info = codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None
    if info and info.out_spec and isinstance(returned, list | tuple):  # the calling convention of an exported program
        output.args = ((*returned, total),)
        spec = pytree.treespec_tuple([info.out_spec, pytree.treespec_leaf()])
        graph.set_codegen(_PyTreeCodeGen(info._replace(out_spec=spec)))
    else:
        output.args = ((returned, total),)
