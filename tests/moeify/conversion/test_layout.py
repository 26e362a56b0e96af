"""What a layer holds of an FFN, against an FFN that is written out; and whole models, by each applier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.errors import RefusedError
from moeify.layers.build import build_layer
from moeify.measure import TOLERANCE
from moeify.plan import Rows, Site
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


# A GLU as a model may store it: gate and up rows alternate in one (out, in) weight, the down projection is (in, out).
ROWS = [Rows("both", "both_bias", start, 18, 2, 18, transposed=False) for start in (0, 1)]
SITE = Site("mlp", (), "glu", "silu", 5, 9, tuple(ROWS), Rows("down", "down_bias", 0, 5, 1, 5, transposed=True), 0, 0)


def dense(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"both": (18, 5), "both_bias": (18,), "down": (9, 5), "down_bias": (5,)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def filled(site: Site, config: MoEConfig, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of every tensor of a layer."""
    tensors = {}
    for tensor in layer_tensors(site, config):
        shape = held[tensor.copied].shape if tensor.copied else tensor.shape
        tensors[tensor.name] = torch.full(shape, torch.nan, dtype=torch.float64)
        tensor.fill(tensors[tensor.name], held.__getitem__)
    return tensors


@pytest.mark.parametrize(("granularity", "shared"), [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3), (3, 5), (3, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_any_whole_groups_and_the_shared_experts_add_up_to_the_ffn(granularity: int, shared: int, groups: int) -> None:
    held, x = dense(), torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, up_bias = (torch.cat([held[name][::2], held[name][1::2]]) for name in ("both", "both_bias"))
    config = MoEConfig(4 * granularity, groups * granularity, granularity=granularity, shared_experts=shared)
    values = filled(SITE, config, held)

    def run(stack: str, expert: int) -> Tensor:
        up, up_bias, down, bias = (
            values[f"{stack}.{name}"][expert]
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        )
        gate, value = (x @ up.T + up_bias).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * value @ down.T + bias

    chosen = [3, 1][:groups]
    weights = torch.tensor([0.3, 0.7] if groups == 2 else [1.0]).double() / granularity
    total = torch.zeros(7, 5, dtype=torch.float64)
    for group, weight in zip(chosen, weights, strict=True):
        for expert in range(group * granularity, (group + 1) * granularity):
            total += weight * run("experts", expert)
    for expert in range(shared):
        total += run("shared_expert", expert)
    gate, value = (x @ up.T + up_bias).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value @ held["down"] + held["down_bias"]
    torch.testing.assert_close(total, expected)
    assert ("shared_expert.down_proj" in values) == bool(shared)


@pytest.mark.parametrize("router", ["softmax", "noisy_topk", "sigmoid", moeify.routers.Hash(vocab_size=11), "soft"])
@pytest.mark.parametrize("activation", ["silu", "custom"])
def test_the_names_and_shapes_are_those_of_the_layer(router: Any, activation: str) -> None:
    config = MoEConfig(6, 1, router=router, shared_experts=2)
    site = replace(SITE, activation=activation, activation_state=(("act.slope", "slope"),) * (activation == "custom"))
    region = nn.Module()
    region.slope = nn.Parameter(torch.ones(9))
    held = {**dense(), "act.slope": torch.linspace(1, 2, 9)}
    layer = build_layer(site, config, region, torch.empty(0))
    expected = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    found = filled(site, config, held)
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in expected.items()}
    fill_layer(layer, layer_tensors(site, config), held.__getitem__)
    assert all(torch.equal(value, found[name].to(value.dtype)) for name, value in expected.items())


def test_a_bias_that_one_projection_lacks_is_zero() -> None:
    ups = (replace(ROWS[0], bias=None), ROWS[1])
    bias = filled(replace(SITE, ups=ups), MoEConfig(2, 1), held := dense())["experts.gate_up_proj_bias"]
    assert bias[:, :9].eq(0).all() and torch.equal(bias[1, 9:], held["both_bias"][1::2])


def test_the_weight_of_a_1x1_convolution_is_a_matrix() -> None:
    held = dense()
    for name in ("both", "down"):
        held[name] = held[name][..., None, None]
    for name, value in filled(SITE, MoEConfig(2, 1), held).items():
        assert torch.equal(value, filled(SITE, MoEConfig(2, 1), dense())[name])


def test_unchanged_values_are_cut_and_neither_changed_nor_scaled() -> None:
    config = MoEConfig(6, 3, granularity=3, method="noise", shared_experts=1)
    held = dense()
    tensors = {tensor.name: tensor for tensor in layer_tensors(SITE, config)}
    down = tensors["experts.down_proj"]
    value = torch.empty(down.shape, dtype=torch.float64)
    down.unchanged().fill(value, held.__getitem__)
    assert all(torch.equal(value[expert], held["down"].T.chunk(3, 1)[expert % 3]) for expert in range(6))


def test_an_expert_loses_the_same_neurons_in_all_its_projections() -> None:
    held, config = dense(), MoEConfig(2, 1, method=moeify.methods.Drop(share=0.5), shared_experts=1)
    values, plain = filled(SITE, config, held), filled(SITE, MoEConfig(2, 1, shared_experts=1), held)
    changed = {name: value != plain[name] for name, value in values.items()}
    gates, ups = changed["experts.gate_up_proj"].all(-1).chunk(2, dim=-1)
    lost = changed["experts.down_proj"].all(1)
    assert gates.equal(ups) and gates.equal(lost) and lost.sum(-1).tolist() == [4, 4]
    assert not lost[0].equal(lost[1])
    untouched = {"experts.gate_up_proj_bias", "experts.down_proj_bias", "router.weight"}
    assert not any(changed[name].any() for name in changed if name in untouched or "shared" in name)


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
    with pytest.raises(
        RefusedError, match=r"model\.layers\.0\.mlp: its intermediate size 57 does not divide into 2 shards"
    ):
        moeify.convert(model, MoEConfig(4, 2, granularity=2))
    assert hasattr(model.get_submodule("model.layers.0.mlp"), "gate_proj")
