"""Every router in whole models: in memory, on disk, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.measure import TOLERANCE
from tests.moeify import tiny

CONFIGS = {
    "switch": MoEConfig.switch(5),
    "noisy_topk": MoEConfig.noisy_topk(5, 2),
    "deepseek_v3": MoEConfig.deepseek_v3(6, 2, router={"n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.0}),
    "hash": MoEConfig(5, 1, router=moeify.routers.Hash(vocab_size=tiny.VOCABULARY), aux_loss=0.0),
    "soft": MoEConfig(5, 2, router=moeify.routers.Soft(slots=2), aux_loss=0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_in_place_and_streamed_are_the_same_bits_and_load(name: str, tmp_path: Path) -> None:
    config, dense = CONFIGS[name], tiny.build("llama")
    before = tiny.logits(dense, "llama")
    tiny.save(dense, tmp_path / "dense")
    tiny.convert_files(tmp_path / "dense", tmp_path / "moe", config)
    moeify.convert(dense, config)
    loaded: Any = moeify.load(tmp_path / "moe")
    expected = dense.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert value.dtype == expected[key].dtype and value.equal(expected[key]), key
    after = tiny.logits(loaded, "llama")
    assert tiny.relative(after, tiny.logits(dense, "llama")) < TOLERANCE["float32"]
    assert (tiny.relative(after, before) < TOLERANCE["float32"]) == config.exact


def test_routers_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model: Any = moeify.convert(tiny.build("llama"), CONFIGS["deepseek_v3"])
    bias = model.model.layers[1].mlp.router.selection_bias
    bias.copy_(torch.linspace(0.001, 0.002, 6))
    tiny.save(model, tmp_path)
    loaded: Any = moeify.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[1].mlp.router.selection_bias.equal(bias)
    assert loaded.model.layers[1].mlp.router.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (CONFIGS["deepseek_v3"], "router = 'sigmoid'"),
        (MoEConfig(5, 2, eval_capacity_factor=2.0), "eval_capacity_factor"),
        (MoEConfig(5, 2, z_loss=1e-3), "z_loss"),
        (MoEConfig(5, 2, shared_experts=1), "shared_experts"),
    ],
)
def test_native_formats_refuse_what_they_cannot_say(config: MoEConfig, field: str, tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path / "dense")
    with pytest.raises(RefusedError, match=f"mixtral has no place for {field}"):
        tiny.convert_files(tmp_path / "dense", tmp_path / "moe", config, target="mixtral")
