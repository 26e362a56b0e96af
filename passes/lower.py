"""Write the MoE layers of a graph out as operators, and choose what runs the experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, fx, nn

from moeify.kernels import reference
from moeify.layers import MoELayer
from moeify.passes.base import PassError, Rewrite
from moeify.passes.insert_losses import call_with_loss, moe_calls
from moeify.passes.insert_moe import put

IMPLEMENTATIONS = ("auto", "cpu", "triton", "reference")


@dataclass(frozen=True)
class Lower(Rewrite):
    """Write the MoE layers out as operators: the router's products, top-k, and one operator for the experts.

    Before:
        %moe     = mlp(%x)

    After:
        %logits  = linear(%x, mlp.router.weight)
        %topk    = topk(%logits, 2)
        …
        %moe     = moeify.experts(%x, %ids, %weights, mlp.experts.up_proj, mlp.experts.down_proj, …, "auto")

    Layers are written out as they are now, in training or in evaluation.

    Refuses: an implementation that it does not know.

    Attributes:
        implementation: "auto" (by device, when it runs), "cpu", "triton", or "reference" (plain torch operators).
    """

    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation is {self.implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")

    def rewrite(self, draft: fx.GraphModule) -> bool:
        """Trace each layer, then put its operators in the place of its call."""
        bodies = {node: _traced(draft, node) for node in _calls(draft)}
        for node, body in bodies.items():
            self._write_out(draft, node, body)
        return bool(bodies)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that no layer is called as a module."""
        if left := _calls(graph_module):
            raise PassError(f"{self}: `{left[0].name}` still calls a layer")

    def _write_out(self, draft: fx.GraphModule, node: fx.Node, body: fx.GraphModule) -> None:
        graph, path = draft.graph, _path(node)
        values = dict(zip(body.graph.find_nodes(op="placeholder"), _inputs(node).values(), strict=True))
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op in {"placeholder", "output"}:
                    continue
                values[inner] = copied = graph.node_copy(inner, values.__getitem__)
                if inner.op in {"get_attr", "call_module"}:
                    _name_from_the_root(draft, path, copied, body)
                elif inner.target is torch.ops.moeify.experts.default:
                    self._choose(copied)
        results = body.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        _use(graph, node, [values[result] for result in results if isinstance(result, fx.Node)])

    def _choose(self, node: fx.Node) -> None:
        """Set what runs the experts."""
        *inputs, activation, gated, _ = node.args
        if self.implementation == "reference":
            node.target, node.args = reference.experts, (*inputs, activation, gated)
        else:
            node.args = (*inputs, activation, gated, self.implementation)


class _Traced(nn.Module):
    """A layer with the outputs that its call has in the graph."""

    def __init__(self, layer: MoELayer, with_loss: bool) -> None:
        super().__init__()
        self.layer, self.with_loss, self.training = layer, with_loss, layer.training

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return call_with_loss(self.layer, x, token_ids, mask) if self.with_loss else (self.layer(x, token_ids, mask),)


def _calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that call a layer, with its loss or without."""
    with_loss = graph_module.graph.find_nodes(op="call_function", target=call_with_loss)
    return [*moe_calls(graph_module), *with_loss]


def _traced(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """Trace a layer for activations of any leading shape."""
    layer = graph_module.get_submodule(_path(node))
    assert isinstance(layer, MoELayer)
    device = next(chain(layer.parameters(), layer.buffers())).device
    examples = {name: _example(each, device) for name, each in _inputs(node).items()}
    free = {
        name: {d: torch.export.Dim.AUTO for d in range(2 if name != "x" else each.dim() - 1) if each.shape[d] > 1}
        for name, each in examples.items()
    }
    module = _Traced(layer, with_loss=node.target is call_with_loss)
    program = torch.export.export(module, (), examples, dynamic_shapes=free, strict=False)
    return program.module(check_guards=False)


def _name_from_the_root(draft: fx.GraphModule, path: str, copied: fx.Node, body: fx.GraphModule) -> None:
    """Let a node read what it reads where the draft holds it."""
    name = str(copied.target)
    if name.startswith("layer."):
        copied.target = path + name.removeprefix("layer")
    else:  # what the layer does `with torch.no_grad()`: beside the layer, which is the caller's
        copied.target = f"{path}_{copied.name}"
        put(draft, copied.target, body.get_submodule(name))


def _path(node: fx.Node) -> str:
    """Return where a call's layer lies."""
    called = node.target if node.op == "call_module" else node.all_input_nodes[0].target
    return str(called)


def _inputs(node: fx.Node) -> Mapping[str, fx.Node]:
    """Return what a call gives to the layer's forward, by name."""
    return cast("Mapping[str, fx.Node]", {"x": node.args[-1], **node.kwargs})


def _example(node: fx.Node, device: torch.device) -> Tensor:
    """Return zeros shaped as the traced value; where a size was free, any."""
    value: Tensor = node.meta["val"]
    return torch.zeros([d if isinstance(d, int) else 7 for d in value.shape], device=device, dtype=value.dtype)


def _use(graph: fx.Graph, node: fx.Node, results: list[fx.Node]) -> None:
    if node.op == "call_module":
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    graph.erase_node(node)
