"""Turn the sparse layers of a graph into operators, and choose what runs the experts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.kernels import reference
from moeify.layers import MoELayer
from moeify.passes.base import PassResult
from moeify.passes.insert_losses import call_with_loss, moe_calls
from moeify.passes.insert_moe import put
from moeify.passes.tidy import drop_unused

IMPLEMENTATIONS = ("auto", "cpu", "triton", "reference")


@dataclass(frozen=True)
class Lower:
    """Write the sparse layers out as operators: the router's products, top-k, and one operator for the experts.

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

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        plain = moe_calls(graph_module)
        with_loss = graph.find_nodes(op="call_function", target=call_with_loss)
        bodies = {node: self._export(graph_module, node) for node in (*plain, *with_loss)}
        for node, body in bodies.items():
            self._write_out(graph_module, node, body)
        drop_unused(graph_module, keep=())
        graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, modified=bool(bodies))

    def _export(self, graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
        """Trace a layer for activations of any leading shape."""
        layer = graph_module.get_submodule(_path(node))
        device = next(chain(layer.parameters(), layer.buffers())).device
        examples = {name: _example(each, device) for name, each in _inputs(node).items()}
        free = {
            name: {d: torch.export.Dim.AUTO for d in range(2 if name != "x" else each.dim() - 1) if each.shape[d] > 1}
            for name, each in examples.items()
        }
        module: nn.Module = _Called(layer) if node.target is call_with_loss else _Plain(layer)
        module.train(layer.training)
        program = torch.export.export(module, (), examples, dynamic_shapes=free, strict=False)
        return program.module(check_guards=False)

    def _write_out(self, graph_module: fx.GraphModule, node: fx.Node, body: fx.GraphModule) -> None:
        """Put a layer's operators in the place of its call."""
        graph, path = graph_module.graph, _path(node)
        values: dict[fx.Node, Any] = dict(
            zip(body.graph.find_nodes(op="placeholder"), _inputs(node).values(), strict=True)
        )
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "output":
                    results = fx.map_arg(inner.args[0], values.__getitem__)
                elif inner.op != "placeholder":
                    values[inner] = copied = graph.node_copy(inner, values.__getitem__)
                    if inner.op in {"get_attr", "call_module"}:
                        copied.target = f"{path}.{str(inner.target).removeprefix('layer.')}"
                        block = getattr(body, str(inner.target), None)
                        if isinstance(block, fx.GraphModule):  # what the layer does `with torch.no_grad()`
                            put(graph_module, copied.target, block)
                    elif inner.target is torch.ops.moeify.experts.default:
                        self._choose(copied)
        _use(graph, node, results)

    def _choose(self, node: fx.Node) -> None:
        """Set what runs the experts."""
        *inputs, activation, gated, _ = node.args
        if self.implementation == "reference":
            node.target, node.args = reference.experts, (*inputs, activation, gated)
        else:
            node.args = (*inputs, activation, gated, self.implementation)


class _Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.layer(x, token_ids, mask),)


class _Called(_Plain):
    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        assert isinstance(self.layer, MoELayer)
        return call_with_loss(self.layer, x, token_ids, mask)


def _path(node: fx.Node) -> str:
    """Where a call's layer lies."""
    called = node.target if node.op == "call_module" else node.all_input_nodes[0].target
    return str(called)


def _inputs(node: fx.Node) -> dict[str, Any]:
    """What a call gives to the layer's forward, by name."""
    return {"x": node.args[-1], **node.kwargs}


def _example(node: fx.Node, device: torch.device) -> Tensor:
    """Zeros shaped as the traced value; where a size was free, any."""
    value: Tensor = node.meta["val"]
    return torch.zeros([d if isinstance(d, int) else 7 for d in value.shape], device=device, dtype=value.dtype)


def _use(graph: fx.Graph, node: fx.Node, results: tuple[fx.Node, ...]) -> None:
    if node.op == "call_module":
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)
