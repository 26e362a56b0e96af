from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import moeify
from moeify.config import MoEConfig
from moeify.measure import TOLERANCE
from tests.moeify import tiny


def test_stock_models_take_our_experts_by_name_after_register(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(experts=3, top_k=2))
    moeify.register()
    moeify.register()
    auto: Any = transformers.AutoModelForCausalLM
    eager, ours = (
        auto.from_pretrained(tmp_path / "moe", experts_implementation=name).eval() for name in ("eager", "moeify")
    )
    assert set(ours.get_experts_implementation().values()) == {"moeify"}
    assert tiny.relative(tiny.logits(ours, "llama"), tiny.logits(eager, "llama")) < TOLERANCE["float32"]


def test_a_checkpoint_of_a_model_with_a_head_loads_without_it_and_the_other_way_round(tmp_path: Path) -> None:
    tf: Any = transformers
    full: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=3, top_k=2))
    full.save_pretrained(tmp_path / "full")
    moeify.register()
    base = tf.AutoModel.from_pretrained(tmp_path / "full")
    expected = full.model.state_dict()
    assert base.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())
    base.save_pretrained(tmp_path / "base")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    assert again.config.quantization_config["plan"] == full.config.quantization_config["plan"]


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_what_was_loaded_is_saved_unchanged(tmp_path: Path, options: dict[str, Any]) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("gpt2"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path / "one", max_shard_size="100KB")
    moeify.register()
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "one", **options).save_pretrained(
        tmp_path / "two", max_shard_size="100KB"
    )
    (one, weights), (two, same) = (_contents(tmp_path / name) for name in ("one", "two"))
    assert len(weights) > 4 and one == two
    assert weights.keys() == same.keys() and all(torch.equal(value, same[name]) for name, value in weights.items())


def _contents(folder: Path) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """The files of a checkpoint but its index, and the tensors, whose shards differ from version to version."""
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    others = [file for file in folder.iterdir() if "safetensors" not in file.name]
    return {file.name: file.read_bytes() for file in others}, weights


def test_loading_in_another_dtype_casts_every_weight(tmp_path: Path) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("bert"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    moeify.register()
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_without_register_transformers_stops(tmp_path: Path) -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'experts_implementation="moeify"` is not supported' in result.stderr.strip().split("\n")[-1]
