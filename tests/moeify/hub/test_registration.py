from __future__ import annotations

import copy
import json
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
from moeify.errors import CheckpointError, MoeifyError
from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.contract import architectures


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
    assert again.config.moeify == full.config.moeify


def test_initializers_that_reach_into_an_ffn_are_passed_over(tmp_path: Path) -> None:
    tf: Any = transformers
    sizes = {"hidden_size": 16, "num_hidden_layers": 1}
    text = {**sizes, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
    vision = {**sizes, "hidden_size": 64, "image_size": 16, "patch_size": 8}  # a head has 64
    config = tf.BridgeTowerConfig(
        **sizes, intermediate_size=24, num_attention_heads=2, text_config=text, vision_config=vision
    )
    model: Any = moeify.convert(tf.BridgeTowerModel(config), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    expected, loaded = model.state_dict(), moeify.load(tmp_path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_a_custom_activation_finds_its_buffers_where_the_head_is_missing(tmp_path: Path) -> None:
    tf: Any = transformers
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 37, "vocab_size": 50, "pad_token_id": 0}
    dense = tf.ApertusForCausalLM(tf.ApertusConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    full: Any = moeify.convert(dense, MoEConfig(experts=3, top_k=2))
    full.save_pretrained(tmp_path)
    moeify.register()
    base = tf.AutoModel.from_pretrained(tmp_path).state_dict()
    expected = full.model.state_dict()
    assert base.keys() == expected.keys()
    assert all(torch.equal(value, base[name]) for name, value in expected.items())


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


def test_loading_in_another_dtype_casts_every_weight_but_the_routers(tmp_path: Path) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("bert"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    moeify.register()
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        expected = value.bfloat16() if value.is_floating_point() and ".router." not in name else value
        assert torch.equal(loaded.state_dict()[name], expected), name


STRANGER = """
import sys, transformers
folder = sys.argv[1]
def config():
    return transformers.AutoConfig.from_pretrained(folder)
def imported():
    import moeify
    transformers.AutoModelForCausalLM.from_pretrained(folder)
for load in (
    lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
    lambda: transformers.AutoModel.from_pretrained(folder),
    lambda: transformers.LlamaForCausalLM.from_pretrained(folder),
    lambda: transformers.AutoModel.from_config(config()),
    imported,
):
    try:
        load()
    except Exception as error:
        print(str(error).strip().splitlines()[-1])
    else:
        print("loaded")
"""


def test_a_transformers_without_moeify_stops_and_says_what_to_do(tmp_path: Path) -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    said = subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path)], capture_output=True, text=True, check=True)
    assert len(said.stdout.splitlines()) == 5
    for line in said.stdout.splitlines():
        assert "pip install moeify, then: import moeify; moeify.register()" in line


def test_a_part_of_a_converted_model_does_not_load_dense(tmp_path: Path) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(architectures.build("llava"), MoEConfig(experts=3, top_k=2), "language_model")
    model.save_pretrained(tmp_path)
    moeify.register()
    with pytest.raises(CheckpointError, match="belongs to a converted model"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)
    whole = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    found, expected = (each(**architectures.inputs("llava")).logits.detach() for each in (whole, model))
    assert tiny.relative(found, expected) < TOLERANCE["float32"]


def test_a_model_that_is_made_from_the_config_has_the_layers_with_values() -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("t5"), MoEConfig(experts=3, top_k=2))
    moeify.register()
    for config in (model.config, copy.deepcopy(model.config)):
        made = tf.AutoModelForSeq2SeqLM.from_config(config)
        assert type(made) is type(model) and made.config.moeify == model.config.moeify
        assert {n: v.shape for n, v in made.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
        assert all(value.abs().max() > 0 for name, value in made.state_dict().items() if "experts." in name)


def test_every_implementation_that_can_be_set_can_be_loaded_with(tmp_path: Path) -> None:
    model: Any = moeify.convert(architectures.build("llama"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    moeify.register()
    for name in ("eager", "batched_mm", "grouped_mm", "moeify"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert set(loaded.get_experts_implementation().values()) == {name}


def test_a_dense_model_is_made_as_ever() -> None:
    moeify.register()
    made = tiny.build("llama")
    assert not hasattr(made.config, "moeify") and not any("experts" in name for name in made.state_dict())


def test_the_older_form_of_the_format_is_refused_and_loads_once_the_field_has_its_new_name(tmp_path: Path) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    older = {"quant_method": "moeify", "plan": config.pop("moeify")["plan"]}
    config["experts_implementation"] = "moeify"
    path.write_text(json.dumps(config | {"quantization_config": older}))
    moeify.register()
    for options in ({}, {"quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True)}):
        for load in (tf.AutoModelForCausalLM.from_pretrained, moeify.load):
            with pytest.raises(CheckpointError, match="rename the field quantization_config of its config"):
                load(tmp_path, **options)
    path.write_text(json.dumps(config | {"moeify": older}))
    loaded = moeify.load(tmp_path)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    assert loaded.config.moeify == model.config.moeify


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"moeify": 99}, "the plan has version 99, and this moeify reads 2: update moeify"),
        ({"moeify": 1}, "the plan has version 1, and this moeify reads 2: make it again"),
        (5, "not a JSON object"),
    ],
)
def test_another_version_of_the_format_is_refused(tmp_path: Path, plan: object, message: str) -> None:
    tf: Any = transformers
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=3, top_k=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moeify": {"plan": plan}}))
    moeify.register()
    for load in (tf.AutoModelForCausalLM.from_pretrained, moeify.load):
        with pytest.raises(MoeifyError, match=message) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
