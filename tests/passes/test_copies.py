"""Copies of a graph: what they share, keep and leave out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.passes.base import copy_graph
from tests.passes.blocks import HIDDEN, TOKENS, exported


class Buffers(nn.Module):
    block: Any

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.register_buffer("kept", torch.ones(10))
        self.block.register_buffer("made", torch.ones(10), persistent=False)
        self.block.unread = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.block.kept + self.block.made
        return out


def test_a_copy_keeps_modes_and_what_is_saved_and_leaves_out_what_no_node_names() -> None:
    given = exported(Buffers())
    given.graph.eliminate_dead_code()
    given.get_submodule("block").training = False
    given.training = True
    copied = copy_graph(given)
    assert str(copied.graph) == str(given.graph) and copied.graph is not given.graph
    assert list(copied.state_dict()) == ["block.kept"]
    assert copied.get_buffer("block.made") is given.get_buffer("block.made")
    assert (copied.training, copied.get_submodule("block").training) == (True, False)
    x = torch.randn(2, TOKENS, HIDDEN)
    assert torch.equal(copied(x), given(x))


def test_a_copy_keeps_the_order_of_names_and_tensors_that_are_plain_attributes() -> None:
    root: Any = nn.Module()
    root.block = nn.Linear(3, 3)  # bias after weight, and read before it
    root.block.scale = torch.full((3,), 2.0)  # fx makes a buffer of it
    graph = fx.Graph()
    given_x, bias = graph.placeholder("x"), graph.get_attr("block.bias")
    scaled = graph.call_function(torch.mul, (given_x, graph.get_attr("block.scale")))
    added = graph.call_function(torch.add, (scaled, bias))
    graph.output(graph.call_function(torch.matmul, (added, graph.get_attr("block.weight"))))
    given = fx.GraphModule(root, graph)
    given.block = root.block
    copied = copy_graph(copy_graph(given))
    assert list(copied.state_dict()) == ["block.weight", "block.bias", "block.scale"]
    x = torch.randn(2, 3)
    assert torch.equal(copied(x), given(x))
