"""What vLLM's Transformers backend does with a converted model, by its own rules, and what is refused for it.

docs/vllm.md says what was run in vLLM itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.hub import vllm_plugin
from tests.moeify import tiny

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def registered() -> Iterator[None]:
    vllm_plugin.register()
    yield
    moeify.register()  # without the check


def test_the_entry_point_is_the_function() -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = entry["moeify"].partition(":")
    assert getattr(import_module(module), name) is vllm_plugin.register


def made_as_vllm_does(model: Any) -> Any:
    """The base model from the config, without values."""
    auto: Any = transformers.AutoModel
    with torch.device("meta"):
        return auto.from_config(model.config, dtype=torch.float32)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "phi3"])
def test_the_experts_are_found_with_the_sizes_of_the_config(name: str) -> None:
    model: Any = moeify.convert(tiny.build(name), MoEConfig(5, 2))
    made = made_as_vllm_does(model)
    found = [module for path, module in made.named_modules() if path.rpartition(".")[2] == "experts"]
    text = made.config.get_text_config()
    up, down = (5, 2 * text.moe_intermediate_size, text.hidden_size), (5, text.hidden_size, text.moe_intermediate_size)
    for experts in found:
        assert [tuple(parameter.shape) for parameter in experts.parameters()] == [up, down]
    assert len(found) == tiny.LAYERS and (text.num_experts, text.num_experts_per_tok) == (5, 2)


@pytest.mark.usefixtures("registered")
def test_experts_with_biases_are_left_to_the_model() -> None:
    made = made_as_vllm_does(moeify.convert(tiny.build("gpt_neox"), MoEConfig(5, 2)))
    found = [module for path, module in made.named_modules() if path.rpartition(".")[2] == "experts"]
    assert found and all(any(parameter.dim() != 3 for parameter in experts.parameters()) for experts in found)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gemma", {}, r"layers.2.mlp has experts without biases that are no SwiGLU \(gelu_tanh\)"),
        ("llama", {"router": "gshard"}, "its router is 'gshard' and not 'softmax'"),
        ("llama", {"eval_capacity_factor": 2.0}, "its experts have a capacity in evaluation"),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    model = moeify.convert(tiny.build(name), MoEConfig(5, 2, **options))
    with pytest.raises(RefusedError, match=message):
        made_as_vllm_does(model)
    moeify.register()
    assert made_as_vllm_does(model)  # transformers computes it as it is


@pytest.mark.usefixtures("registered")
def test_experts_of_several_sizes_are_refused() -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(5, 2))
    model.config.moeify["plan"]["sites"][1]["intermediate"] += 1
    with pytest.raises(RefusedError, match=r"layers.1.mlp has experts of another size than model.layers.0.mlp"):
        made_as_vllm_does(model)
