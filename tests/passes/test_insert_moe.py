from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify.config import MoEConfig
from moeify.layers import SparseMoE
from moeify.passes.find_ffn import find_ffns_in
from moeify.passes.insert_moe import InsertMoE, put
from moeify.routers import Hash
from tests.passes.blocks import CONFIG, HIDDEN, INTERMEDIATE, TOKENS, Mlp, Model, exported, planned, residual, twice


def inserted(model: nn.Module, config: MoEConfig = CONFIG, *inputs: Tensor) -> fx.GraphModule:
    given = exported(model, *inputs)
    return InsertMoE(planned(given, config))(given).graph_module


def layers_of(graph_module: fx.GraphModule) -> dict[str, SparseMoE]:
    return {name: each for name, each in graph_module.named_modules() if isinstance(each, SparseMoE)}


def test_the_graph_before_and_after() -> None:
    given = exported(residual())
    nodes = [node.name for node in given.graph.nodes if node.op == "call_function"]
    assert nodes == ["layer_norm", "linear", "gelu", "linear_1", "add"]
    result = InsertMoE(planned(given))(given)
    calls = [(node.op, node.name) for node in result.graph_module.graph.nodes if node.op.startswith("call")]
    assert result.modified
    assert calls == [("call_function", "layer_norm"), ("call_module", "mlps_0"), ("call_function", "add")]
    expected = ["norm.weight", "norm.bias", "mlps.0.router.weight", "mlps.0.experts.up_proj",
                "mlps.0.experts.down_proj", "mlps.0.experts.up_proj_bias", "mlps.0.experts.down_proj_bias"]  # fmt: skip
    assert sorted(result.graph_module.state_dict()) == sorted(expected)


def test_the_layers_hold_zeros_and_are_called_with_the_shapes_of_the_trace() -> None:
    graph = inserted(residual())
    (layer,) = layers_of(graph).values()
    assert all(not parameter.any() for parameter in layer.parameters())
    (call,) = graph.graph.find_nodes(op="call_module")
    assert call.meta["val"].shape == (2, TOKENS, HIDDEN)
    assert list(call.meta["nn_module_stack"].values())[-1][0].endswith("mlps.0.down"), "where the FFN stood"
    x = torch.randn(2, TOKENS, HIDDEN)
    assert torch.equal(graph(x), x)


def test_an_ffn_that_is_called_twice_has_one_layer_and_two_calls() -> None:
    graph = inserted(Model(twice, Mlp()))
    assert [node.target for node in graph.graph.find_nodes(op="call_module")] == ["mlps.0", "mlps.0"]
    assert list(layers_of(graph)) == ["mlps.0"]


def test_an_ffn_may_read_the_result_of_another_one() -> None:
    def chained(m: Model, x: Tensor) -> Tensor:
        h = m.mlps[0](x)
        out: Tensor = x + (h + m.mlps[1](h))
        return out

    graph = inserted(Model(chained, Mlp(), Mlp()))
    first, second = graph.graph.find_nodes(op="call_module")
    assert (first.target, second.target) == ("mlps.0", "mlps.1")
    assert second.args == (first,)


class Stack(nn.Module):
    """FFNs in a list, whose residual connections are made by whoever calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_a_residual_connection_may_lie_outside_the_graph() -> None:
    assert list(layers_of(inserted(Stack()))) == ["layers.0", "layers.1"]


def test_only_the_ffns_of_the_plan_are_replaced() -> None:
    given = exported(residual(Mlp(), Mlp()))
    graph = InsertMoE(planned(given, layers="1"))(given).graph_module
    assert list(layers_of(graph)) == ["mlps.1"]
    assert {"mlps.0.up.weight", "mlps.0.down.bias"} <= set(graph.state_dict())


class ConvMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.up, self.down = nn.Conv2d(HIDDEN, INTERMEDIATE, 1), nn.Conv2d(INTERMEDIATE, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.silu(self.up(self.mix(x))))
        return out


def test_channels_are_moved_to_the_end_and_back() -> None:
    graph = inserted(ConvMlp(), CONFIG, torch.randn(2, HIDDEN, 6, 7))
    (call,) = graph.graph.find_nodes(op="call_module")
    (before,), (after,) = call.args, call.users
    assert isinstance(before, fx.Node)
    assert (before.args[1:], after.args[1:]) == ((-3, -1), (-1, -3))
    assert (call.meta["val"].shape, after.meta["val"].shape) == ((2, 6, 7, HIDDEN), (2, HIDDEN, 6, 7))


@pytest.mark.parametrize("training", [False, True])
def test_layers_are_in_the_mode_of_the_graph(training: bool) -> None:
    given = exported(residual())
    given.training = training
    (layer,) = layers_of(InsertMoE(planned(given))(given).graph_module).values()
    assert {module.training for module in layer.modules()} == {training}


def trained(layer: nn.Module) -> set[str]:
    return {name for name, parameter in layer.named_parameters() if parameter.requires_grad}


EXPERTS = {"experts.up_proj", "experts.down_proj", "experts.up_proj_bias", "experts.down_proj_bias"}


def test_experts_of_a_frozen_ffn_are_frozen_and_its_router_is_not() -> None:
    model = residual(Mlp(), Mlp(), Mlp())
    model.mlps[0].requires_grad_(False)
    model.mlps[1].requires_grad_(False)
    model.mlps[1].down.bias.requires_grad_(True)
    layers = layers_of(inserted(model))
    assert trained(layers["mlps.0"]) == {"router.weight"}
    assert trained(layers["mlps.1"]) == trained(layers["mlps.2"]) == EXPERTS | {"router.weight"}


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_experts_are_frozen_with_the_others(frozen: bool) -> None:
    model = residual()
    model.mlps.requires_grad_(not frozen)
    (layer,) = layers_of(inserted(model, MoEConfig(4, 2, shared_experts=1))).values()
    shared = {name.replace("experts", "shared_expert") for name in EXPERTS}
    assert trained(layer) - {"router.weight"} == (set() if frozen else EXPERTS | shared)
    assert "router.weight" in trained(layer)


class Learned(nn.Module):
    """A slope for all, and one for each neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.rand(INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        out: Tensor = self.down(self.a * z.relu() + self.b * z)
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_a_learned_activation_is_taken_over_as_it_is(frozen: bool) -> None:
    """Its values, and what of it is trained, whether or not the projections are."""
    model = residual(Learned())
    learned = model.mlps[0]
    for each in (learned.up, learned.down):
        each.requires_grad_(not frozen)
    learned.a.requires_grad_(frozen)
    learned.b.requires_grad_(False)
    (layer,) = layers_of(inserted(model)).values()
    assert torch.equal(layer.experts.get_parameter("region.a"), learned.a)
    assert torch.equal(layer.experts.get_parameter("region.b"), learned.b)
    assert layer.experts.get_parameter("region.b") is not learned.b
    assert trained(layer) == {"router.weight", *({"experts.region.a"} if frozen else EXPERTS)}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ffn = nn.Embedding(17, HIDDEN), Mlp()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        out: Tensor = x + self.ffn(x)
        return out


IDS, MASK = torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)


def test_layers_are_given_the_tokens_of_the_graph() -> None:
    (call,) = inserted(Tagger(), CONFIG, IDS, MASK).graph.find_nodes(op="call_module")
    assert {name: str(node) for name, node in call.kwargs.items()} == {
        "token_ids": "input_ids",
        "mask": "attention_mask",
    }


HASH = MoEConfig(4, 1, router=Hash(vocab_size=17))


def test_a_router_that_needs_token_ids_gets_them() -> None:
    assert list(layers_of(inserted(Tagger(), HASH, IDS, MASK))) == ["ffn"]


def test_what_lies_in_the_module_of_an_ffn_and_is_read_by_nothing_else_goes() -> None:
    mlp = Mlp()
    mlp.extra = nn.Parameter(torch.ones(HIDDEN))
    assert not [name for name in inserted(residual(mlp)).state_dict() if name.endswith("extra")]


def test_put_makes_the_modules_around_a_layer() -> None:
    root = nn.Module()
    root.add_module("kept", nn.Module())
    put(root, "kept.inside", nn.ReLU())
    put(root, "made.all.the.way", nn.Tanh())
    put(root, "kept.inside", nn.Sigmoid())
    assert [name for name, _ in root.named_modules()] == ["", "kept", "kept.inside", "made", "made.all", "made.all.the",
                                                           "made.all.the.way"]  # fmt: skip
    assert isinstance(root.get_submodule("kept.inside"), nn.Sigmoid)


def test_the_graph_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moeify.passes.matching.match import Matcher

    given = exported(residual(*(Mlp() for _ in range(4))))
    plan, searches = planned(given), 0
    original = Matcher.__init__

    def counted(self: Matcher, graph_module: fx.GraphModule) -> None:
        nonlocal searches
        searches += 1
        original(self, graph_module)

    monkeypatch.setattr(Matcher, "__init__", counted)
    InsertMoE(plan)(given)
    assert searches == 0
    assert len(find_ffns_in(given).ffns) == 4 and searches == 1
