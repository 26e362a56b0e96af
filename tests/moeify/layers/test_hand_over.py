"""Blocks that compute a part of their FFN go on as they are, and the layer gets what the up projection read."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moeify
from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.layers.hand_over import HandOver, Slot, tie
from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.planning.test_placement import Convolutions, Gate, Spread

CONFIG = MoEConfig(experts=3, top_k=2, aux_loss=0.0)
X = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)


class Twice(nn.Module):
    """One FFN is called twice, the second time after the first has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Spread()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(2 * self.block(x))
        return out


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 31, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(12, 2, 31, dropout=0.0, batch_first=True, activation=F.silu)
    return nn.TransformerDecoder(layer, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "function": Spread,
    "gated": lambda: Spread(nn.GELU(), gated=True),
    "fused, with a norm, in place": lambda: Spread(Gate(), fc1=62),
    "convolutions": Convolutions,
    "called twice": Twice,
    "torch's encoder": encoder,
    "torch's encoder, norm first": lambda: encoder(norm_first=True, activation=F.gelu),
    "torch's decoder": decoder,
}


def pair(name: str) -> tuple[Any, Any, tuple[Tensor, ...]]:
    """A dense model, its conversion, and inputs; nothing is dropped."""
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = (X, X.flip(1)) if name == "torch's decoder" else (X,)
    return model, moeify.convert(copy.deepcopy(model), CONFIG, example_inputs=inputs), inputs


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_dense_model(name: str) -> None:
    dense, moe, inputs = pair(name)
    with torch.no_grad():
        assert tiny.relative(moe(*inputs), dense(*inputs)) < TOLERANCE["float32"]
    results = []
    for model in (dense.train(), moe.train()):
        x = X.clone().requires_grad_()
        y = model(x, *inputs[1:])
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape).sin()).sum().backward()
        results.append((y.detach(), x.grad))
    for expected, result in zip(*results, strict=True):
        assert tiny.relative(result, expected) < 10 * TOLERANCE["float32"]
    if hasattr(dense, "fc2"):
        summed = moe.fc2.experts.down_proj.grad.sum(0)
        assert tiny.relative(summed, dense.fc2.weight.grad) < 10 * TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["gated", "torch's encoder", "convolutions"])
@torch.no_grad()
def test_compiled_exported_copied_and_stored(name: str) -> None:
    _, moe, inputs = pair(name)
    expected = moe(*inputs)
    stored = io.BytesIO()
    torch.save(moe, stored)
    stored.seek(0)
    for model in (
        torch.compile(moe, backend="aot_eager", fullgraph=True),
        torch.export.export(moe, inputs).module(),
        copy.deepcopy(moe),
        torch.load(stored, weights_only=False),
    ):
        torch.testing.assert_close(model(*inputs), expected)


def test_checkpointing_changes_no_gradient() -> None:
    _, moe, _ = pair("gated")
    gradients = []
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        moe.zero_grad()
        run(X.clone().requires_grad_()).square().mean().backward()
        gradients.append([p.grad.clone() for p in moe.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the dense encoder makes one
@torch.no_grad()
def test_padding_does_not_bring_the_fused_kernel_back() -> None:
    dense, moe, _ = pair("torch's encoder")
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    result, expected = (model(X, src_key_padding_mask=padding) for model in (moe, dense))
    assert tiny.relative(result[~padding], expected[~padding]) < TOLERANCE["float32"]


def test_a_module_hands_its_input_over_once() -> None:
    slot, layer = Slot(), nn.Identity()
    up = HandOver(slot, 31, axis=-2)
    tie(layer, slot=slot, axis=-2)
    image = torch.randn(2, 12, 5)
    assert torch.equal(up(image), torch.zeros(2, 31, 5))
    assert torch.equal(layer(torch.zeros(2, 31, 5)), image)
    assert "features=31" in repr(up)
    with pytest.raises(MoeifyError, match="an MoE layer was called without the module that hands its input over"):
        layer(image)


def test_what_is_kept_is_neither_copied_nor_held_longer_than_the_pass() -> None:
    _, moe, inputs = pair("gated")
    moe.fc1(*inputs)
    assert moe.fc1.slot.x is X and moe.gate.slot is moe.fc1.slot
    copied = copy.deepcopy(moe)
    assert copied.fc1.slot.x is None and copied.gate.slot is copied.fc1.slot is not moe.fc1.slot
    moe(*inputs)
    assert moe.fc1.slot.x is None
