from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

import moeify
from moeify.errors import MoeifyError
from moeify.export.lower.standard import lower_standard
from moeify.runtime import session
from moeify.runtime.text import Speed, TextModel
from tests.moeify import tiny
from tests.moeify.export.lower.layer_graph import Layer

PROMPT = [5, 17, 3, 99, 41]


@pytest.fixture(scope="module")
def moe() -> nn.Module:
    return tiny.differing_moe()


@pytest.fixture(scope="module")
def path(moe: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    moeify.export_onnx(moe, path, metadata={"tokenizer": tiny.tokenizer().backend_tokenizer.to_str()})
    return path


def generated(moe: nn.Module, count: int) -> list[int]:
    untyped: Any = moe
    ids = untyped.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 5, dtype=torch.long), max_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = ids[0, 5:].tolist()
    return tokens


def test_it_generates_what_the_model_generates(moe: nn.Module, path: Path) -> None:
    model = TextModel(path, provider="cpu", threads=1)
    assert list(model.tokens(PROMPT, 12)) == generated(moe, 12)
    assert (model.speed.prompt_tokens, model.speed.new_tokens) == (5, 11)
    assert model.speed.prompt_seconds > 0 and model.speed.new_seconds > 0


def test_keys_and_values_have_the_dtype_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny._LLAMA, "num_hidden_layers", 1)
    half = moeify.convert(tiny.build("llama"), moeify.MoEConfig(4, 2)).half()
    moeify.export_onnx(half, tmp_path / "half.onnx", "portable")
    model = TextModel(tmp_path / "half.onnx", provider="cpu", threads=1)
    assert len(list(model.tokens(PROMPT, 4))) == 4


def test_an_end_token_ends_it(moe: nn.Module, path: Path) -> None:
    expected = generated(moe, 12)
    model = TextModel(path, provider="cpu", threads=1)
    model.end_ids = {expected[3]}
    assert list(model.tokens(PROMPT, 12)) == expected[: expected.index(expected[3])]


def test_words_come_as_they_are_complete(path: Path) -> None:
    """The first two tokens are halves of one character."""
    model = TextModel(path, provider="cpu", threads=1)

    class Halves:
        def encode(self, prompt: str) -> Any:
            return Tokenizer.from_str(model.metadata["moeify.tokenizer"]).encode(prompt)

        def decode(self, ids: list[int]) -> str:
            return ["\ufffd", "é", "é!", "é!?"][len(ids) - 1]

    halves: Any = Halves()
    model.tokenizer = lambda: halves  # type: ignore[method-assign]
    assert list(model.text("w5 w17", 4)) == ["é", "!", "?"]


def test_the_file_carries_its_tokenizer(path: Path, tmp_path: Path) -> None:
    model = TextModel(path, provider="cpu", threads=1)
    assert model.tokenizer().encode("w5 w17").ids == [5, 17]
    proto = onnx.load(path)
    kept = [entry for entry in proto.metadata_props if entry.key != "moeify.tokenizer"]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(MoeifyError, match="the file carries no tokenizer: export it with `moeify export`"):
        TextModel(tmp_path / "bare.onnx").tokenizer()


def test_a_runtime_older_than_the_file_needs_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "runtime_version", lambda: "1.22.0")
    with pytest.raises(MoeifyError, match=r"onnxruntime 1\.22\.0 is too old: 1\.23 or newer"):
        TextModel(path)


def test_a_file_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    model = Layer().graph()
    lower_standard(model)
    ir.save(model, tmp_path / "layer.onnx")
    with pytest.raises(MoeifyError, match="is no causal language model with keys and values: it takes x, expert_ids"):
        TextModel(tmp_path / "layer.onnx")


def test_speed_is_one_line() -> None:
    assert Speed(8, 2.0, 30, 3.0).summary() == "prompt 4.0 tokens/s (8), generation 10.0 tokens/s (30)"


def test_running_a_file_loads_neither_torch_nor_the_exporter(path: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from moeify.cli import main
result = CliRunner().invoke(main, ["run", {str(path)!r}, "--prompt", "w5 w17", "--max-new-tokens", "3"])
assert result.exit_code == 0, result.output
print(len(result.stdout.split()), sorted({{"torch", "transformers", "onnx", "onnxscript"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "3 []\n"
