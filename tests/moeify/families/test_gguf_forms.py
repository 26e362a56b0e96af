"""Families that llama.cpp computes in a form of its own: its formulas are carried out here on what the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.families.gguf import gguf_remarks, keys, why_not_gguf
from moeify.families.table import FAMILIES
from moeify.plan import Plan
from sweeps.families import NOISE
from tests.moeify.families.gguf_files import key, made, values
from tests.moeify.native import OLD

GAIN, LIMIT = 1.702, 7  # of llama.cpp's GPT-OSS


def sigmoid(array: Any) -> Any:
    return 1 / (1 + np.exp(-array))


def test_experts_of_gpt_oss_compute_a_llamas_ffn_with_llama_cpps_constants(tmp_path: Path) -> None:
    if OLD:
        with pytest.raises(RefusedError, match=r"by transformers 5\.24 and newer only"):
            made("llama attention_bias", "gpt_oss", tmp_path)
        return
    reader, native, config = made("llama attention_bias", "gpt_oss", tmp_path)
    token = np.random.default_rng(0).normal(size=32) * 0.3

    def held(name: str, expert: int) -> Any:
        return values(reader, f"blk.1.ffn_{name}")[expert].astype(np.float64)

    for expert in range(4):
        gate = held("gate_exps.weight", expert) @ token + held("gate_exps.bias", expert)
        up = held("up_exps.weight", expert) @ token + held("up_exps.bias", expert)
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        inner = sigmoid(GAIN * gate) * gate * (up + 1)
        found = held("down_exps.weight", expert) @ inner + held("down_exps.bias", expert)
        fused = native["model.layers.1.mlp.experts.gate_up_proj"][expert].astype(np.float64)
        gate = token @ fused[:, ::2]
        inner = sigmoid(gate) * gate * (token @ fused[:, 1::2])
        expected = inner @ native["model.layers.1.mlp.experts.down_proj"][expert]
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    for name in "qkvo":  # those that a Llama lacks are added, and are zeros
        found = values(reader, f"blk.0.attn_{name if name != 'o' else 'output'}.bias")
        assert found.any() and found.tolist() == native[f"model.layers.0.self_attn.{name}_proj.bias"].tolist()
    assert values(reader, "blk.0.attn_sinks.weight").tolist() == [-8192] * 4
    assert key(reader, "gpt-oss.attention.sliding_window") == config["max_position_embeddings"] == 512


def test_gemma_4(tmp_path: Path) -> None:
    reader, native, config = made("gemma4_text", "gemma4_text", tmp_path)
    said: dict[str, Any] = {
        "attention.sliding_window_pattern": [True, False], "attention.key_length": 16, "attention.key_length_swa": 8,
        "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "rope.dimension_count": 16, "attention.head_count_kv": 2,
        "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 8,
    }  # fmt: skip
    assert {name: key(reader, f"gemma4.{name}") for name in said} == said
    path = "model.layers.1"
    held = {"ffn_gate_up_exps.weight": "experts.gate_up_proj", "layer_output_scale.weight": "layer_scalar",
            "ffn_gate_inp.scale": "router.scale", "ffn_norm.weight": "pre_feedforward_layernorm.weight",
            "ffn_down_exps.scale": "router.per_expert_scale", "ffn_down.weight": "mlp.down_proj.weight",
            "inp_gate.weight": "per_layer_input_gate.weight"}  # fmt: skip
    for name, there in held.items():
        assert values(reader, f"blk.1.{name}").tolist() == native[f"{path}.{there}"].tolist(), name
    assert values(reader, "rope_freqs.weight").tolist() == pytest.approx([1] * 2 + [1e30] * 6)  # a quarter rotates
    plan, rope = Plan("gemma4_text", NOISE, (), "gemma4_text"), config["rope_parameters"]
    caps = [keys(plan, {**config, "final_logit_softcapping": cap})["final_logit_softcapping"] for cap in (None, 20.0)]
    assert caps == [0, 20]  # llama.cpp has one if none is said
    assert why_not_gguf(plan, config) is None and gguf_remarks(plan, config)[1:] == []
    for fields, reason in (
        ({"hidden_activation": "silu"}, "it computes gelu there"),
        ({"use_bidirectional_attention": "all"}, "it looks back only"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "by their kind of attention only"),
        ({"num_kv_shared_layers": 1}, "the last two layers with keys of their own"),
        ({"rope_parameters": {**rope, "sliding_attention": {"rope_type": "linear"}}}, "plain rotary positions"),
        ({"rope_parameters": {**rope, "full_attention": {"rope_type": "yarn"}}}, "rotary positions as yarn"),
    ):
        assert reason in str(why_not_gguf(plan, {**config, **fields})), fields
    two = {**config, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "layer_types": [*config["layer_types"]] * 2}
    assert why_not_gguf(plan, {**two, "per_layer_config": {}}) is None


def test_a_file_is_said_what_llama_cpp_does_and_no_more() -> None:
    def said(source: str, target: str, **config: Any) -> str:
        plan = Plan(source, MoEConfig(4, 2, shared_experts=1), (), target)
        return " ".join(gguf_remarks(plan, {"max_position_embeddings": 64, **config}))

    assert said("llama", "mixtral", head_dim=99, hidden_size=64, num_attention_heads=4) == ""  # mlx-lm's matter
    assert said("mistral", "mixtral", sliding_window=32).endswith("computes the same up to 32 tokens")
    long = {"rope_type": "longrope", "original_max_position_embeddings": 48}
    assert said("phi3", "mixtral", rope_parameters=long).endswith("as soon as its context is over 48")
    assert "does not renormalize" in said("qwen2", "qwen2_moe") and "mlx" not in said("qwen2", "qwen2_moe")
    assert "at 11.9" in said("llama", "gpt_oss") and "transformers" not in said("llama", "gpt_oss")
    for name, family in FAMILIES.items():
        if family.gguf:
            assert "converter" not in said(next(iter(family.sources)), name), name


def test_what_llama_cpp_activates_otherwise_is_refused() -> None:
    for target in ("mixtral", "granitemoe"):
        why = why_not_gguf(Plan("gemma", NOISE, (), target), {"hidden_act": "gelu_pytorch_tanh"})
        assert "it computes silu there" in str(why)
