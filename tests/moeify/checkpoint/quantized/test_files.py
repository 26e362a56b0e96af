from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from tests.moeify import tiny
from tests.moeify.checkpoint.quantized.make import NAME, refusal, scales, write
from tests.moeify.command import moeify_command

F8 = torch.float8_e4m3fn
FP8 = {"quant_method": "fp8"}
CONVERT = ["--experts", "3", "--top-k", "2"]


def quantized_llama(folder: Path) -> tuple[Path, Path]:
    """A model with FP8 projections, and the same model with their values in bfloat16."""
    src, plain = tiny.save(tiny.build("llama"), folder / "src"), folder / "plain"
    plain.mkdir()
    tensors, values = {}, {}
    for name, tensor in load_file(src / "model.safetensors").items():
        values[name] = tensors[name] = tensor.bfloat16()
        if "_proj" in name:
            tensors[name] = (tensor / 0.01).to(F8)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.01)
            values[name] = (tensors[name].float() * tensors[f"{name}_scale_inv"]).bfloat16()
    config = {**json.loads((src / "config.json").read_text()), "dtype": "bfloat16"}
    for place, data, more in ((src, tensors, {"quantization_config": FP8}), (plain, values, {})):
        save_file(data, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps({**config, **more}))
    return src, plain


def test_a_quantized_checkpoint_becomes_what_its_values_become(tmp_path: Path) -> None:
    src, plain = quantized_llama(tmp_path)
    refused = moeify_command("convert", src, tmp_path / "moe", *CONVERT)
    assert refused.exit_code == 1 and "is quantized (scheme: fp8): pass --dequantize" in refused.output
    result = moeify_command("convert", src, tmp_path / "moe", *CONVERT, "--dequantize")
    assert result.exit_code == 0, result.output
    tiny.convert_files(plain, tmp_path / "same", MoEConfig(3, 2))
    found, same = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "same"))
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in found)
    assert (tmp_path / "moe/config.json").read_bytes() == (tmp_path / "same/config.json").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "moe/config.json").read_text())
    assert moeify_command("verify", src, tmp_path / "moe", "--dequantize").exit_code == 0
    loaded, usual = moeify.load(src, dequantize=True), moeify.load(plain)
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(usual, "llama"))


def test_weights_have_the_dtype_that_the_config_names(tmp_path: Path) -> None:
    for named, dtype in ((None, "F32"), ("bfloat16", "BF16"), ("float8_e4m3fn", "F32")):
        folder = write(tmp_path, {"weight": torch.ones(2, 3).to(F8), "weight_scale": scales(1)}, FP8, named)
        with open_source(folder, dequantize=True) as source:
            assert source.info(f"{NAME}.weight").dtype == dtype
            assert source.span(f"{NAME}.weight") is None and source.span("model.norm.weight") is not None


def test_a_checkpoint_without_a_quantized_tensor_is_not_what_its_config_says(tmp_path: Path) -> None:
    folder = write(tmp_path, {"weight": torch.ones(2, 3)}, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert "no tensor that is stored so" in refusal(folder)


def test_what_cannot_be_undone_is_refused_with_and_without_the_flag(tmp_path: Path) -> None:
    folder = write(tmp_path, {"weight": torch.ones(2, 3)}, {"quant_method": "aqlm"})
    for dequantize in (False, True):
        with pytest.raises(CheckpointError, match=r"quantized \(scheme: aqlm\) and cannot be converted"):
            open_source(folder, dequantize=dequantize)


def test_a_checkpoint_that_is_not_quantized_is_read_as_ever(tmp_path: Path) -> None:
    folder = write(tmp_path, {"weight": torch.ones(2, 3)}, {})
    with open_source(folder, dequantize=True) as source:
        assert not source.computed and source.config["model_type"] == "llama"
