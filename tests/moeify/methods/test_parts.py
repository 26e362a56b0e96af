"""Experts made from an FFN by each method, against an FFN that is written out; and whole models, by each applier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.methods.change import dropped_neurons, noisy, redrawn
from moeify.methods.parts import routed_parts, shared_parts
from moeify.tolerances import TOLERANCE
from tests.moeify import tiny

# tiny.INTERMEDIATE is 57, 3 x 19
CONFIGS = {
    "granularity": MoEConfig(6, 3, granularity=3),
    "shared": MoEConfig(5, 2, shared_experts=2),
    "shared shards": MoEConfig(6, 3, granularity=3, shared_experts=4),
    "sigmoid shards": MoEConfig(12, 3, granularity=3, router=moeify.routers.Sigmoid(n_group=2), shared_experts=1),
    "noise": MoEConfig(4, 2, method="noise"),
    "drop": MoEConfig(6, 3, method=moeify.methods.Drop(share=0.4), granularity=3, shared_experts=1),
}


def glu(x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value @ down.T + bias


@pytest.mark.parametrize(("granularity", "shared"), [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3), (3, 5), (3, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_any_whole_groups_and_the_shared_experts_add_up_to_the_ffn(granularity: int, shared: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, down, bias = (torch.randn(*s, generator=generator, dtype=torch.float64)
                         for s in ((7, 5), (18, 5), (5, 9), (5,)))  # fmt: skip
    config = MoEConfig(4 * granularity, groups * granularity, granularity=granularity, shared_experts=shared)

    def run(part: Any) -> Tensor:
        return glu(x, part.ups(up, [9, 9]), part.down(down), part.down_bias(bias))

    routed = routed_parts(config, "mlp")
    chosen = [3, 1][:groups]
    weights = torch.tensor([0.3, 0.7] if groups == 2 else [1.0]).double() / granularity
    total = torch.zeros(7, 5, dtype=torch.float64)
    for group, weight in zip(chosen, weights, strict=True):
        for part in routed[group * granularity : (group + 1) * granularity]:
            total += weight * run(part)
    for part in shared_parts(config, "mlp"):
        total += run(part)
    assert len(shared_parts(config, "mlp")) == shared
    torch.testing.assert_close(total, glu(x, up, down, bias))


def test_noise_changes_a_share_by_the_standard_deviation() -> None:
    weight = torch.ones(300, 200)
    change = noisy(weight, 0.25, 0.02, 1, "a") - weight
    touched = change[change != 0]
    assert touched.numel() / change.numel() == pytest.approx(0.25, abs=0.01)
    assert float(touched.std()) == pytest.approx(0.02, rel=0.02) and abs(float(touched.mean())) < 1e-3
    assert noisy(weight, 0.25, 0.02, 1, "a").equal(noisy(weight, 0.25, 0.02, 1, "a"))
    assert not noisy(weight, 0.25, 0.02, 1, "a").equal(noisy(weight, 0.25, 0.02, 1, "b"))


@pytest.mark.parametrize("axis", [0, 1])
def test_dropped_neurons_are_drawn_from_what_they_replace_and_the_others_stay(axis: int) -> None:
    weight = 3 + 0.5 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    neurons = dropped_neurons(100, 0.3, 1, "a")
    assert len(set(neurons.tolist())) == 30
    new = redrawn(weight, neurons, axis, 1, "w")
    kept = torch.ones(100, dtype=torch.bool)
    kept[neurons] = False
    kept_indices = kept.nonzero()[:, 0]
    assert new.index_select(axis, kept_indices).equal(weight.index_select(axis, kept_indices))
    drawn = new.index_select(axis, neurons)
    assert (drawn != weight.index_select(axis, neurons)).all()
    assert float(drawn.mean()) == pytest.approx(3, abs=0.05) and float(drawn.std()) == pytest.approx(0.5, abs=0.03)
    assert redrawn(weight, neurons[:0], axis, 1, "w").equal(weight)


def test_an_expert_loses_the_same_neurons_in_all_its_projections() -> None:
    config = MoEConfig(2, 1, method=moeify.methods.Drop(share=0.5))
    first, second = routed_parts(config, "mlp")
    up, down = torch.arange(80.0).reshape(20, 4), torch.arange(40.0).reshape(4, 10)
    lost = {part.name: (part.down(down) != down).all(0) for part in (first, second)}
    for part in (first, second):
        gate, value = (part.ups(up, [10, 10]) != up).all(1).chunk(2)
        assert gate.equal(value) and gate.equal(lost[part.name]) and gate.sum() == 5
    assert not lost[first.name].equal(lost[second.name])


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "llama") for name in CONFIGS), ("shared shards", "gpt2"), ("drop", "gpt2"), ("noise", "phi3")],
)
def test_in_place_and_streamed_are_the_same_bits(name: str, model: str, tmp_path: Path) -> None:
    config, dense = CONFIGS[name], tiny.build(model)
    before = tiny.logits(dense, model)
    tiny.save(dense, tmp_path / "dense")
    tiny.convert_files(tmp_path / "dense", tmp_path / "moe", config, target="moeify")
    moeify.convert(dense, config)
    loaded: Any = moeify.load(tmp_path / "moe")
    expected = dense.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[key]) for key, value in loaded.state_dict().items())
    jump = tiny.relative(tiny.logits(dense, model), before)
    assert jump < TOLERANCE["float32"] if config.exact else 1e-3 < jump < 10


def test_a_native_format_holds_shards(tmp_path: Path) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    dense = tiny.build("llama")
    tiny.save(dense, tmp_path / "dense")
    tiny.convert_files(tmp_path / "dense", tmp_path / "moe", CONFIGS["granularity"])
    loaded = auto.from_pretrained(tmp_path / "moe", experts_implementation="eager").eval()
    assert type(loaded).__name__ == "MixtralForCausalLM"
    assert loaded.config.intermediate_size == tiny.INTERMEDIATE // 3
    assert tiny.relative(tiny.logits(loaded, "llama"), tiny.logits(dense, "llama")) < TOLERANCE["float32"]


def test_graphs_hold_shards_and_shared_experts() -> None:
    model: Any = tiny.build("bert")
    program = torch.export.export(model, (), tiny.inputs("bert"), strict=False)
    before = tiny.logits(model, "bert")
    converted = moeify.convert_graph(program, CONFIGS["shared shards"])
    after = converted(**tiny.inputs("bert")).logits.detach()
    assert tiny.relative(after, before) < TOLERANCE["float32"]
    moeify.convert(model, CONFIGS["shared shards"])
    path = "bert.encoder.layer.1.output.dense.shared_expert.down_proj"
    assert converted.get_parameter(path).equal(model.get_parameter(path))


def test_optimizer_state_follows_into_shards_and_shared_experts() -> None:
    model: Any = tiny.build("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**tiny.inputs("gpt2")).logits.square().mean().backward()
    optimizer.step()
    mlp = model.transformer.h[1].mlp
    down, up_bias = (optimizer.state[p]["exp_avg"].clone() for p in (mlp.c_proj.weight, mlp.c_fc.bias))
    moeify.convert(model, CONFIGS["shared shards"], optimizer=optimizer)
    layer = model.transformer.h[1].mlp
    for stack, expert, shard in ((layer.experts, 4, 1), (layer.shared_expert, 3, 0)):
        cut = slice(19 * shard, 19 * shard + 19)
        assert optimizer.state[stack.down_proj]["exp_avg"][expert].equal(down.t()[:, cut])
        assert optimizer.state[stack.up_proj_bias]["exp_avg"][expert].equal(up_bias[cut])
    held = sorted(id(p) for group in optimizer.param_groups for p in group["params"])
    assert held == sorted(id(p) for p in model.parameters())
    moeify.freeze(model, "moe")
    assert not any(p.requires_grad for p in layer.parameters())


def test_what_cannot_be_cut_is_refused() -> None:
    model = tiny.build("llama")
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.mlp: its width 57 does not divide into 2 shards"):
        moeify.convert(model, MoEConfig(4, 2, granularity=2))
    assert hasattr(model.get_submodule("model.layers.0.mlp"), "gate_proj")
