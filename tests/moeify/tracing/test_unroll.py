"""The graph of a stack from its first blocks is the graph of the whole stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

from moeify.tracing import exporting
from moeify.tracing.blocks import Stack, shortened
from moeify.tracing.trace import trace
from moeify.tracing.unroll import Uneven, unroll


class Block(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x * self.scale))) * other
        return out


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Block() for _ in range(12)])
        self.decoder = nn.ModuleList([Block() for _ in range(13)])

    def forward(self, x: Tensor) -> Tensor:
        encoded = x
        for block in self.encoder:
            encoded = block(encoded, x)
        for block in self.decoder:
            x = block(x, encoded)
        return x + encoded


def form(graph_module: fx.GraphModule) -> list[object]:
    """Everything of a graph but its nodes' names."""
    place = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    return [
        (
            node.op,
            str(node.target),
            str(fx.map_arg((node.args, node.kwargs), lambda operand: place[operand])),
            list(node.meta.get("nn_module_stack", {}).values()),
        )
        for node in place
    ]


def llama() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 50}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=12, **sizes))


@pytest.mark.parametrize("make, inputs", [(llama, None), (TwoStacks, torch.zeros(2, 5, 6))])
def test_an_unrolled_graph_is_the_whole_one(
    make: Callable[[], nn.Module], inputs: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    unrolled = trace(model, inputs)
    monkeypatch.setattr(exporting, "equal_stacks", lambda *_: ())
    whole = trace(model, inputs)
    assert form(unrolled) == form(whole)
    assert unrolled.code.splitlines()[:6] == whole.code.splitlines()[:6]  # it takes the same inputs
    assert {n: p.shape for n, p in unrolled.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}


def test_blocks_that_export_in_different_ways_are_not_repeated() -> None:
    model = TwoStacks()
    model.encoder[2] = nn.Bilinear(6, 6, 6)
    stack = Stack("encoder", model.encoder, tuple(map(str, range(12))))
    with shortened([stack]):
        short = torch.export.export(model, (torch.zeros(5, 6),), strict=False).module(check_guards=False)
    with pytest.raises(Uneven):
        unroll(short, model, stack)
