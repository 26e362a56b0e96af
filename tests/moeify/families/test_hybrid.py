"""Kinds of layers by the hub's words, and what llama.cpp holds of state spaces and linear attention, by loops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from moeify.families.gguf import gguf_of, keys, why_not_gguf
from moeify.families.hybrid import hub_kinds
from moeify.plan import Plan
from sweeps.dense_sources import build
from sweeps.families import NOISE, Measured
from tests.moeify.families import gguf_files
from tests.moeify.families.gguf_files import Array, in_pairs, key, values

Made = Callable[[str, str], tuple[Any, dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A source as a GGUF file, and the tensors and the config of its native folder."""
    kept: dict[str, Any] = {}

    def make(name: str, target: str) -> Any:
        if name not in kept:
            kept[name] = gguf_files.made(name, target, tmp_path_factory.mktemp("source"))
        return kept[name]

    yield make


def test_kinds_of_layers_are_written_by_the_hubs_words_and_read_by_transformers(tmp_path: Path) -> None:
    assert hub_kinds(["linear_attention", "full_attention", "moe", "mamba"]) == ["mamba", "attention", "moe", "mamba"]
    Measured(build("nemotron_h"), tmp_path).convert("nemotron_h", NOISE, "0")
    said = json.loads((tmp_path / "dst/config.json").read_text())
    assert said["hybrid_override_pattern"] == "ME*-" and "layers_block_type" not in said
    read: Any = transformers.AutoConfig.from_pretrained(tmp_path / "dst")
    assert read.layers_block_type == ["linear_attention", "moe", "full_attention", "mlp"]


def test_state_spaces(made: Made) -> None:
    reader, native, config = made("granitemoehybrid", "granitemoehybrid")
    path = "model.layers.0.mamba"
    assert config["layer_types"] == ["mamba", "attention"]
    assert values(reader, "blk.0.ssm_a").tolist() == pytest.approx(-np.exp(native[f"{path}.A_log"])[:, None])
    assert values(reader, "blk.0.ssm_d").tolist() == native[f"{path}.D"][:, None].tolist()
    assert values(reader, "blk.0.ssm_dt.bias").tolist() == native[f"{path}.dt_bias"].tolist()
    assert values(reader, "blk.0.ssm_conv1d.weight").tolist() == native[f"{path}.conv1d.weight"][:, 0].tolist()
    assert values(reader, "blk.0.ssm_norm.weight").tolist() == [native[f"{path}.norm.weight"].tolist()]
    said = {"attention.head_count_kv": [0, 2], "ssm.inner_size": 64, "ssm.time_step_rank": 4, "ssm.state_size": 8,
            "rope.scaling.finetuned": True, "context_length": 512}  # fmt: skip
    assert {name: key(reader, f"granitehybrid.{name}") for name in said} == said


def test_granite_4_without_rotary_positions_or_without_state_spaces(made: Made) -> None:
    plan, still = Plan("granitemoehybrid", NOISE, (), "granitemoehybrid"), {"position_embedding_type": None}
    _, _, config = made("granitemoehybrid", "granitemoehybrid")
    said = keys(plan, {**config, **still})
    assert said["rope_scaling_finetuned"] is False and said["context_length"] == 2**20
    attends = {**config, "layer_types": ["attention", "attention"]}
    assert gguf_of(plan, attends).architecture == "granitemoe" and keys(plan, attends)["head_count_kv"] == 2
    assert "it has no rotary positions" in str(why_not_gguf(plan, {**attends, **still}))
    assert why_not_gguf(plan, {**config, **still}) is why_not_gguf(plan, attends) is None
    assert "mamba_conv_bias" in str(why_not_gguf(plan, {**config, "mamba_conv_bias": False}))


def test_nemotron_h(made: Made) -> None:
    """An FFN block has a width, one that attends has key heads, and what has neither is a state space."""
    reader, native, config = made("nemotron_h", "nemotron_h")
    said = {"feed_forward_length": [0, 48, 0, 48], "attention.head_count_kv": [0, 0, 2, 0], "ssm.inner_size": 64,
            "expert_shared_feed_forward_length": 128, "expert_weights_norm": True, "context_length": 2**20}  # fmt: skip
    assert {name: key(reader, f"nemotron_h_moe.{name}") for name in said} == said
    assert key(reader, "nemotron_h_moe.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    path = "backbone.layers.{}.mixer"
    state, attends, moe = (path.format(layer) for layer in (0, 2, 3))
    assert values(reader, "blk.0.ssm_a").tolist() == pytest.approx(-np.exp(native[f"{state}.A_log"])[:, None])
    assert values(reader, "blk.0.ssm_dt.bias").tolist() == native[f"{state}.dt_bias"].tolist()
    assert values(reader, "blk.2.attn_k.weight").tolist() == in_pairs(native[f"{attends}.k_proj.weight"], 2).tolist()
    assert values(reader, "blk.2.attn_v.weight").tolist() == native[f"{attends}.v_proj.weight"].tolist()
    for name in ("up", "down"):
        each = [native[f"{moe}.experts.{expert}.{name}_proj.weight"].tolist() for expert in range(4)]
        assert values(reader, f"blk.3.ffn_{name}_exps.weight").tolist() == each
    assert values(reader, "blk.3.exp_probs_b.bias").tolist() == [0] * 4
    dense = {**config, "hybrid_override_pattern": "ME*-"}
    plan = Plan("nemotron_h", NOISE, (), "nemotron_h")
    assert "no FFN can stay dense there" in str(why_not_gguf(plan, dense)) and why_not_gguf(plan, config) is None


def test_value_heads_of_linear_attention_stand_in_turns(made: Made) -> None:
    reader, native, config = made("qwen3_5_text", "qwen3_5_moe_text")
    path, heads, size = "model.layers.0.linear_attn", 4, 8
    order = [2 * shared + turn for turn in range(2) for shared in range(2)]
    said = ("linear_num_value_heads", "linear_num_key_heads", "linear_value_head_dim")
    assert [config[name] for name in said] == [heads, 2, size]

    def turned(rows: Array, width: int) -> list[Any]:
        return [row for head in order for row in rows[head * width : (head + 1) * width].tolist()]

    for there, here in (("in_proj_a", "ssm_alpha"), ("in_proj_b", "ssm_beta")):
        assert values(reader, f"blk.0.{here}.weight").tolist() == turned(native[f"{path}.{there}.weight"], 1)
    assert values(reader, "blk.0.ssm_a").tolist() == pytest.approx(turned(-np.exp(native[f"{path}.A_log"]), 1))
    assert values(reader, "blk.0.ssm_dt.bias").tolist() == turned(native[f"{path}.dt_bias"], 1)
    assert values(reader, "blk.0.attn_gate.weight").tolist() == turned(native[f"{path}.in_proj_z.weight"], size)
    assert values(reader, "blk.0.ssm_out.weight").T.tolist() == turned(native[f"{path}.out_proj.weight"].T, size)
    fused, first = native[f"{path}.in_proj_qkv.weight"], 2 * 2 * size
    assert values(reader, "blk.0.attn_qkv.weight").tolist() == [*fused[:first].tolist(), *turned(fused[first:], size)]
    filters = native[f"{path}.conv1d.weight"][:, 0]
    expected = [*filters[:first].tolist(), *turned(filters[first:], size)]
    assert values(reader, "blk.0.ssm_conv1d.weight").tolist() == expected
    assert len(fused) == first + heads * size


def test_norms_of_qwen_3_5_are_what_is_multiplied_by(made: Made) -> None:
    reader, native, _ = made("qwen3_5_text", "qwen3_5_moe_text")
    for there, here in (("model.norm", "output_norm"), ("model.layers.1.self_attn.q_norm", "blk.1.attn_q_norm"),
                        ("model.layers.0.input_layernorm", "blk.0.attn_norm")):  # fmt: skip
        assert values(reader, f"{here}.weight").tolist() == (native[f"{there}.weight"] + 1).tolist()
    same = native["model.layers.0.linear_attn.norm.weight"].tolist()
    assert values(reader, "blk.0.ssm_norm.weight").tolist() == same
    assert key(reader, "qwen35moe.full_attention_interval") == 2
    assert key(reader, "qwen35moe.rope.dimension_sections") == [11, 11, 10, 0]
