from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.operators import op_name
from moeify.tracing.trace import trace


class Apply(nn.Module):
    """A function of x (2, 5, 12) and, for products, of one parameter."""

    def __init__(self, function: Callable[..., torch.Tensor], *weight_shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.empty(*weight_shape or (1,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


def last_node(function: Callable[..., torch.Tensor], *weight_shape: int, x: torch.Tensor | None = None) -> fx.Node:
    gm = trace(Apply(function, *weight_shape), torch.zeros(2, 5, 12) if x is None else x)
    return gm.graph.output_node().all_input_nodes[0]


ROW_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "silu": lambda x, w: F.silu(x),
    "a learned scale": lambda x, w: x * w,
    "a power": lambda x, w: x**2,
    "a clamp": lambda x, w: x.clamp(-1, 1),
    "layer norm over the row": lambda x, w: F.layer_norm(x, (12,)),
    "rms norm over the row": lambda x, w: F.rms_norm(x, (12,)),
    "softmax over the row": lambda x, w: x.softmax(-1),
    "a mean over the row": lambda x, w: x.mean(2, keepdim=True),
    "half of the row": lambda x, w: x[..., :6],
    "glu": lambda x, w: F.glu(x, -1),
    "two rows side by side": lambda x, w: torch.cat([x, x], -1),
    "rows in a list": lambda x, w: x.reshape(10, 12),
    "dropout": lambda x, w: F.dropout(x, training=False),
}
NOT_ROW_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax over positions": lambda x, w: x.softmax(1),
    "layer norm over positions too": lambda x, w: F.layer_norm(x, (5, 12)),
    "a mean over positions": lambda x, w: x.mean(1, keepdim=True),
    "the first positions": lambda x, w: x[:, :2],
    "positions side by side": lambda x, w: torch.cat([x, x], 1),
    "positions swapped": lambda x, w: x.transpose(0, 1),
    "rows cut in heads": lambda x, w: x.reshape(2, 5, 3, 4),
    "rows regrouped": lambda x, w: x.reshape(2, 4, 15),
    "a cumulative sum over positions": lambda x, w: x.cumsum(1),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x),
    "a roll over positions": lambda x, w: x.roll(1, 1),
}


@pytest.mark.parametrize("function", ROW_WISE.values(), ids=ROW_WISE)
def test_operators_that_keep_to_the_row(function: Callable[..., torch.Tensor]) -> None:
    assert flow.is_position_wise(last_node(function, 12))


@pytest.mark.parametrize("function", NOT_ROW_WISE.values(), ids=NOT_ROW_WISE)
def test_operators_that_mix_or_move_positions(function: Callable[..., torch.Tensor]) -> None:
    assert not flow.is_position_wise(last_node(function, 12))


def test_static_values_depend_on_parameters_and_constants_only() -> None:
    node = last_node(lambda x, w: x + F.softplus(w), 12)
    activation, scale = node.all_input_nodes
    memo: dict[fx.Node, bool] = {}
    assert flow.is_static(scale, memo)
    assert not flow.is_static(activation, memo)
    assert not flow.is_static(node, memo)


def test_the_same_activation_behind_casts_and_flattening() -> None:
    node = last_node(lambda x, w: F.dropout(x.tanh().reshape(10, 12), training=False).to(torch.float64))
    assert op_name(flow.same_activation(node)) == "tanh"


def test_a_regrouped_row_is_another_activation() -> None:
    node = last_node(lambda x, w: x.tanh().reshape(2, 4, 15))
    assert flow.same_activation(node) is node


def test_module_stack_names_the_modules_around_a_node() -> None:
    gm = trace(nn.Sequential(nn.Sequential(nn.Tanh())), torch.zeros(3, 12))
    assert flow.module_stack(gm.graph.output_node().all_input_nodes[0])[-1] == "0.0"
