from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from moeify.export.restack import traceable
from torch import nn

import moeify

tf: Any = transformers


@pytest.fixture(scope="module")
def switch() -> nn.Module:
    """One sparse layer on each side; two tokens of a sequence fill an expert."""
    config = tf.SwitchTransformersConfig(
        vocab_size=101, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_layers=1, num_decoder_layers=1, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=2, decoder_start_token_id=0,
    )  # fmt: skip
    model: nn.Module = tf.SwitchTransformersForConditionalGeneration(config).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@torch.no_grad()
def test_the_same_is_computed(switch: nn.Module) -> None:
    ids = torch.randint(1, 101, (3, 9))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    before = list(switch.state_dict())
    torch.testing.assert_close(traceable(switch)(**inputs).logits, switch(**inputs).logits)
    assert list(switch.state_dict()) == before


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_switch_transformers_is_exported(tmp_path: Path, switch: nn.Module, quantize: Any) -> None:
    report = moeify.export_onnx(switch, tmp_path / "switch.onnx", quantize=quantize)
    operator = "com.microsoft::QMoE" if quantize else "moeify::SparseMoE"
    assert report.passed and report.operators[operator] == 2
