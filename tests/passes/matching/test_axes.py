from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from moeify.passes.matching.axes import axis_after, axis_before, reads_features
from moeify.tracing.trace import trace
from tests.passes.blocks import HIDDEN, TOKENS, Mlp, find, only_reason

Turn = Callable[[Tensor], Tensor]


class Mixer(nn.Module):
    """MLP-Mixer's block: an MLP over the positions, then one over the channels."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.norm, self.turn = nn.LayerNorm(HIDDEN), turn
        self.tokens, self.channels = Mlp(TOKENS, 9), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.turn(self.tokens(self.turn(self.norm(x))))
        out: Tensor = x + self.channels(self.norm(x))
        return out


TURNS: dict[str, Turn] = {
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(-1, -2),
    "permute": lambda x: x.permute(0, 2, 1),
    "movedim": lambda x: x.movedim(1, 2),
    "mT": lambda x: x.mT,
    "twice, and once more": lambda x: x.permute(2, 0, 1).permute(1, 0, 2),
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_token_mixing_is_no_ffn_and_channel_mixing_is(turn: Turn) -> None:
    found = find(Mixer(turn))
    assert [ffn.name for ffn in found.ffns] == ["channels"]
    assert only_reason(found, "tokens.down") == "it projects over positions, not over features: token mixing"


class Origin(nn.Module):
    """An activation made by `function` from an embedding, a norm, a convolution or the input."""

    def __init__(self, function: Callable[[Origin, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed, self.norm = nn.Embedding(17, HIDDEN), nn.LayerNorm(HIDDEN)
        self.conv, self.group = nn.Conv1d(TOKENS, TOKENS, 3, padding=1), nn.GroupNorm(1, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


IDS = torch.zeros(2, TOKENS, dtype=torch.int64)
X = torch.zeros(2, TOKENS, HIDDEN)
IMAGE = torch.zeros(2, HIDDEN, 3, TOKENS)
# What is read, along which dimension, and whether that holds features.
ORIGINS: dict[str, tuple[Tensor, Callable[[Origin, Tensor], Tensor], int, bool]] = {
    "an embedding": (IDS, lambda m, x: m.embed(x), -1, True),
    "an embedding, over positions": (IDS, lambda m, x: m.embed(x), -2, False),
    "an embedding, turned": (IDS, lambda m, x: m.embed(x).transpose(1, 2), -1, False),
    "an embedding, turned, along the features": (IDS, lambda m, x: m.embed(x).transpose(1, 2), -2, True),
    "a norm, turned": (X, lambda m, x: m.norm(x).mT.relu(), -1, False),
    "a convolution": (X, lambda m, x: m.conv(x).relu(), -2, True),
    "a convolution, turned": (X, lambda m, x: m.conv(x).transpose(1, 2), -1, True),
    "a convolution, over positions": (X, lambda m, x: m.conv(x).relu(), -1, False),
    "a group norm": (X, lambda m, x: m.group(x), -2, True),
    "the input": (X, lambda m, x: x.relu(), -1, True),
    "the input, turned": (X, lambda m, x: x.transpose(1, 2).relu(), -2, True),
    "the input, turned, along its last dimension": (X, lambda m, x: x.transpose(1, 2), -1, False),
    "an image that is turned first": (IMAGE, lambda m, x: x.permute(0, 2, 3, 1), -1, True),
    "positions in a list": (X, lambda m, x: m.norm(x).mT.flatten(0, 1).relu(), -1, False),
    "a norm's weight first": (X, lambda m, x: m.norm.weight[:, None] * m.norm(x).mT, -1, False),
    "joined with something else": (X, lambda m, x: m.norm(x).mT.reshape(2, -1), -1, True),
}


@pytest.mark.parametrize(("x", "function", "axis", "expected"), ORIGINS.values(), ids=ORIGINS)
def test_where_the_features_lie(
    x: Tensor, function: Callable[[Origin, Tensor], Tensor], axis: int, expected: bool
) -> None:
    output = trace(Origin(function), x).graph.output_node().all_input_nodes[0]
    assert reads_features(output, axis, ()) == expected


def test_a_projection_writes_features_last() -> None:
    graph = trace(nn.Linear(HIDDEN, 7), X).graph
    (node,) = graph.output_node().all_input_nodes
    assert reads_features(node, -1, {node})
    assert not reads_features(node, -2, {node})


def _ones(x: Tensor, *sizes: int) -> Tensor:
    return torch.ones(sizes, dtype=x.dtype, device=x.device)


# Of (3, 4, 5, 6), which no two dimensions share a size of.
FOLLOWED: dict[str, Turn] = {
    "an elementwise operator": lambda x: x.sin(),
    "a broadcast to more dimensions": lambda x: x * _ones(x, 7, 1, 1, 1, 1),
    "a new dimension": lambda x: x.unsqueeze(-2),
    "a selection": lambda x: x[:, 1],
    "a transposition": lambda x: x.permute(2, 0, 3, 1),
    "joined dimensions": lambda x: x.flatten(1, 2),
    "a sum": lambda x: x.sum(1),
    "a mean that keeps its dimension": lambda x: x.mean(2, keepdim=True),
    "a stack": lambda x: torch.stack([x, x], 1),
    "the first factor of a product": lambda x: x @ _ones(x, 6, 2),
    "the second factor of a product": lambda x: _ones(x, 2, 5) @ x,
    "a factor beside a vector": lambda x: x @ _ones(x, 6),
    "a factor after a vector": lambda x: _ones(x, 5) @ x,
    "a stack of products": lambda x: torch.bmm(_ones(x, 4, 2, 5), x[0]),
    "a linear layer": lambda x: torch.nn.functional.linear(x, _ones(x, 2, 6)),
    "an einsum": lambda x: torch.einsum("abcd, ca -> dbc", x, _ones(x, 5, 3)),
    "an einsum without a result": lambda x: torch.einsum("dcba,bf", x, _ones(x, 5, 2)),
    "an einsum of any number of dimensions": lambda x: torch.einsum("...d,n...->n...", x, _ones(x, 2, 1, 5)),
}


@pytest.mark.parametrize("function", FOLLOWED.values(), ids=FOLLOWED)
def test_where_an_operator_leaves_a_dimension(function: Turn) -> None:
    """A change at one index of the input reaches one index of the dimension that follows from it, and all of others."""

    class Followed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.rand(3, 4, 5, 6, dtype=torch.float64) + 1
    graph = trace(Followed(), x).graph
    source = next(node for node in graph.nodes if node.op == "placeholder")
    (result,) = graph.output_node().all_input_nodes
    for axis in range(-4, 0):
        changed = x.clone()
        changed.select(axis, 1).mul_(2)
        reached = function(changed) != function(x)
        at = [
            dim
            for dim in range(-reached.dim(), 0)
            if reached.shape[dim] == x.shape[axis]
            and reached.transpose(0, dim).flatten(1).any(1).tolist() == [i == 1 for i in range(x.shape[axis])]
        ]
        node: fx.Node = source
        found: int | None = axis
        for user in _path(source, result):
            after = axis_after(node, user, found)
            assert after is None or axis_before(user, node, after) in {found, None}  # None: not known
            node, found = user, after
            if found is None:
                break
        assert ([] if found is None else [found]) == at, axis


def _path(source: fx.Node, result: fx.Node) -> list[fx.Node]:
    """The operators from an input to the result."""
    path = [source]
    while path[-1] is not result:
        path.append(next(iter(path[-1].users)))
    return path[1:]
