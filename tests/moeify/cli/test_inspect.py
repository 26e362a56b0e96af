from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from moeify.config import MoEConfig
from tests.moeify import native, tiny
from tests.moeify.command import moeify_command

tf: Any = transformers
MODELS: dict[str, Callable[[], nn.Module]] = {
    **tiny.MODELS,
    **{name: build for name, build in native.MODELS.items() if name not in {"olmoe", "granitemoe", "deepseek_v2"}},
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=24, num_hidden_layers=9, vocab_size=50, state_size=4)
    ),
    "deep": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=36, n_embd=24, n_head=2, vocab_size=50)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_kind_fits_a_screen(name: str, tmp_path: Path) -> None:
    src = tiny.save(MODELS[name](), tmp_path)
    result = moeify_command("inspect", src, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert 0 < len(lines) <= 40 and max(map(len, lines)) <= 80
    if name in native.MODELS:
        assert "layers): 6 experts" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_json_is_one_document_with_the_promised_fields(name: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    result = moeify_command("inspect", src, "--json")
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    assert seen["model_type"] == name and len(seen["ffns"]) == tiny.LAYERS
    ffn = seen["ffns"][1]
    assert ffn["hidden"] == tiny.HIDDEN and ffn["intermediate"] == tiny.INTERMEDIATE
    matrices = {"llama": 3, "bert": 2}[name] * tiny.HIDDEN * tiny.INTERMEDIATE
    biases = {"llama": 0, "bert": tiny.HIDDEN + tiny.INTERMEDIATE}[name]
    assert ffn["count_params"] == matrices + biases
    assert seen["cost"]["moe"]["parameters"] > seen["cost"]["dense"]["parameters"]


def test_people_get_tables(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("bert"), tmp_path / "src")
    result = moeify_command("inspect", src)
    assert "3 dense FFNs" in " ".join(result.stdout.split()) and "gelu" in result.stdout
    assert "cls.predictions.decoder" in result.stdout and "head" in result.stdout


def test_example_inputs_are_taken_in_the_place_of_guesses(tmp_path: Path) -> None:
    src, given = tiny.save(tiny.build("llama"), tmp_path / "src"), tmp_path / "inputs.json"
    given.write_text('{"inputs_embeds": {"shape": [2, 5, 36]}, "use_cache": false}')
    result = moeify_command("inspect", src, "--json", "--example-inputs", given)
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ffns"]) == tiny.LAYERS
    given.write_text('{"waveform": [[0.5]]}')
    result = moeify_command("inspect", src, "--example-inputs", given)
    assert result.exit_code == 1
    assert "exactly one of input_ids" in result.stderr and "--example-inputs FILE" in result.stderr


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_the_moe_layers_of_a_native_model_are_told(name: str, tmp_path: Path) -> None:
    src = tiny.save(native.build(name), tmp_path)
    result = moeify_command("inspect", src, "--json")
    seen = json.loads(result.stdout)
    assert len(seen["moe"]) == 3 and seen["moe"][0]["experts"] == native.EXPERTS
    idle = {"mixtral": 4 / 6, "switch": 5 / 6}[name]
    experts = 3 * native.EXPERTS * {"mixtral": 3, "switch": 2}[name] * 36 * 57
    cost = seen["cost"]["dense"]
    assert cost["parameters"] - cost["active"] == pytest.approx(idle * experts, abs=1)
    if name == "mixtral":
        assert seen["obstacle"].startswith(
            "mixtral is an MoE already: 3 MoE layers (model.layers.{0..2}.mlp), 6 experts"
        )


def test_a_converted_model_is_told_too(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("gpt2"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(4, 2, router="sigmoid"), target="moeify")
    result = moeify_command("inspect", tmp_path / "moe", "--json")
    seen = json.loads(result.stdout)
    assert result.stderr == ""  # no progress bar of transformers
    assert [layer["router"] for layer in seen["moe"]] == ["sigmoid"] * tiny.LAYERS
    assert seen["ffns"] == [] and seen["obstacle"].startswith("it is converted already")


def test_all_shows_what_does_not_fit(tmp_path: Path) -> None:
    src = tiny.save(MODELS["mamba"](), tmp_path)
    short, whole = (moeify_command("inspect", src, *more).stdout for more in ([], ["--all"]))
    assert len(whole.splitlines()) > len(short.splitlines())
    assert "…" in short and "…" not in whole
