"""The tensors that a checkpoint holds for a layer, in each format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.conversion.layout import layer_tensors, stored_tensors
from moeify.errors import CheckpointError
from moeify.families.base import layer_number
from moeify.plan import Plan, Rows, Site

CONFIG = MoEConfig(experts=4, top_k=2, granularity=2, method="noise")  # no two experts are equal
PATH = "model.layers.7.mlp"
UPS = tuple(Rows(f"{PATH}.{name}_proj.weight", None, 0, 6, 1, 6, transposed=False) for name in ("gate", "up"))
DOWN = Rows(f"{PATH}.down_proj.weight", None, 0, 5, 1, 5, transposed=False)
SITE = Site(PATH, (), "glu", "silu", 5, 6, UPS, DOWN, 0.0, 0.0)
PLAN = Plan("llama", CONFIG, (SITE,))
HELD = {rows.parameter: torch.randn(6, 5) for rows in UPS} | {DOWN.parameter: torch.randn(5, 6)}


def values(target: str) -> dict[str, Tensor]:
    found = {}
    for tensor in stored_tensors(replace(PLAN, target=target), SITE):
        found[tensor.name] = torch.empty(tensor.shape)
        tensor.fill(found[tensor.name], HELD.__getitem__)
    return found


def test_the_format_of_moeify_is_the_layer_at_its_path() -> None:
    expected = [replace(tensor, name=f"{PATH}.{tensor.name}").name for tensor in layer_tensors(SITE, CONFIG)]
    assert list(values("moeify")) == expected


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_native_format_holds_the_same_values_under_its_own_keys(target: str) -> None:
    plain, native = values("moeify"), values(target)
    block = {"mixtral": "model.layers.7.block_sparse_moe"}.get(target, PATH)
    gate, up, down = ("w1", "w3", "w2") if target == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    assert native.pop(f"{block}.gate.weight").equal(plain[f"{PATH}.router.weight"])
    for expert in range(4):
        gates, ups = plain[f"{PATH}.experts.gate_up_proj"][expert].chunk(2)
        assert native.pop(f"{block}.experts.{expert}.{gate}.weight").equal(gates)
        assert native.pop(f"{block}.experts.{expert}.{up}.weight").equal(ups)
        assert native.pop(f"{block}.experts.{expert}.{down}.weight").equal(plain[f"{PATH}.experts.down_proj"][expert])
    if target == "qwen2_moe":
        shared = {name.removeprefix(f"{PATH}.shared_expert"): value for name, value in native.items()}
        assert {name: tuple(value.shape) for name, value in shared.items()} == {
            ".gate_proj.weight": (128, 5), ".up_proj.weight": (128, 5), ".down_proj.weight": (5, 128),
            "_gate.weight": (1, 5),
        }  # fmt: skip
        assert shared[".down_proj.weight"].eq(0).all() and shared["_gate.weight"].ne(0).all()
        assert shared[".gate_proj.weight"].std() > 0.3 and not shared[".up_proj.weight"].equal(
            shared[".gate_proj.weight"]
        )
    else:
        assert not native


def test_the_number_of_a_layer_is_the_first_in_its_path() -> None:
    paths = {"model.layers.7.mlp": 7, "transformer.h.12.mlp": 12, "decoder.3.ffn.0": 3}
    assert {path: layer_number(replace(SITE, path=path)) for path in paths} == paths
    for path in ("", "lm_head", "model.²"):
        with pytest.raises(CheckpointError, match="which is in no numbered layer: make the plan again"):
            layer_number(replace(SITE, path=path))


def test_shared_experts_lie_side_by_side_in_one_wide_ffn() -> None:
    config = MoEConfig(experts=4, top_k=2, granularity=2, shared_experts=3)
    plan = Plan("llama", config, (SITE,))
    plain, native = (
        {tensor.name: tensor for tensor in stored_tensors(replace(plan, target=target), SITE)}
        for target in ("moeify", "glm4_moe")
    )
    gate_up, down = (torch.empty(plain[f"{PATH}.shared_expert.{key}"].shape) for key in ("gate_up_proj", "down_proj"))
    plain[f"{PATH}.shared_expert.gate_up_proj"].fill(gate_up, HELD.__getitem__)
    plain[f"{PATH}.shared_expert.down_proj"].fill(down, HELD.__getitem__)
    found = {}
    for key in ("gate_proj", "up_proj", "down_proj"):
        tensor = native[f"{PATH}.shared_experts.{key}.weight"]
        found[key] = torch.empty(tensor.shape)
        tensor.fill(found[key], HELD.__getitem__)
    assert found["gate_proj"].equal(gate_up[:, :3].flatten(0, 1)) and found["up_proj"].equal(
        gate_up[:, 3:].flatten(0, 1)
    )
    assert found["down_proj"].equal(torch.cat([*down], 1))
