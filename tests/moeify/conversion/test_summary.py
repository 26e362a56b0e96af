"""What `inspect` tells of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.cost import moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.summary import Summary, summarize
from tests.moeify import tiny

CONFIG = MoEConfig(experts=5, top_k=3)


def seen(model: nn.Module, folder: Path, **options: Any) -> Summary:
    with open_source(tiny.save(model, folder)) as source:
        return summarize(DenseCheckpoint(source), options.pop("config", CONFIG), **options)


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("llama", {}, "mixtral"),
        ("qwen2", {}, "glm4_moe"),
        ("llama", {"target": "moeify"}, "moeify"),
        ("llama", {"layers": "0"}, "ernie4_5_moe"),
        ("gpt2", {}, "moeify"),
        ("llama", {"config": MoEConfig(5, 3, shared_experts=1)}, "glm4_moe"),
    ],
)
def test_the_target_and_its_cost_are_told(name: str, options: dict[str, Any], target: str, tmp_path: Path) -> None:
    summary = seen(tiny.build(name), tmp_path, **options)
    assert summary.plan is not None and summary.plan.target == target and summary.obstacle is None
    with open_source(tmp_path) as source:
        assert summary.moe == moe_cost(DenseCheckpoint(source), summary.plan)
    said = json.loads(json.dumps(summary.to_dict()))
    assert said["target"] == target and said["obstacle"] is None
    assert said["cost"]["moe"] == summary.moe._asdict() and said["cost"]["dense"] == summary.dense._asdict()


def test_qwen2_moe_costs_its_idle_shared_expert(tmp_path: Path) -> None:
    model = tiny.build("llama")
    native = seen(model, tmp_path, target="qwen2_moe").moe
    plain = seen(model, tmp_path, target="moeify").moe
    assert native is not None and plain is not None
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    biases = sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
    head = tiny.VOCABULARY * tiny.HIDDEN
    assert native.parameters - plain.parameters == tiny.LAYERS * ((3 * 128 + 1) * tiny.HIDDEN + biases) + head


def test_every_ffn_has_its_parameters(tmp_path: Path) -> None:
    summary = seen(tiny.build("gpt2"), tmp_path)
    count = 2 * tiny.HIDDEN * tiny.INTERMEDIATE + tiny.HIDDEN + tiny.INTERMEDIATE
    said = summary.to_dict()
    assert said["model_type"] == "gpt2" and [ffn["count_params"] for ffn in said["ffns"]] == [count] * tiny.LAYERS
    ffn = said["ffns"][0]
    assert ffn["name"] == "transformer.h.0.mlp" and ffn["kind"] == "mlp"
    assert ffn["parameters"][0] == "transformer.h.0.mlp.c_fc.weight"


def test_a_model_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=50, state_size=4)
    summary = seen(transformers.MambaForCausalLM(config), tmp_path)
    assert summary.plan is None and summary.moe is None
    assert summary.obstacle is not None and summary.obstacle.startswith("no dense FFN was found in mamba")
    said = summary.to_dict()
    assert said["target"] is None and said["cost"]["moe"] is None and said["refused"][0].keys() == {"name", "reason"}
    assert said["cost"]["dense"]["parameters"] > 0


def test_inspect_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny.save(tiny.build("t5"), tmp_path)
    with open_source(src) as source:
        monkeypatch.setattr(source, "read", lambda name: pytest.fail(f"{name} is read"))
        assert summarize(DenseCheckpoint(source), moeify.MoEConfig(4, 2)).plan is not None
