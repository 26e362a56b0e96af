from __future__ import annotations

import torch

from moeify.kernels import reference
from moeify.measure import TOLERANCE
from tests.moeify.layers import make


def test_soft_moe_against_the_paper_written_out() -> None:
    layer = make.layer(make.CONFIGS["soft"], dtype=torch.float64)
    x = make.inputs(2, 7, dtype=torch.float64)
    out = layer(x)
    experts, router = layer.experts, layer.router
    for b in range(2):
        unit_x = x[b] / (x[b].norm(dim=-1, keepdim=True) + 1e-6)
        unit_slots = router.slots / (router.slots.norm(dim=-1, keepdim=True) + 1e-6)
        logits = router.scale * unit_x @ unit_slots.T
        slots = logits.softmax(0).T @ x[b]
        ids = torch.arange(15)[:, None] // 3
        ones = torch.ones(15, 1, dtype=torch.float64)
        done = reference.experts(slots, ids, ones, experts.up, experts.down_proj, None, None, "silu", True)
        expected = logits.softmax(1) @ done
        assert (out[b] - expected).abs().max() <= TOLERANCE["float64"] * expected.abs().max()


def test_padding_is_neither_read_nor_written_and_one_sequence_needs_no_batch() -> None:
    layer = make.layer(make.CONFIGS["soft"])
    x = make.inputs(2, 7)
    make.tell(layer, mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    out = layer(x)
    make.tell(layer)
    torch.testing.assert_close(out[0], layer(x[0]))
    torch.testing.assert_close(out[1, :4], layer(x[1, :4]))
    assert out[1, 4:].eq(0).all()


def test_every_parameter_gets_a_gradient() -> None:
    layer = make.layer(make.CONFIGS["soft"])
    layer(make.inputs(2, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
