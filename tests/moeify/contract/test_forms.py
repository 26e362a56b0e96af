"""Checkpoints of converted models whose experts are stored in one form and loaded in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.contract.forms import loading_rules
from moeify.errors import CheckpointError, ConfigError
from moeify.hub.streaming import load_streamed
from moeify.layers.linear_experts import LinearExperts
from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.contract import architectures

tf: Any = transformers
CONFIG = MoEConfig(5, 2, method="noise", shared_experts=2)


def apertus() -> Any:
    """One layer, with an activation that has weights of its own, and no gate."""
    sizes = {**tiny._LLAMA, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tf.ApertusForCausalLM(tf.ApertusConfig(**sizes)).float().eval()


def build(name: str) -> Any:
    """Experts that differ; those of text in llava have a gate, and those of images biases and none."""
    return moeify.convert(apertus() if name == "apertus" else architectures.build(name), CONFIG)


def held(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_holds(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["apertus", "llava"])
def test_either_form_loads_into_the_other_and_is_saved_in_the_form_that_it_has(name: str, tmp_path: Path) -> None:
    model = build(name)
    stacked = held(model)
    model.save_pretrained(tmp_path / "stacked", max_shard_size="20KB")
    linear = held(moeify.linearize(model))
    model.save_pretrained(tmp_path / "linear", max_shard_size="20KB")
    loaded = moeify.load(tmp_path / "linear", linear=False)
    assert_holds(loaded, stacked)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored_names(tmp_path / "stacked")
    assert "linear" not in json.loads((tmp_path / "again" / "config.json").read_text())["moeify"]
    loaded = moeify.load(tmp_path / "stacked", linear=True)
    assert_holds(loaded, linear)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored_names(tmp_path / "linear")
    assert_holds(moeify.load(tmp_path / "again"), linear)


def stored_names(folder: Path) -> set[str]:
    return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def llama(folder: Path, form: str) -> Any:
    """A model that is stored in a form of which its config says nothing, or the opposite."""
    model = build("llama")
    if form == "linear":
        moeify.linearize(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["moeify"]["linear"] = form == "stacked"
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("form", ["stacked", "linear"])
def test_what_is_stored_otherwise_than_its_config_says_loads_as_it_says(form: str, tmp_path: Path) -> None:
    model = llama(tmp_path, form)
    expected = tiny.logits(model, "llama")
    whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    base = tf.AutoModel.from_pretrained(tmp_path, experts_implementation="eager")
    with open_source(tmp_path) as source:
        streamed, unused = load_streamed(source, lambda _: None)
        assert not unused
        for each in (whole, streamed):
            assert any(isinstance(module, LinearExperts) for module in each.modules()) == (form == "stacked")
            assert tiny.relative(tiny.logits(each, "llama"), expected) < TOLERANCE["float32"]
    assert_holds(base, {name: value for name, value in whole.model.state_dict().items()})


def test_the_linears_of_a_stacked_tensor_are_views_of_it(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    loaded = moeify.load(tmp_path, linear=True)
    experts: Any = loaded.get_submodule("model.layers.0.mlp.experts")
    for places in (("gate_proj", "up_proj"), ("down_proj",)):
        weights = [experts.get_submodule(f"{number}.{place}").weight for number in range(5) for place in places]
        assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
        assert all(weight.is_contiguous() for weight in weights)


def test_an_expert_too_few_is_told(tmp_path: Path) -> None:
    model = moeify.linearize(build("llama"))
    del model.model.layers[1].mlp.experts._modules["4"]
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mismatched .*layers.1.mlp.experts.down_proj \(\[4, 36, 57\]"):
        moeify.load(tmp_path, linear=False)


def test_other_models_have_no_form_to_ask_for(tmp_path: Path) -> None:
    tiny.save(tiny.build("llama"), tmp_path)
    with pytest.raises(ConfigError, match="holds no converted model: leave out linear"):
        moeify.load(tmp_path, linear=True)


def test_the_rules_are_for_loading_converted_models_alone() -> None:
    moeify.register()
    model, dense = build("llama"), architectures.build("llama")
    others = get_model_conversion_mapping(model)  # what PEFT and saving look at
    assert not any("experts" in pattern for rule in others for pattern in rule.source_patterns)
    assert len(loading_rules(model)) == len(others) + 4  # two places, two stacked tensors
    assert len(loading_rules(dense)) == len(others)
