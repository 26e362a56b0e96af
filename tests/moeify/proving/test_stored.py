from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.plan import Plan
from moeify.proving.stored import altered_tensors
from tests.moeify import tiny


def converted(folder: Path, name: str, config: MoEConfig, **options: str) -> Plan:
    tiny.save(tiny.build(name), folder / "src")
    return tiny.convert_files(folder / "src", folder / "moe", config, **options)


def altered(folder: Path, plan: Plan, cast_to: str | None = None) -> tuple[str, ...]:
    with open_source(folder / "src") as dense, open_source(folder / "moe") as moe:
        return altered_tensors(dense, moe, plan, cast_to)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("method", ["copy", "noise"])
def test_what_was_written_is_what_the_plan_says(name: str, method: str, tmp_path: Path) -> None:
    plan = converted(tmp_path, name, MoEConfig(6, 3, granularity=3, method=method), dtype="BF16")
    assert altered(tmp_path, plan, "BF16") == ()


def test_a_value_a_shape_and_a_name_are_each_seen(tmp_path: Path) -> None:
    plan = converted(tmp_path, "llama", MoEConfig(3, 2, method="noise"))
    file, expert = tmp_path / "moe/model.safetensors", "model.layers.2.block_sparse_moe.experts.{}.w1.weight"
    tensors = load_file(file)
    tensors[expert.format(1)][-1, -1] *= 1.001
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    wrong = {expert.format(1), "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"}
    assert set(altered(tmp_path, plan)) == wrong


def test_a_model_of_another_kind_is_not_compared(tmp_path: Path) -> None:
    plan = converted(tmp_path, "llama", MoEConfig(3, 2))
    tiny.save(tiny.build("gpt2"), tmp_path / "other")
    with open_source(tmp_path / "other") as dense, open_source(tmp_path / "moe") as moe:
        assert altered_tensors(dense, moe, plan, None) == ()
