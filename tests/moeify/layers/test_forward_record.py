from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from weakref import ref

import pytest
import torch

from moeify.config import MoEConfig
from moeify.layers.forward_record import ForwardRecord, summed_losses
from tests.moeify.layers import make

CONFIG = MoEConfig(5, 2, aux_loss=0.5, z_loss=0.25, attach_losses=False)


def test_the_sum_of_what_ran() -> None:
    layers = [make.layer(CONFIG), make.layer(replace(CONFIG, aux_loss=2.0)), make.layer(CONFIG)]
    assert summed_losses(layers) is None
    for layer in layers[:2]:
        layer(make.inputs(2, 3))
    one, two = (layer.losses() for layer in layers[:2])
    expected = 0.5 * one["balance"] + 0.25 * one["z"] + 2.0 * two["balance"] + 0.25 * two["z"]
    found = summed_losses(layers)
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert summed_losses([make.layer(MoEConfig(5, 2, aux_loss=0.0))]) is None


def test_layers_know_whether_they_were_trained_and_balanced() -> None:
    layer = make.layer(CONFIG).train()
    out = layer(make.inputs(2, 3))
    assert (layer.record.trained, layer.record.balanced) == (False, False)
    torch.autograd.backward(out.sum())
    assert (layer.record.trained, layer.record.balanced) == (True, False)
    with pytest.warns(UserWarning, match="nothing balances them"):
        out = layer(make.inputs(2, 3))
    loss = summed_losses([layer])
    assert loss is not None
    torch.autograd.backward(out.sum() + loss)
    assert (layer.record.trained, layer.record.balanced) == (True, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(make.inputs(2, 3))


def test_a_pass_is_let_go_when_the_next_one_comes() -> None:
    layer = make.layer(CONFIG).train()
    layer(make.inputs(2, 3))
    gc.disable()
    try:
        kept: ref[ForwardRecord] = ref(layer.record)
        layer(make.inputs(2, 3))
        assert kept() is None  # without waiting for the garbage collector: it holds activations
    finally:
        gc.enable()
