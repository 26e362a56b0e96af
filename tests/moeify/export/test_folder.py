"""What lies beside an exported graph, for onnxruntime-genai and optimum."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import moeify
from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from moeify.export.folder import GENAI, end_tokens, export_folder
from moeify.export.onnx_file import check_request
from moeify.export.report import OnnxReport
from moeify.pretrained import load_tokenizer
from moeify.runtime.session import open_session
from tests.fuzz.sources import source
from tests.moeify import tiny


def exported(model: Any, out: Path, tokenizer: Any = None, **options: bool) -> OnnxReport:
    request = check_request(out / "model.onnx", "cpu", None, "float32", **{"overwrite": False, **options})
    return export_folder(model.eval(), request, tokenizer, {})


def test_a_decoder_with_all_that_engines_read(tmp_path: Path) -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(3, 2))
    model.generation_config.eos_token_id = [2, 7]
    report = exported(model, tmp_path / "out", load_tokenizer(source("llama")))
    assert report.path == str(tmp_path / "out/model.onnx")
    found = json.loads((tmp_path / "out" / GENAI).read_text())["model"]
    assert found["eos_token_id"] == [2, 7] and found["context_length"] == model.config.max_position_embeddings
    decoder, config = found["decoder"], model.config
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (tiny.LAYERS, config.num_key_value_heads)
    assert (decoder["head_size"], decoder["num_attention_heads"]) == (config.head_dim, config.num_attention_heads)
    inputs = ["attention_mask", "input_ids", "position_ids"]  # in one order, so that two runs write the same file
    assert list(decoder["inputs"]) == [*inputs, "past_key_names", "past_value_names"]
    session = open_session(tmp_path / "out" / decoder["filename"], provider="cpu")
    for found, values in ((decoder["inputs"], session.get_inputs()), (decoder["outputs"], session.get_outputs())):
        names = {name % layer if "%d" in name else name for name in found.values() for layer in range(tiny.LAYERS)}
        assert {value.name for value in values} == names
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "llama"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [1, 2]
    tokenizer = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # of transformers 4, which optimum has
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]  # it adds another


def test_the_tokens_that_end_a_text_and_who_says_so() -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    tokenizer: Any = SimpleNamespace()
    assert end_tokens(model, None) == []
    tokenizer.eos_token_id = 5
    assert end_tokens(model, tokenizer) == [5]
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=3))
    assert end_tokens(model, tokenizer) == [3]
    model.generation_config.eos_token_id = [2, 7]
    assert end_tokens(model, tokenizer) == [2, 7]
    model.generation_config.eos_token_id = "</s>"
    with pytest.raises(CheckpointError, match="eos_token_id is '</s>': expected the number of a token"):
        end_tokens(model, tokenizer)


def test_an_encoder_is_nothing_for_genai(tmp_path: Path) -> None:
    exported(tiny.build("bert"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.onnx"]


def test_nothing_is_left_of_a_failure_and_the_old_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    exported(tiny.build("bert"), out)
    before = (out / "model.onnx").read_bytes()

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError

    model = tiny.build("bert")
    monkeypatch.setattr(model.config, "save_pretrained", failing)
    with pytest.raises(RuntimeError):
        exported(model, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.onnx").read_bytes() == before
