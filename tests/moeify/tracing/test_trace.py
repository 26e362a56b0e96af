from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from moeify.errors import MoeifyError
from moeify.passes.find_ffn import find_ffns_in
from moeify.tracing.trace import UNTRACED, meta_twin, trace

HIDDEN, INNER = 10, 23


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class Branching(nn.Module):
    """A layer whose way depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        if (x > 3).all():
            return x * 2
        out: Tensor = x + self.mlp(x)
        return out


class Untraceable(Branching):
    """A layer that makes an array of its data."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.as_tensor(x.numpy() + 1) + self.mlp(x)
        return out


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(Branching() for _ in range(2))
        self.image = nn.ModuleList(Branching() for _ in range(2))

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        for layer in self.text:
            x = layer(x)
        for layer in self.image:
            x = x if image is None else x + layer(image)
        return x


def names(graph_module: torch.fx.GraphModule) -> list[str]:
    return [ffn.name for ffn in find_ffns_in(graph_module).ffns]


def test_the_model_is_neither_run_nor_changed() -> None:
    model = nn.Sequential(Branching()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = trace(model, torch.zeros(2, 5, HIDDEN))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_meta for parameter in gm.parameters())
    assert {name for name, _ in gm.named_parameters()} == set(before)


def test_inputs_as_a_tensor_a_tuple_or_by_name() -> None:
    x, model = torch.zeros(2, 5, HIDDEN), nn.Sequential(Branching())
    for inputs in (x, (x,), {"input": x}):
        assert names(trace(model, inputs)) == ["0.mlp"]


def test_branches_on_data_are_traced_one_way() -> None:
    gm = trace(Branching(), torch.zeros(2, 5, HIDDEN))
    assert names(gm) == ["mlp"]
    assert gm.meta[UNTRACED] == {}


def test_nothing_is_printed_where_data_decide(capfd: pytest.CaptureFixture[str]) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Branching(), Branching()])

        def forward(self, x: Tensor) -> Tensor:
            return x if int(x.sum()) > 3 else x[: int(x.sum())]

    gm = trace(Counts(), torch.zeros(2, 5, HIDDEN))
    assert names(gm) == ["layers.0.mlp", "layers.1.mlp"]
    assert "data-dependent" in gm.meta[UNTRACED][""]
    assert capfd.readouterr() == ("", "")


def test_an_activation_in_the_place_of_lengths_is_given_up_at_once() -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return torch.cat([x[:length] for length in lengths.flatten().tolist()])

    with pytest.raises(MoeifyError, match="reads more than 256 numbers from its inputs"):
        trace(Packed(), (torch.zeros(300), torch.zeros(300, dtype=torch.long)))


def test_what_does_not_trace_whole_is_traced_by_its_parts() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Untraceable(), Untraceable()]), "head": nn.Linear(HIDDEN, 3)})
    gm = trace(model)
    assert names(gm) == ["layers.0.mlp", "layers.1.mlp"]
    assert set(gm.meta[UNTRACED]) == {"", "layers.0"}
    assert [ffn.down.weight for ffn in find_ffns_in(gm).ffns] == [
        "layers.0.mlp.down.weight",
        "layers.1.mlp.down.weight",
    ]


def test_towers_that_the_inputs_do_not_reach_are_traced_too() -> None:
    gm = trace(TwoTowers(), torch.zeros(2, 5, HIDDEN))
    assert names(gm) == ["text.0.mlp", "text.1.mlp", "image.0.mlp", "image.1.mlp"]


def test_a_parameter_that_parts_share_has_one_name() -> None:
    model = nn.ModuleDict({"encoder": Untraceable(), "decoder": Untraceable()})
    for name in ("up", "down"):
        model.get_submodule(f"decoder.mlp.{name}").weight = model.get_submodule(f"encoder.mlp.{name}").weight
        model.get_submodule(f"decoder.mlp.{name}").bias = model.get_submodule(f"encoder.mlp.{name}").bias
    gm = trace(model)
    assert {name.split(".")[0] for name, _ in gm.named_parameters()} == {"encoder"}
    assert sum(node.target == "encoder.mlp.up.weight" for node in gm.graph.nodes) == 2


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(MoeifyError, match=r"cannot trace Mlp: .*pass example_inputs .*that its"):
        trace(Mlp(), torch.zeros(2, 5, HIDDEN + 1))


def test_inputs_that_cannot_be_guessed_are_named() -> None:
    class Odd(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    with pytest.raises(MoeifyError, match=r"inputs of Odd cannot be guessed: its forward takes \(first, second\)"):
        trace(Odd())


def test_ties_stay_ties_in_the_twin() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    twin = meta_twin(model)
    assert isinstance(twin, nn.ModuleDict)
    assert twin["b"].weight is twin["a"].weight
    assert twin["a"].weight.is_meta


class Routed(nn.Module):
    """A mixture that branches on what its router says."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 23), nn.ReLU(), nn.Linear(23, HIDDEN)) for _ in "abc"
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        chosen = self.router(x).argmax(-1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0].tolist()
            out[rows] = expert(x[rows])
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.mixture = nn.Sequential(nn.Linear(HIDDEN, 19), nn.ReLU(), nn.Linear(19, HIDDEN)), Routed()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x)
        out: Tensor = x + self.mixture(x)
        return out


def test_experts_are_no_parts_of_a_model_whose_router_does_not_trace() -> None:
    graph_module = trace(nn.Sequential(Layer(), Layer()), torch.zeros(5, HIDDEN))
    assert [ffn.name for ffn in find_ffns_in(graph_module).ffns] == ["0.dense", "1.dense"]
    assert "experts of an MoE" in graph_module.meta[UNTRACED]["0.mixture.experts"]


def test_both_towers_of_a_vision_language_model() -> None:
    text = {"hidden_size": 12, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.CLIPConfig(text_config=text, vision_config={**text, "image_size": 16, "patch_size": 8})
    found = find_ffns_in(trace(tf.CLIPModel(config))).ffns
    assert len(found) == 4
    assert {ffn.activation for ffn in found} == {"quick_gelu"}
