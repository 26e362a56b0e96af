"""Put an MoE layer where a dense FFN stood in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import fx, nn

from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.layers.build import layer_in
from moeify.passes.base import PassError, Rewrite
from moeify.passes.ffn import FFN, Call
from moeify.passes.find_ffn import findings
from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.activation import CUSTOM
from moeify.passes.matching.region import bind
from moeify.passes.token_inputs import token_arguments
from moeify.plan import Plan, Site


@dataclass(frozen=True)
class InsertMoE(Rewrite):
    """Replace dense FFNs by MoE layers: router and experts in one module, called once.

    Before:
        %up   = linear(%x, mlp.up.weight)
        %act  = silu(%up)
        %down = linear(%act, mlp.down.weight)
        %out  = add(%x, %down)

    After:
        %moe  = mlp(%x)        a SparseMoE: mlp.router.weight, mlp.experts.up_proj, mlp.experts.down_proj
        %out  = add(%x, %moe)

    The layers hold zeros: whoever runs the pass fills in the values. Experts of a frozen FFN are frozen. Where the
    graph has inputs named `input_ids` and `attention_mask`, the layers are given those too.

    Refuses: a graph that FindFFN has not searched; a site for which it found no FFN; an FFN whose result has another
    shape than its input; a router that needs token ids where the graph has no input named `input_ids`; a parameter of
    an FFN, or another one in its module, that something else reads.

    Attributes:
        plan: What to replace, and where each layer is put.
    """

    plan: Plan

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check every site."""
        for site, ffn in self._matches(graph_module):
            for call in ffn.calls:
                _check_shape(ffn, call)
                _check_tokens(graph_module.graph, ffn, call, self.plan)
            _check_accounted_for(graph_module.graph, ffn, site)

    def rewrite(self, draft: fx.GraphModule) -> bool:
        """Build the layers, and walk once over all calls.

        From the last call to the first: an FFN may read the result of another one, which must be there still.
        """
        matches = self._matches(draft)
        layers = {site.path: _layer(draft, ffn, site, self.plan) for site, ffn in matches}
        calls = [(call, site.path) for site, ffn in matches for call in ffn.calls]
        for call, path in sorted(calls, key=lambda each: each[0].down.node, reverse=True):
            _replace(draft.graph, call, path)
        for path, layer in layers.items():
            put(draft, path, layer)
        return bool(layers)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that every layer is called, and that no node reads a dense weight."""
        called = {str(node.target) for node in graph_module.graph.find_nodes(op="call_module")}
        read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
        for site in self.plan.sites:
            if site.path not in called or read.intersection(site.parameters):
                raise PassError(f"{self}: the FFN of {site.path} is still computed in the graph")

    def _matches(self, graph_module: fx.GraphModule) -> list[tuple[Site, FFN]]:
        """Return each site with its FFN in the graph."""
        found = {ffn.down.weight: ffn for ffn in findings(graph_module).ffns}
        for site in self.plan.sites:
            if site.down.parameter not in found:
                reason = f"the graph has no FFN that ends in {site.down.parameter}: make the plan from this graph"
                raise RefusedError(f"{site.path}: {reason}")
        return [(site, found[site.down.parameter]) for site in self.plan.sites]


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Set a submodule, making the modules around it where there are none."""
    *outer, name = path.split(".")
    for step in outer:
        if not isinstance(getattr(root, step, None), nn.Module):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    root.add_module(name, layer)


def _check_shape(ffn: FFN, call: Call) -> None:
    read, written = flow.shape(call.source), flow.shape(call.down.node)
    if read != written:
        raise RefusedError(f"{ffn.name}: it reads {read} and writes {written}; only the list of positions may differ")


def _check_tokens(graph: fx.Graph, ffn: FFN, call: Call, plan: Plan) -> None:
    if plan.config.router.needs_token_ids and "token_ids" not in token_arguments(graph, call.source):
        raise RefusedError(
            f"{ffn.name}: hash routing needs the token ids, and its activations (batch, length, hidden) are made from "
            "no input `input_ids` (batch, length) of the graph: name it so, or choose another router"
        )


def _check_accounted_for(graph: fx.Graph, ffn: FFN, site: Site) -> None:
    """Refuse to replace what something else reads: a weight of the FFN, or another parameter in its module."""
    inside = {node for call in ffn.calls for node in call.inside}
    static: dict[fx.Node, bool] = {}
    for node in (*graph.find_nodes(op="get_attr"), *graph.find_nodes(op="call_module")):
        name = str(node.target)
        pending = [node] if name in site.parameters or f"{name}.".startswith(f"{site.path}.") else []
        while pending:
            for user in [user for user in pending.pop().users if user not in inside]:
                if not flow.is_static(user, static):
                    reason = f"`{user.name}`, which is no part of its FFN, reads {name}"
                    raise RefusedError(f"{site.path}: {reason}: hold that in another module, or leave out this FFN")
                pending.append(user)


def _layer(graph_module: fx.GraphModule, ffn: FFN, site: Site, plan: Plan) -> MoELayer:
    """Make the layer of a site, with zeros."""

    def read(name: str) -> torch.Tensor:
        value: torch.Tensor = attrgetter(name)(graph_module)
        return value

    region = bind(ffn.region, read) if site.activation == CUSTOM else None
    return layer_in(graph_module, site, plan, region).train(graph_module.training)


def _replace(graph: fx.Graph, call: Call, path: str) -> None:
    """Call the layer instead of the FFN, and erase the FFN's nodes."""
    down, source, axis = call.down.node, call.source, call.down.axis
    with graph.inserting_before(down):
        x = source if axis == -1 else _move(graph, source, axis, -1)
        # graph.call_module wants the module to be there already
        layer = graph.create_node("call_module", path, (x,), {**token_arguments(graph, source)})
        result = layer if axis == -1 else _move(graph, layer, -1, axis)
    for node in {x, layer, result} - {source}:
        value = down.meta["val"]
        node.meta = {"nn_module_stack": down.meta.get("nn_module_stack", {})}
        node.meta["val"] = value if node is result else value.movedim(axis, -1)
    down.replace_all_uses_with(result)
    idle = {user for node in call.inside for user in node.users if user not in flow.data_users(node)}
    for node in sorted(idle.union(call.inside), reverse=True):
        if not node.users:
            graph.erase_node(node)


def _move(graph: fx.Graph, node: fx.Node, source: int, destination: int) -> fx.Node:
    return graph.call_function(torch.ops.aten.movedim.int, (node, source, destination))
