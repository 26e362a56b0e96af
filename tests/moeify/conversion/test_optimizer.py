from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.measure import TOLERANCE
from tests.moeify import tiny

IDS = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
}
CONFIG = MoEConfig(experts=3, top_k=3, aux_loss=0.0)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 2, name: str = "llama") -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(**tiny.inputs(name)).logits.square().mean())
        optimizer.step()


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.dim()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_expert_starts_with_the_moments_of_the_dense_weight(kind: str) -> None:
    model = tiny.build("llama")
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    gate, up, down = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    before = {p: copy.deepcopy(dict(optimizer.state[p])) for p in (gate, up, down)}
    moeify.convert(model, CONFIG, optimizer=optimizer)
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    for key in moments(optimizer, experts.down_proj):
        stacked = torch.cat([before[gate][key], before[up][key]])
        for expert in range(3):
            assert optimizer.state[experts.gate_up_proj][key][expert].equal(stacked)
            assert optimizer.state[experts.down_proj][key][expert].equal(before[down][key])
    for key, value in before[down].items():
        if key == "step":
            assert optimizer.state[experts.down_proj][key] == value == 2
            assert optimizer.state[experts.down_proj][key] is not optimizer.state[experts.gate_up_proj][key]
    assert moments(optimizer, experts.down_proj).keys() == {
        k for k, v in before[down].items() if isinstance(v, Tensor) and v.dim()
    }
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in optimizer.state} <= set(held)
    train(model, optimizer)


def test_with_one_expert_training_goes_on_as_if_nothing_had_happened() -> None:
    dense, moe = tiny.build("gpt2"), tiny.build("gpt2")
    optimizers = [OPTIMIZERS["AdamW"](model.parameters()) for model in (dense, moe)]
    for model, optimizer in zip((dense, moe), optimizers, strict=True):
        train(model, optimizer, name="gpt2")
    moeify.convert(moe, MoEConfig(1, 1, aux_loss=0.0), optimizer=optimizers[1])
    for model, optimizer in zip((dense, moe), optimizers, strict=True):
        train(model, optimizer, 3, name="gpt2")
    difference = tiny.relative(tiny.logits(moe, "gpt2"), tiny.logits(dense, "gpt2"))
    assert difference < 10 * TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["phi3", "bert", "opt"])
def test_fused_split_and_biased_projections(name: str) -> None:
    model = tiny.build(name)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    train(model, optimizer, name=name)
    state = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters() if p in optimizer.state}
    downs = {n: p for n, p in model.named_parameters() if p.shape == (tiny.HIDDEN, tiny.INTERMEDIATE)}
    moeify.convert(model, CONFIG, optimizer=optimizer)
    found = [p for n, p in model.named_parameters() if n.endswith("experts.down_proj")]
    assert len(found) == len(downs) == tiny.LAYERS
    for parameter, dense in zip(found, downs.values(), strict=True):
        assert optimizer.state[parameter]["exp_avg"][2].equal(state[dense])
    train(model, optimizer, name=name)


def test_groups_keep_their_options_and_names() -> None:
    model = tiny.build("opt")
    decayed = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    plain = {n: p for n, p in model.named_parameters() if p.dim() < 2}
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.items()), "weight_decay": 0.1},
        {"params": list(plain.items()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    moeify.convert(model, CONFIG, optimizer=optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert group["weight_decay"] == decay
        assert [names[id(p)] for p in group["params"]] == group["param_names"]
    assert any(name.endswith("router.weight") for name in optimizer.param_groups[0]["param_names"])
    assert any(name.endswith("experts.down_proj_bias") for name in optimizer.param_groups[1]["param_names"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"]


def test_weights_that_were_not_trained_have_experts_that_are_not() -> None:
    model = tiny.build("llama")
    first = [p for n, p in model.named_parameters() if ".layers.0." in n]
    optimizer = OPTIMIZERS["AdamW"](first)
    moeify.convert(model, CONFIG, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if ".layers.0." in n}


def test_what_cannot_follow_is_refused_before_anything_changes() -> None:
    model = tiny.build("llama")
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer)
    names = list(model.state_dict())
    with pytest.raises(RefusedError, match=r"row_var of .*mlp.* has shape"):
        moeify.convert(model, CONFIG, optimizer=optimizer)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(RefusedError, match="holds none of the 9 weights"):
        moeify.convert(model, CONFIG, optimizer=stranger)
    assert list(model.state_dict()) == names


def test_moments_that_are_missing_are_zero_and_steps_are_those_of_the_other_half() -> None:
    model = tiny.build("llama")
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    gate.requires_grad_(False)
    train(model, optimizer)
    gate.requires_grad_(True)
    before = copy.deepcopy(dict(optimizer.state[up]))
    assert gate not in optimizer.state
    moeify.convert(model, CONFIG, optimizer=optimizer)
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    state = optimizer.state[experts.gate_up_proj]
    assert state.keys() == before.keys() and state["step"] == 2
    for key in ("exp_avg", "exp_avg_sq"):
        zeros, moved = state[key].chunk(2, dim=1)
        assert zeros.eq(0).all() and all(expert.equal(before[key]) for expert in moved)
    train(model, optimizer)


def test_weights_that_were_never_trained_start_afresh() -> None:
    model = tiny.build("llama")
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    moeify.convert(model, CONFIG, optimizer=optimizer)
    assert not optimizer.state
    train(model, optimizer)


class Scaled(nn.Module):
    """A custom activation with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1, 31))
        self.shift: Tensor
        self.register_buffer("shift", torch.linspace(0, 0.1, 31))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x + self.shift).relu().square()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 31), Scaled(), nn.Linear(31, 12))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


@pytest.mark.parametrize("shared", [0, 1])
def test_the_state_of_a_learned_activation_follows_it(shared: int) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(Block(), Block())
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    x = torch.randn(2, 5, 12)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(dict(optimizer.state[model[1].mlp[1].scale]))
    config = MoEConfig(3, 3, aux_loss=0.0, shared_experts=shared)
    moeify.convert(model, config, example_inputs=x, optimizer=optimizer)
    for stack in (model[1].mlp.experts, *([model[1].mlp.shared_expert] if shared else [])):
        state = optimizer.state[stack.region.scale]
        assert all(torch.as_tensor(state[key]).equal(torch.as_tensor(before[key])) for key in before)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    model(x).square().mean().backward()
    optimizer.step()


def gpt2_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The usual split into weights with decay and biases without."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() <= 1]}]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_state_is_loaded_by_a_fresh_optimizer_and_training_goes_on_to_the_last_bit(kind: str) -> None:
    model = tiny.build("llama")
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    moeify.convert(model, CONFIG, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    train(model, optimizer)
    resumed = moeify.convert(tiny.build("llama"), CONFIG)
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh = OPTIMIZERS[kind](resumed.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (resumed, fresh)):
        train(each, its)
    for name, parameter in model.named_parameters():
        assert parameter.equal(resumed.get_parameter(name)), name


def test_groups_keep_the_order_that_they_had() -> None:
    model = tiny.build("gpt2")
    optimizer = torch.optim.AdamW(gpt2_groups(model))
    train(model, optimizer, name="gpt2")
    moeify.convert(model, CONFIG, optimizer=optimizer)
    places = {id(p): place for place, p in enumerate(model.parameters())}
    for group in optimizer.param_groups:
        found = [places[id(p)] for p in group["params"]]
        assert found == sorted(found)
    other = tiny.build("gpt2")
    backwards = torch.optim.AdamW(list(other.parameters())[::-1])
    train(other, backwards, name="gpt2")
    before = [id(p) for p in backwards.param_groups[0]["params"]]
    moeify.convert(other, CONFIG, optimizer=backwards)
    kept = [id(p) for p in backwards.param_groups[0]["params"] if id(p) in set(before)]
    assert kept == [p for p in before if p in set(kept)]


def test_an_optimizer_of_matrices_is_refused_before_anything_changes() -> None:
    model = tiny.build("llama")
    before = {name: id(p) for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.Muon(matrices)
    with pytest.raises(RefusedError, match="Muon cannot train experts, which are stacked in three dimensions"):
        moeify.convert(model, CONFIG, optimizer=optimizer)
    assert {name: id(p) for name, p in model.named_parameters()} == before
