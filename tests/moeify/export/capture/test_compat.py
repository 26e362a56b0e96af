from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

import moeify
from moeify.export.capture.compat import broadcast_padding, traceable

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


class Rotary(nn.Module):
    """Multiplies pairs of features by complex numbers, each position's by its own, as DeepSeek-V2 does."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None]).flatten(-2)


def test_complex_numbers_are_exported_as_pairs(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 5, 2, 6)}
    assert moeify.export_onnx(Rotary(), tmp_path / "net.onnx", example_inputs=inputs).passed


class Normalizing(nn.Module):
    """Holds a number that half precision rounds, as T5Gemma does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * torch.tensor(7**0.5, dtype=x.dtype)
        return y


def test_a_number_of_half_precision_is_not_rounded_in_the_proof(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 7).half()}
    report = moeify.export_onnx(Normalizing().half(), tmp_path / "net.onnx", "portable", example_inputs=inputs)
    assert report.passed
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert "Cast" not in {node.op_type for node in graph.node}
    (number,) = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.dims]
    assert number == torch.tensor(7**0.5).half().numpy()


def test_a_size_of_the_graph_may_become_a_tensor(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / torch.tensor([x.shape[0]])

    assert moeify.export_onnx(Counting(), tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 7)}).passed


def test_a_padding_mask_that_is_broadcast_is_the_same_mask() -> None:
    padding = torch.tensor([[True, True, False], [False, True, True]])
    index = [torch.arange(size).reshape(shape) for size, shape in
             ((2, (2, 1, 1, 1)), (1, (1, 1, 1, 1)), (2, (1, 1, 2, 1)), (3, (1, 1, 1, 3)))]  # fmt: skip
    indexed = masking_utils.padding_mask_function(padding)(*index)
    before = masking_utils.padding_mask_function
    with broadcast_padding():
        broadcast = masking_utils.padding_mask_function(padding)(*index)
        part = masking_utils.padding_mask_function(padding)(*index[:3], index[3][..., :2])
    assert torch.equal(broadcast.expand_as(indexed), indexed)
    assert torch.equal(part.expand(2, 1, 1, 2), indexed[:, :, :1, :2])
    assert masking_utils.padding_mask_function is before
