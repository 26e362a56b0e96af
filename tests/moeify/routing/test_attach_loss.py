"""The gradient that `attach_loss` adds, in everything that replays, transforms or scales a backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeify.measure import TOLERANCE
from moeify.routers.softmax import softmax_topk
from moeify.routing.attach_loss import attach_loss
from moeify.routing.losses import z_loss
from tests.moeify.routing import draw

randn = partial(draw.randn, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, dtype: str = "float64") -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1)


class Attached(nn.Module):
    """A layer that attaches its auxiliary loss, and `expected`, a script that adds it by hand."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(5, 5, dtype=dtype))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        routing = softmax_topk(x @ self.weight, 2)
        return routing.weights_TK, 0.7 * z_loss(routing.logits_TE)

    def forward(self, x: Tensor) -> Tensor:
        weights, loss = self.parts(x)
        return attach_loss(weights, loss).square()

    def expected(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weights, loss = self.parts(x)
        return torch.autograd.grad(scale * (weights.square().sum() + loss), self.weight)[0]


def gradient(layer: Attached, output: Tensor) -> Tensor:
    return torch.autograd.grad(output.sum(), layer.weight)[0]


def test_attach_loss_changes_no_value_and_adds_the_gradient() -> None:
    layer, x = Attached(), randn(7, 5, seed=1)
    weights, loss = layer.parts(x)
    assert torch.equal(attach_loss(weights, loss), weights)
    close(gradient(layer, layer(x)), layer.expected(x))
    # Once, however the output is used.
    y = attach_loss(weights, loss)
    twice, alone = (torch.autograd.grad(z, layer.weight, retain_graph=True)[0] for z in (y.sum() + 3 * y.sum(), loss))
    close(twice, alone)  # the weights of a token sum to 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_attach_loss_under_activation_checkpointing(reentrant: bool) -> None:
    layer, x = Attached(), randn(7, 5, seed=1).requires_grad_()
    torch.autograd.backward(checkpoint(layer, x, use_reentrant=reentrant).sum())
    assert layer.weight.grad is not None
    close(layer.weight.grad, layer.expected(x))


def test_attach_loss_under_gradient_accumulation() -> None:
    layer, batches = Attached(), [randn(7, 5, seed=1), randn(4, 5, seed=2)]
    for x in batches:
        torch.autograd.backward(layer(x).sum())
    assert layer.weight.grad is not None
    close(layer.weight.grad, layer.expected(batches[0]) + layer.expected(batches[1]))


def test_attach_loss_under_compile() -> None:
    layer, x = Attached(), randn(7, 5, seed=1)
    close(gradient(layer, torch.compile(layer, fullgraph=True, backend="aot_eager")(x)), layer.expected(x))


def test_attach_loss_survives_export() -> None:
    layer, x = Attached(), randn(7, 5, seed=1)
    for strict in (True, False):
        module = torch.export.export(layer, (x,), strict=strict).module()
        (grad,) = torch.autograd.grad(module(x).sum(), list(module.parameters()))
        close(grad, layer.expected(x))


def test_attach_loss_in_mixed_precision() -> None:
    layer, x = Attached(torch.float32), randn(7, 5, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, loss = layer.parts(x)
        y = attach_loss(weights.bfloat16(), loss)
    assert y.dtype == torch.bfloat16
    # A scaled loss: the attached one is scaled alike.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    y = attach_loss(weights, scaler.scale(loss)).square()
    (grad,) = torch.autograd.grad(scaler.scale(y.sum()), layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(grad, layer.expected(x, 1024.0), "bfloat16")


def test_attach_loss_follows_the_rules_of_operators() -> None:
    x, loss = randn(7, 5).requires_grad_(), randn(1)[0].requires_grad_()
    torch.library.opcheck(torch.ops.moeify.attach_loss.default, (x, loss))
