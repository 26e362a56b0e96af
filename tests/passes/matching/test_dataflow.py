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


POSITION_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "silu": lambda x, w: F.silu(x),
    "a learned scale": lambda x, w: x * w,
    "a power": lambda x, w: x**2,
    "a clamp": lambda x, w: x.clamp(-1, 1),
    "layer norm over the features": lambda x, w: F.layer_norm(x, (12,)),
    "rms norm over the features": lambda x, w: F.rms_norm(x, (12,)),
    "softmax over the features": lambda x, w: x.softmax(-1),
    "a mean over the features": lambda x, w: x.mean(2, keepdim=True),
    "a value for each position, expanded": lambda x, w: x[..., :1].expand_as(x),
    "half of the features": lambda x, w: x[..., :6],
    "glu": lambda x, w: F.glu(x, -1),
    "features side by side": lambda x, w: torch.cat([x, x], -1),
    "positions in a list": lambda x, w: x.reshape(10, 12),
    "dropout": lambda x, w: F.dropout(x, training=False),
}
NOT_POSITION_WISE: dict[str, Callable[..., torch.Tensor]] = {
    "softmax over positions": lambda x, w: x.softmax(1),
    "layer norm over positions too": lambda x, w: F.layer_norm(x, (5, 12)),
    "rms norm over positions too": lambda x, w: F.rms_norm(x, (5, 12)),
    "a mean over positions": lambda x, w: x.mean(1, keepdim=True),
    "the first positions": lambda x, w: x[:, :2],
    "positions side by side": lambda x, w: torch.cat([x, x], 1),
    "a value for each sequence, expanded": lambda x, w: x[:, :1].expand_as(x),
    "positions swapped": lambda x, w: x.transpose(0, 1),
    "features cut in heads": lambda x, w: x.reshape(2, 5, 3, 4),
    "features regrouped": lambda x, w: x.reshape(2, 4, 15),
    "a cumulative sum over positions": lambda x, w: x.cumsum(1),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x),
    "a roll over positions": lambda x, w: x.roll(1, 1),
}


@pytest.mark.parametrize("function", POSITION_WISE.values(), ids=POSITION_WISE)
def test_operators_that_keep_to_the_position(function: Callable[..., torch.Tensor]) -> None:
    assert flow.is_position_wise(last_node(function, 12))


@pytest.mark.parametrize("function", NOT_POSITION_WISE.values(), ids=NOT_POSITION_WISE)
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


def test_regrouped_features_are_another_activation() -> None:
    node = last_node(lambda x, w: x.tanh().reshape(2, 4, 15))
    assert flow.same_activation(node) is node


def test_module_stack_names_the_modules_around_a_node() -> None:
    gm = trace(nn.Sequential(nn.Sequential(nn.Tanh())), torch.zeros(3, 12))
    assert flow.module_stack(gm.graph.output_node().all_input_nodes[0])[-1] == "0.0"


CHANNELS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "a function": (lambda x, w: x.sin(), True),
    "half of the channels": (lambda x, w: x.chunk(2, 1)[0], True),
    "half of the columns": (lambda x, w: x.chunk(2, 3)[0], False),
    "a softmax over the channels": (lambda x, w: x.softmax(-3), True),
    "slopes for the channels": (lambda x, w: F.prelu(x, w), True),
    "a norm over the last dimension": (lambda x, w: F.layer_norm(x, (4,)), False),
    "pixels in a list": (lambda x, w: x.flatten(2), False),
}


@pytest.mark.parametrize(("function", "expected"), CHANNELS.values(), ids=CHANNELS)
def test_channels_may_be_the_features(function: Callable[..., torch.Tensor], expected: bool) -> None:
    node = last_node(function, 6, x=torch.zeros(2, 6, 3, 4))
    assert flow.is_position_wise(node, axis=-3) == expected


def test_slopes_for_positions_are_not_position_wise_and_one_slope_is() -> None:
    assert not flow.is_position_wise(last_node(lambda x, w: F.prelu(x, w), 5))
    assert flow.is_position_wise(last_node(lambda x, w: F.prelu(x, w), 1))


def test_arguments_have_the_names_and_defaults_of_the_schema() -> None:
    node = last_node(lambda x, w: x.sum(2, keepdim=True))
    given = flow.arguments(node)
    assert (given["dim"], given["keepdim"], given["dtype"]) == ([2], True, None)
    assert str(given["self"]) == "x"
    assert flow.arguments(node.all_input_nodes[0]) == {}


def test_sizes_and_shapes() -> None:
    node = last_node(lambda x, w: x + w, 12)
    assert flow.shape(node) == (2, 5, 12)
    assert [flow.size(node, axis) for axis in (-1, -2, -3, -4)] == [12, 5, 2, 0]
    split = last_node(lambda x, w: x.split(6, -1)[0]).all_input_nodes[0]
    assert (flow.shape(split), flow.size(split)) == ((), 0)


def test_sizes_that_depend_on_data_are_equal_only_to_themselves() -> None:
    shape = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Apply(lambda x, w: x + w), (torch.zeros(3, 5, 12),), dynamic_shapes=(shape["x"],))
    node = program.module(check_guards=False).graph.output_node().all_input_nodes[0]
    first, second, third = flow.shape(node)
    assert first < 0 and second < 0 and first != second and third == 12
    assert flow.shape(node.all_input_nodes[0]) == flow.shape(node)


def test_checks_and_unused_parts_of_a_split_use_no_value() -> None:
    node = last_node(lambda x, w: x.tanh().split(6, -1)[1])
    split = node.all_input_nodes[0]
    graph = node.graph
    with graph.inserting_after(split):
        graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (split,))
    assert len(split.users) == 3
    assert flow.data_users(split) == [node]


def test_operators_that_write_in_place() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert flow.writes(graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)))
    assert not flow.writes(graph.call_function(torch.ops.aten.add.Tensor, (x, 1)))
    assert not flow.writes(x)


def test_the_innermost_module_around_nodes() -> None:
    gm = trace(nn.Sequential(nn.Sequential(nn.Tanh(), nn.ReLU()), nn.Sigmoid()), torch.zeros(3, 12))
    tanh, relu, sigmoid = (node for node in gm.graph.nodes if node.op == "call_function")
    assert flow.innermost_module([tanh]) == "0.0"
    assert flow.innermost_module([tanh, relu]) == "0"
    assert flow.innermost_module([tanh, relu, sigmoid]) == flow.innermost_module([]) == ""


def test_ancestors_and_the_last_matrix() -> None:
    node = last_node(lambda x, w: F.linear(x.tanh(), w.t()), 12, 7)
    assert {ancestor.op for ancestor in flow.ancestors(node)} == {"call_function", "get_attr", "placeholder"}
    assert op_name(flow.last_matrix(node)) == "t"
