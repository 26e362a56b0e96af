from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

import moeify
from moeify.export.capture.clamped_gate import ClampedGate, clamped_gate

tf: Any = transformers


class Experts(nn.Module):
    """As transformers describes experts; only the gate matters."""

    has_gate, has_post_expert_norm = True, False

    def __init__(self, limit: float, alternating: bool, last: bool = False) -> None:
        super().__init__()
        self.limit, self.is_concatenated, self.last = limit, not alternating, last

    def _apply_gate(self, pairs: Tensor) -> Tensor:
        gate, up = pairs.chunk(2, dim=-1) if self.is_concatenated else (pairs[..., ::2], pairs[..., 1::2])
        up = up.clamp(-self.limit, self.limit)
        if self.last:
            return nn.functional.silu(gate).clamp(max=self.limit) * up
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(1.3 * gate) * (up + 0.25)


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize("limit", [7.0, 0.5, math.inf])
def test_a_gate_is_measured(limit: float, alternating: bool) -> None:
    found = clamped_gate(Experts(limit, alternating))
    assert found is not None and found.alternating == alternating
    assert (found.alpha, found.beta, found.limit) == pytest.approx((1.3, 0.25, limit), rel=1e-6)


def test_a_clamp_at_another_place_is_another_gate() -> None:
    assert clamped_gate(Experts(7.0, False, last=True)) is None


def test_the_plain_gate_has_a_name_already() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tf.MixtralModel(tf.MixtralConfig(vocab_size=11, num_key_value_heads=1, num_local_experts=2, **sizes))
    (experts,) = [module for name, module in model.named_modules() if name.endswith("experts")]
    assert clamped_gate(experts) is None


def test_it_is_what_it_says() -> None:
    gate, up = torch.tensor([3.0, -1.0]), torch.tensor([-5.0, 1.0])
    expected = [2 / (1 + math.exp(-3)) * (-2 + 1), -1 / (1 + math.exp(1.5)) * (1 + 1)]
    assert ClampedGate(1.5, 1.0, 2.0, False)(gate, up).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "quantize", "dtype", "operator"),
    [
        ("portable", None, torch.float32, "moeify::SparseMoE"),
        ("cuda", None, torch.float16, "com.microsoft::MoE"),
        ("cpu", "int4", torch.float32, "com.microsoft::QMoE"),
    ],
)
def test_gpt_oss_has_one_operator_a_layer(
    tmp_path: Path, target: str, quantize: str | None, dtype: torch.dtype, operator: str
) -> None:
    """Its weights are stored transposed, its gate and up rows alternate, and all four have biases."""
    config = tf.GptOssConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=101, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = tf.GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=2.0 if "experts" in name else 0.1)  # far enough to be clamped
    report = moeify.export_onnx(model.to(dtype), tmp_path / "oss.onnx", target, quantize)
    assert report.passed and report.operators[operator] == 1
    proto = onnx.load(tmp_path / "oss.onnx")
    onnx.checker.check_model(proto, full_check=True)
    limits = [a.f for node in proto.graph.node for a in node.attribute if a.name == "swiglu_limit"]
    assert limits == ([] if target == "portable" else [7.0])
