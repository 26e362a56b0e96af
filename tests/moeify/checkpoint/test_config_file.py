from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moeify.checkpoint.config_file import check_counts, load_config
from moeify.errors import CheckpointError
from moeify.files.limits import CONFIG_BYTES, CONFIG_VALUES, EXPERTS, HEADS, LABELS, LAYERS, SIZES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has weights but no config.json"),
        ("{", "config.json is not valid JSON"),
        ("[]", "holds a JSON list, expected an object"),
        ("{}", "names no model_type"),
        ('{"model_type": "llama", "auto_map": {}}', "--trust-remote-code"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "gptq.: pass --dequantize"),
        ('{"model_type": "llama", "compression_config": {"quant_method": "fp8"}}', "fp8.: pass --dequantize"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "moeify"}}', "rename the field"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', r"quantized \(scheme: unnamed\)"),
    ],
)
def test_a_config_that_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [{"auto_map": {}}, {"moeify": {"plan": {"n_layers": 10**12}}}])
def test_a_config_that_is_accepted(tmp_path: Path, field: dict[str, Any]) -> None:
    config = {"model_type": "llama", **field}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path, trust_remote_code="auto_map" in field) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_implementation": "someone/kernel"}, "attn_implementation in config.json"),
        ({"text_config": {"_attn_implementation": "someone/kernel:mha"}}, "_attn_implementation in config.json"),
        ({"text_config": {"auto_map": {}}}, "auto_map in config.json"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers = 1e\+12, expected at most 10000"),
        ({"n_layer": LAYERS + 1}, "n_layer = 10001"),
        ({"encoder_layers": float("inf")}, "encoder_layers = inf"),
        ({"encoder_layers": float("nan")}, "encoder_layers = nan"),
        ({"depths": [2, LAYERS + 1]}, "depths = 10001"),
        ({"vision_config": {"depth": LAYERS + 1}}, "depth = 10001"),
        ({"parts": [{"num_layers": LAYERS + 1}]}, "num_layers = 10001"),
        ({"num_key_value_heads": 10**6}, "num_key_value_heads = 1e"),
        ({"n_head": HEADS + 1}, "n_head = 8193"),
        ({"num_local_experts": EXPERTS + 1}, "num_local_experts = 8193"),
        ({"text_config": 2**31}, "text_config = 2147483648, expected an object"),
        ({"num_labels": 10**9}, "num_labels = 1e"),
        ({"text_config": {"head_dim": 2**31}}, "head_dim = 2.147"),
        ({"hidden_sizes": [8, SIZES + 1]}, "hidden_sizes = 1e"),
    ],
)
def test_a_field_that_transformers_would_not_survive(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path, trust_remote_code=False)


def test_what_is_as_large_as_the_limits_is_read(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "n_head": HEADS, "num_labels": LABELS,
              "num_experts": EXPERTS, "vocab_size": SIZES, "max_position_embeddings": 10**9, "num_layers": "x",
              "layer_types": ["full"], "label2id": {"heads": 10**6}, "attn_implementation": "sdpa", "alpha": math.inf,
              "pruned_heads": {}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path, trust_remote_code=False) == config
    check_counts(tmp_path, {})


def test_a_kernel_of_the_hub_is_code_that_may_be_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "attn_implementation": "someone/kernel"}')
    assert load_config(tmp_path, trust_remote_code=True)["model_type"] == "llama"


def test_a_config_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(3 * 10**9)  # sparse
    with pytest.raises(CheckpointError, match=f"holds 3,000,000,000 bytes, expected at most {CONFIG_BYTES:,}"):
        load_config(tmp_path, trust_remote_code=False)
    (tmp_path / "config.json").write_text("[" + "[]," * CONFIG_VALUES + "1]")
    with pytest.raises(CheckpointError, match=f"holds more than {CONFIG_VALUES:,} values"):
        load_config(tmp_path, trust_remote_code=False)
