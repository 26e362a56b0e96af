from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeify
from moeify.checkpoint.source import open_source
from moeify.errors import CheckpointError
from tests.moeify import tiny
from tests.moeify.command import moeify_command

Changes = dict[str, Any]


def adapted(name: str, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a base model and an adapter of it whose matrices are random; return the weights as PEFT merges them."""
    model: Any = tiny.build(name)
    model.name_or_path = str(tiny.save(model, folder / "base"))
    with warnings.catch_warnings():  # of what transformers calls otherwise now, and of PEFT's advice
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
        torch.manual_seed(1)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(folder / "adapter")
        merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


LLAMA: Changes = {"target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("llama", {**LLAMA, "alpha_pattern": {"layers.1.mlp.down_proj": 3, "^model.layers.0.self_attn.q_proj": 5}}),
        ("qwen2", {**LLAMA, "bias": "all", "modules_to_save": ["lm_head", "k_proj"]}),
        ("qwen2", {"target_modules": ["embed_tokens", "o_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ],
)  # fmt: skip
def test_weights_are_those_that_peft_merges(name: str, settings: Changes, tmp_path: Path) -> None:
    expected, base = adapted(name, tmp_path, **settings), load_file(tmp_path / "base/model.safetensors")
    with open_source(tmp_path / "adapter") as source:
        assert source.config == open_source(tmp_path / "base").config
        found = {key: source.read(key) for key in source.tensors}
    changed = [key for key in found if not torch.equal(found[key], base[key])]
    assert any("lora" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors")) and len(changed) > 3
    for key, values in found.items():
        assert tiny.relative(values, expected[key]) < 1e-6, key


def test_an_adapter_is_converted_proved_and_loaded(tmp_path: Path) -> None:
    adapted("llama", tmp_path, **LLAMA)
    (tmp_path / "base/LICENSE").write_text("base")
    (tmp_path / "base/tokenizer_config.json").write_text("{}")
    (tmp_path / "adapter/tokenizer_config.json").write_text('{"a": 1}')
    src, dst = tmp_path / "adapter", tmp_path / "moe"
    result = moeify_command("convert", src, dst, "--experts", 2, "--top-k", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "moe/LICENSE").read_text() == "base"
    assert json.loads((tmp_path / "moe/tokenizer_config.json").read_text()) == {"a": 1}
    moe, dense = moeify.load(dst, experts_implementation="eager"), moeify.load(src)
    assert tiny.relative(tiny.logits(moe, "llama"), tiny.logits(dense, "llama")) < 1e-5
    onto = moeify_command("convert", src, tmp_path / "base", "--experts", 2, "--top-k", 1, "--overwrite")
    assert onto.exit_code == 1 and "overlap" in onto.output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    adapted("llama", folder, **LLAMA)
    return folder


def refusal(small: Path, tmp_path: Path, changes: Changes, tensors: Changes | None = None) -> str:
    """What is said of the adapter with changed settings, and tensors of other shapes or names."""
    settings = json.loads((small / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    stored = load_file(small / "adapter/adapter_model.safetensors") | (tensors or {})
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "with peft_type = 'IA3', which is not merged here: load it on its base model with PEFT"),
        ({"use_dora": True}, "with use_dora, which is not merged here"),
        ({"a_field_of_tomorrow": 1}, "with a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"lora_alpha": "6"}, "expected numbers"),
        ({"alpha_pattern": {"(a+)+": 1}}, "a pattern that is not read"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "nobody/nothing"}, "download it first (hf download nobody/nothing)"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_what_is_not_merged_is_refused(small: Path, changes: Changes, words: str, tmp_path: Path) -> None:
    assert words in refusal(small, tmp_path, changes)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.lora_magnitude_vector": torch.ones(36)}, "lora_magnitude_vector, which is not merged here"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 35)}, "adapter and base model do not belong together"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 36)}, "do not belong together"),
        ({"base_model.model.score.weight": torch.ones(2, 36)}, "holds no such tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(small: Path, tensors: Changes, words: str, tmp_path: Path) -> None:
    assert words in refusal(small, tmp_path, {}, tensors)


def test_an_adapter_of_an_adapter_is_refused(small: Path, tmp_path: Path) -> None:
    assert "which is one too" in refusal(small, tmp_path, {"base_model_name_or_path": str(small / "adapter")})


def test_pickled_adapters_need_the_flag(small: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((small / "adapter/adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match=r"is an adapter without adapter_model\.safetensors"):
        open_source(tmp_path)
    torch.save(load_file(small / "adapter/adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"only as pickles \(adapter_model\.bin\)"):
        open_source(tmp_path)
    with open_source(tmp_path, allow_pickle=True) as source, open_source(small / "adapter") as same:
        assert all(torch.equal(source.read(name), same.read(name)) for name in same.tensors)


def test_the_base_of_an_adapter_may_be_pickled(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "adapter", tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    whole, base = Path(settings["base_model_name_or_path"]), tmp_path / "base"
    base.mkdir()
    shutil.copy(whole / "config.json", base)
    torch.save(load_file(whole / "model.safetensors"), base / "pytorch_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    with open_source(tmp_path, allow_pickle=True) as source, open_source(small / "adapter") as same:
        assert all(torch.equal(source.read(name), same.read(name)) for name in same.tensors)
