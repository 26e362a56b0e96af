"""Checkpoints as the hub has them, and not as `save_pretrained` writes them: converted, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import moeify
from moeify.errors import CheckpointError, ConfigError
from tests.moeify import tiny
from tests.moeify.cli.test_convert import BASE, convert, edit_config, edit_weights, refused
from tests.moeify.command import moeify_command

tf: Any = transformers
SIZES = {"vocab_size": tiny.VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def with_auto_map(folder: Path) -> Path:
    save(tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, pad_token_id=0)), folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    return folder


def bert_base(folder: Path) -> Path:
    """A BertForMaskedLM beside a pooler and a head for next sentences, which that class has no place for."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    save(tf.BertForPreTraining(tf.BertConfig(**sizes)), folder)
    edit_config(folder, architectures=["BertForMaskedLM"])
    return folder


def gpt2(folder: Path) -> Path:
    """No prefix, and masks that the model makes itself."""
    save(tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=60, n_embd=24, n_layer=3, n_head=2, n_positions=64)), folder)
    stored = load_file(folder / "model.safetensors")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    renamed = {name.removeprefix("transformer."): value for name, value in stored.items()}
    save_file({**renamed, **masks}, folder / "model.safetensors", {"format": "pt"})
    return folder


def llama2(folder: Path) -> Path:
    save(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), folder)
    edit_weights(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    return folder


def reward(folder: Path) -> Path:
    return save(tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, num_labels=1)), folder)


LAYOUTS: dict[str, tuple[Any, str]] = {
    "a reward model": (reward, "moeify"),
    "an embedding model": (lambda f: save(tf.MistralModel(tf.MistralConfig(**SIZES)), f), "moeify"),
    "bert-base": (bert_base, "moeify"),
    "gpt2": (gpt2, "moeify"),
    "llama-2": (llama2, "mixtral"),
    "phi-3": (with_auto_map, "mixtral"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_hub(name: str, tmp_path: Path) -> None:
    make, target = LAYOUTS[name]
    torch.manual_seed(0)
    make(tmp_path / "src")
    result = convert(tmp_path / "src", tmp_path / "moe", *BASE, "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert f"→ {target}:" in result.stderr
    assert len(result.stderr.splitlines()) <= 9  # however many layers and masks there are
    written = json.loads((tmp_path / "moe/config.json").read_text())
    assert "auto_map" not in written  # that code knows no experts
    assert ("before training" in result.stderr) == (target != "moeify")


@pytest.mark.parametrize("kind", ["--trust-remote-code", "--allow-pickle"])
def test_every_command_takes_the_flag_that_its_refusal_names(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeify.export.pipeline.export", stop)
    src = with_auto_map(tmp_path / "src")
    if kind == "--allow-pickle":
        llama2(src)
        torch.save(load_file(src / "model.safetensors"), src / "pytorch_model.bin")
        (src / "model.safetensors").unlink()
    pair = str(src), str(tmp_path / "moe")
    commands = {"convert": (*pair, *BASE), "verify": pair, "export": (pair[0], str(tmp_path / "x.onnx")),
                "inspect": pair[:1], "families": pair[:1]}  # fmt: skip
    for name, arguments in commands.items():
        refusal = moeify_command(name, *arguments)
        assert refusal.exit_code == 1 and kind in refusal.stderr, name
        result = moeify_command(name, *arguments, kind)
        assert result.exit_code == 0 or "it is loaded" in result.stderr, (name, result.output)
    option: dict[str, Any] = {kind.removeprefix("--").replace("-", "_"): True}
    with pytest.raises(CheckpointError, match=next(iter(option))):
        moeify.load(src)
    assert moeify.load(src, **option).config.model_type in {"phi3", "llama"}


def stop(*_: object) -> None:
    raise ConfigError("it is loaded")


def test_what_is_not_a_number_in_the_dense_model_is_a_warning(tmp_path: Path) -> None:
    llama2(tmp_path / "src")
    broken = load_file(tmp_path / "src/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    broken[3, 4] = torch.nan
    edit_weights(tmp_path / "src", **{"model.layers.0.mlp.up_proj.weight": broken})
    result = convert(tmp_path / "src", tmp_path / "moe", *BASE)
    assert result.exit_code == 0, result.output
    assert "logits are NaN in both models" in result.stderr


def test_what_a_source_can_be_mistaken_for(tmp_path: Path) -> None:
    llama2(tmp_path / "src")
    edit_config(tmp_path / "src", model_type="lamma")
    assert "does not know the model type 'lamma': did you mean 'llama'?" in refused(tmp_path / "src")
    edit_config(tmp_path / "src", model_type="llama")
    weight = load_file(tmp_path / "src/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    for dtype, word in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        edit_weights(tmp_path / "src", **{"model.layers.1.mlp.up_proj.weight": weight.to(dtype)})
        assert f"up_proj.weight has dtype {word}, the model of config.json expects float32: if it is q" in refused(
            tmp_path / "src"
        )
