"""Models whose code expects the dense FFN are refused before anything is changed or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)
SIZES: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 37, "vocab_size": 50, "num_attention_heads": 2}


class Asks(nn.Module):
    """A block that looks into its FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Linear(31, 12))

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.mlp[0]
        out: Tensor = x + self.mlp(x.to(first.weight.dtype))
        return out


def test_a_block_that_looks_into_its_ffn_stays_as_it_was() -> None:
    model = nn.Sequential(Asks(), Asks())
    before = repr(model)
    with pytest.raises(RefusedError, match=r"the converted model does not run .*subscriptable"):
        moeify.convert(model, CONFIG, example_inputs=torch.zeros(2, 5, 12))
    assert repr(model) == before


def test_no_checkpoint_is_written_of_a_model_that_would_not_run(tmp_path: Path) -> None:
    model = transformers.IBertForMaskedLM(transformers.IBertConfig(num_hidden_layers=2, **SIZES))
    src = tiny.save(model, tmp_path / "src")
    with pytest.raises(RefusedError, match="the converted model does not run"):
        tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_dense_layers_between_mixtures_that_do_not_trace_convert() -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=50, d_model=24, d_kv=12, d_ff=37, num_heads=2, num_experts=3, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    model: Any = transformers.SwitchTransformersForConditionalGeneration(config)
    model.eval()
    ids = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 12]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        moeify.convert(model, CONFIG)
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    converted = [name for name, module in model.named_modules() if isinstance(module, SparseMoE)]
    assert converted == ["encoder.block.0.layer.1.mlp", "decoder.block.0.layer.2.mlp"]
    assert tiny.relative(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize("router", [moeify.routers.Hash(vocab_size=61), moeify.routers.Soft(slots=2)], ids=str)
def test_every_router_is_rehearsed(router: Any) -> None:
    model = moeify.convert(tiny.build("llama"), MoEConfig(3, 1, router=router))
    assert "MoE" in repr(model)


class Rescaled(nn.Module):
    """It looks into its FFN in training only, where RWKV scales weights back."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Linear(31, 12))

    def forward(self, x: Tensor) -> Tensor:
        last: Any = self.mlp[2] if self.training else None
        out: Tensor = x + self.mlp(x) * (1.0 if last is None else last.weight.shape[0] / 12)
        return out


def test_a_model_that_would_not_train_stays_as_it_was() -> None:
    model = nn.Sequential(Rescaled(), Rescaled()).eval()
    before = repr(model)
    with pytest.raises(RefusedError, match=r"does not run \(in training, TypeError: .*subscriptable"):
        moeify.convert(model, CONFIG, example_inputs=torch.zeros(2, 5, 12))
    assert repr(model) == before


class Untrained(Rescaled):
    """It does not run in training, converted or not."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError
        out: Tensor = x + self.mlp(x)
        return out


def test_what_the_dense_model_cannot_is_no_obstacle() -> None:
    model = moeify.convert(nn.Sequential(Untrained(), Untrained()), CONFIG, example_inputs=torch.zeros(2, 5, 12))
    assert "MoE" in repr(model)
