"""transformers is entered through one door, and no code of a checkpoint runs behind it."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from moeify.errors import CheckpointError
from moeify.pretrained import (
    load_config,
    load_generation_config,
    load_model,
    load_tensors,
    load_tokenizer,
    save_tokenizer,
)
from tests.moeify import tiny

ROOT = Path(__file__).resolve().parents[2]
DOOR = "moeify/pretrained.py"


def calls_of_loaders(source: str) -> Iterator[int]:
    """The lines that let transformers load something from files."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"from_pretrained", "get_class_from_dynamic_module"}:
            yield node.lineno


def test_nothing_in_the_library_goes_round_the_door() -> None:
    files = [path for folder in ("moeify", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    assert [name for name in names if name != DOOR and list(calls_of_loaders((ROOT / name).read_text()))] == []


def test_a_call_that_goes_round_the_door_is_found() -> None:
    assert list(calls_of_loaders("from transformers import AutoModel\nAutoModel.from_pretrained('x')")) == [2]


def planted(folder: Path, model_type: str) -> Path:
    """A folder whose config and tokenizer name code that leaves a file behind."""
    (folder / "evil.py").write_text(f"open({str(folder / 'it_ran')!r}, 'w')\nclass Evil: ...\n")
    entries = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": entries}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    return folder


@pytest.mark.parametrize("model_type", ["llama", "evil"])
@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_code_beside_a_checkpoint_does_not_run(
    load: object, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = planted(tmp_path, model_type)
    try:
        load(folder)  # type: ignore[operator]  # either of the two
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not (folder / "it_ran").exists()


def test_what_transformers_raises_is_one_line_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers does not load the model") as caught:
        load_model(LlamaForCausalLM, tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_some_tensors_are_loaded_into_a_model_that_is_there(name: str) -> None:
    model = tiny.build("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    place = name if name.startswith("model.") else f"model.{name}"
    value = torch.randn(before[place].shape, dtype=torch.float64)
    load_tensors(model, {name: value}, Path("x"))  # type: ignore[arg-type]
    after = model.state_dict()
    assert after.pop(place).equal(value.float())
    assert all(tensor.equal(before[key]) for key, tensor in after.items())


def test_tensors_that_cannot_be_read_are_one_line() -> None:
    class Damaged:
        def __getitem__(self, _: object) -> None:
            raise OSError("no such sector\nsecond line")

    with pytest.raises(CheckpointError, match=r"^x: transformers does not load its tensors \(no such sector\)$"):
        load_tensors(tiny.build("llama"), {"model.norm.weight": Damaged()}, Path("x"))  # type: ignore[arg-type]


def test_a_damaged_generation_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="its generation config"):
        load_generation_config(tiny.build("llama"), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.txt", "chat_template.jinja"])
def test_a_file_that_would_fill_the_memory_is_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 3 * 2**30)
    with pytest.raises(
        CheckpointError, match=rf"{name} cannot be read: it holds 3,221,225,472 bytes, expected at most"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_model(LlamaForCausalLM, tmp_path)
    os.remove(tmp_path / name)
    os.mkfifo(tmp_path / name)  # transformers passes by what is no file
    with pytest.raises(CheckpointError, match="transformers does not load its tokenizer"):
        load_tokenizer(tmp_path)


def test_a_token_with_a_number_that_nobody_can_count_to_is_refused(tmp_path: Path) -> None:
    words = {"w0": 0, "w1": 2**31}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has a token 2147483648, expected at most 10000000"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_written_in_the_words_of_transformers_4(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"w0": 0, "w1": 1}, "unk_token": "w0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    save_tokenizer(tokenizer, tmp_path)
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in fields  # a dictionary there: llama.cpp's converter stops at a list
