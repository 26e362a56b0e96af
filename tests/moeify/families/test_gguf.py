"""What GGUF keys and tensors say of a config, by the papers' formulas in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gguf
import pytest
import torch

from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.families.gguf import keys, rope_tensors, stacked, stored_as, why_not_gguf
from moeify.families.table import FAMILIES
from moeify.plan import Plan

PLAN = Plan("llama", MoEConfig(8, 2), (), "mixtral")
CONFIG: dict[str, Any] = {
    "num_hidden_layers": 3, "max_position_embeddings": 512, "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "long_factor": [1.5] * 8, "short_factor": [1.25] * 8}  # fmt: skip


def with_rope(**rope: Any) -> dict[str, Any]:
    return {**CONFIG, "rope_parameters": rope}


def test_every_name_of_a_key_is_a_method_of_the_library() -> None:
    said = keys(PLAN, CONFIG)
    assert all(callable(getattr(gguf.GGUFWriter, f"add_{name}", None)) for name in said)
    assert said == {
        "block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "expert_count": 8, "expert_used_count": 2,
        "rope_freq_base": 1e4, "vocab_size": 100, "rope_dimension_count": 16,
    }  # fmt: skip
    assert keys(PLAN, {**CONFIG, "head_dim": 32})["key_length"] == 32


@pytest.mark.parametrize(("name", "family"), [(name, f) for name, f in FAMILIES.items() if f.gguf])
def test_the_library_knows_every_architecture_and_has_a_place_for_its_experts(name: str, family: Any) -> None:
    held = {place for key in stacked(family, family.gguf) for place in stored_as(family.gguf, 3, key.format(layer=1))}
    experts = {word for word in ("gate", "up", "gate_up", "down") if f"blk.1.ffn_{word}_exps.weight" in held}
    assert experts in ({"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"}), name
    with pytest.raises(RefusedError, match=r"has no place for model\.layers\.1\.nothing: write a folder"):
        stored_as(family.gguf, 3, "model.layers.1.nothing")


def test_rotary_scaling() -> None:
    linear = keys(PLAN, with_rope(rope_type="linear", rope_theta=5e5, factor=4.0))
    assert (linear["rope_scaling_type"], linear["rope_scaling_factor"]) == (gguf.RopeScalingType.LINEAR, 4.0)
    assert linear["rope_freq_base"] == 5e5
    yarn = keys(PLAN, with_rope(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128,
                                beta_fast=16))  # fmt: skip
    assert (yarn["rope_scaling_orig_ctx_len"], yarn["rope_scaling_yarn_beta_fast"]) == (128, 16)
    long = keys(PLAN, with_rope(**LONG))
    assert long["rope_scaling_attn_factors"] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)))
    factors = rope_tensors(with_rope(**LONG))
    assert factors["rope_factors_long.weight"].tolist() == [1.5] * 8 and len(factors) == 2
    assert rope_tensors(CONFIG) == {}


def test_factors_of_llama_3() -> None:
    found = rope_tensors(with_rope(**LLAMA_3))["rope_freqs.weight"].tolist()
    assert len(found) == 8
    for place, value in enumerate(found):
        wave = 2 * math.pi * 1e4 ** (2 * place / 16)
        smooth = (64 / wave - 1) / (4 - 1)
        expected = 1.0 if wave < 64 / 4 else 8.0 if wave > 64 / 1 else 1 / ((1 - smooth) / 8 + smooth)
        assert value == pytest.approx(expected, rel=1e-5)


def test_what_makes_keys_and_values_of_latent_ones_comes_apart() -> None:
    form, config = FAMILIES["deepseek_v3"].gguf, {"num_attention_heads": 2, "kv_lora_rank": 3, "qk_nope_head_dim": 4}
    assert form is not None
    fused = torch.arange(2 * (4 + 5) * 3).reshape(18, 3)
    keys_of, values_of = (compute(fused, config) for compute in form.rewrites[0].parts.values())
    assert tuple(keys_of.shape) == (2, 3, 4) and tuple(values_of.shape) == (2, 5, 3)
    for head in range(2):
        for rank in range(3):
            assert keys_of[head, rank].tolist() == [int(fused[head * 9 + row, rank]) for row in range(4)]
            assert values_of[head, :, rank].tolist() == [int(fused[head * 9 + 4 + row, rank]) for row in range(5)]


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("mixtral", with_rope(rope_type="dynamic", rope_theta=1e4), "rotary positions as dynamic"),
        ("qwen3_moe", with_rope(**LLAMA_3), "rotary positions as llama3"),
        ("moeify", CONFIG, "cannot hold the moeify format"),
        ("flex_olmo", CONFIG, "not written as GGUF: choose deepseek_v3, dots1,"),
    ],
)
def test_why_not(target: str, config: dict[str, Any], reason: str) -> None:
    assert reason in (why_not_gguf(replace(PLAN, target=target), config) or "")


@pytest.mark.parametrize("config", [CONFIG, with_rope(**LLAMA_3), with_rope(**LONG)])
def test_what_is_written(config: dict[str, Any]) -> None:
    assert why_not_gguf(PLAN, config) is None
