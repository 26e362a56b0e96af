"""Put a sparse layer where a dense FFN stood in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.passes import dataflow as flow
from moeify.passes.base import PassResult
from moeify.passes.ffn import FFN
from moeify.passes.find_ffn import FindFFN
from moeify.passes.tidy import drop_unused
from moeify.passes.token_inputs import token_arguments


@dataclass(frozen=True)
class InsertMoE:
    """Replace dense FFNs by sparse layers: router and experts in one module, called once.

    Before:
        %up   = linear(%x, mlp.up.weight)
        %act  = silu(%up)
        %down = linear(%act, mlp.down.weight)
        %out  = add(%x, %down)

    After:
        %moe  = mlp(%x)        a SparseMoE: mlp.router.weight, mlp.experts.up_proj, mlp.experts.down_proj
        %out  = add(%x, %moe)

    Where the graph has inputs named `input_ids` and `attention_mask`, the layers are handed those too.

    Refuses: a layer for an FFN that the graph does not have; a graph in which the FFN's result has another shape than
    its input; hash routing where the graph has no input named `input_ids`.

    Attributes:
        layers: The layer for each FFN, by the name of the weight that leads back.
        paths: Where each layer is put, by the same names.
    """

    layers: Mapping[str, nn.Module] = field(repr=False)
    paths: Mapping[str, str]

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place; dense parameters that nothing reads any more are dropped.

        Raises:
            RefusedError: see above; the graph is as it was.
        """
        found = {ffn.down.weight: ffn for ffn in FindFFN()(graph_module).ffns}
        for name in self.layers:
            if name not in found:
                raise RefusedError(f"the graph has no FFN that ends in {name}: make the layers from what FindFFN found")
            _check_shape(found[name])
            _check_tokens(graph_module.graph, found[name], self.layers[name])
        for name in self.layers:
            for _ in range(found[name].calls):
                (ffn,) = [f for f in FindFFN()(graph_module).ffns if f.down.weight == name]
                _replace(graph_module.graph, ffn, self.paths[name])
        drop_unused(graph_module, keep=())
        for name, layer in self.layers.items():
            put(graph_module, self.paths[name], layer)
        graph_module.recompile()
        return PassResult(graph_module, modified=bool(self.layers))


def put(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Set a submodule, making the modules around it where there are none."""
    *outer, name = path.split(".")
    for step in outer:
        if not isinstance(getattr(root, step, None), nn.Module):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    root.add_module(name, layer)


def _check_shape(ffn: FFN) -> None:
    read, written = flow.shape(ffn.ups[0].source), flow.shape(ffn.down.node)
    if read != written:
        raise RefusedError(f"{ffn.name}: it reads {read} and writes {written}; only the list of positions may differ")


def _check_tokens(graph: fx.Graph, ffn: FFN, layer: nn.Module) -> None:
    routed_by_id = isinstance(layer, MoELayer) and layer.config.router.needs_token_ids
    if routed_by_id and "token_ids" not in token_arguments(graph, ffn.ups[0].source):
        raise RefusedError(
            f"{ffn.name}: hash routing needs the token ids, and its activations (batch, length, hidden) are made from "
            "no input `input_ids` (batch, length) of the graph: name it so, or choose another router"
        )


def _replace(graph: fx.Graph, ffn: FFN, path: str) -> None:
    """Call the layer instead of the FFN, and erase the FFN's nodes."""
    down, source, axis = ffn.down.node, ffn.ups[0].source, ffn.down.axis
    with graph.inserting_before(down):
        rows = source if axis == -1 else _move(graph, source, axis, -1)
        # graph.call_module wants the module to be there already
        call = graph.create_node("call_module", path, (rows,), {**token_arguments(graph, source)})
        result = call if axis == -1 else _move(graph, call, -1, axis)
    for node in {rows, call, result} - {source}:
        value = down.meta["val"]
        node.meta = {"nn_module_stack": down.meta.get("nn_module_stack", {})}
        node.meta["val"] = value if node is result else value.movedim(axis, -1)
    down.replace_all_uses_with(result)
    inside = [n for p in (*ffn.ups, ffn.down) for n in (p.product, p.node)] + list(ffn.nodes)
    _erase(graph, inside)


def _move(graph: fx.Graph, node: fx.Node, source: int, destination: int) -> fx.Node:
    return graph.call_function(torch.ops.aten.movedim.int, (node, source, destination))


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase nodes, and what checks or takes apart their values, last first."""
    doomed = {*nodes, *(user for node in nodes for user in node.users if user not in flow.data_users(node))}
    for node in reversed(list(graph.nodes)):
        if node in doomed and not node.users:
            graph.erase_node(node)
