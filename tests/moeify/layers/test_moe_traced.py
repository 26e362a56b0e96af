"""A layer under activation checkpointing, torch.compile and torch.export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeify.config import MoEConfig
from tests.moeify.layers import make
from tests.moeify.layers.make import LEARNED, assert_same, call, gradients


@pytest.mark.parametrize("name", LEARNED)
def test_activation_checkpointing_changes_nothing_and_counts_once(name: str) -> None:
    layer = make.layer(make.CONFIGS[name])
    x = make.inputs(3, 7).requires_grad_()
    expected = gradients(layer, call(layer, x))
    counts = layer.counts_E
    layer.counts_E = None
    make.tell(layer)
    torch.manual_seed(3)
    out = checkpoint(layer, x, use_reentrant=False)
    record = layer.record
    assert_same(gradients(layer, out), expected)
    assert layer.record is record
    if counts is not None:
        assert layer.counts_E.equal(counts)


def test_attached_losses_under_reentrant_checkpointing() -> None:
    layer = make.layer(MoEConfig(5, 2, aux_loss=0.3, attach_losses=True))
    x = make.inputs(3, 7).requires_grad_()
    expected = gradients(layer, call(layer, x))
    assert_same(gradients(layer, checkpoint(layer, x, use_reentrant=True)), expected)


@pytest.mark.parametrize("name", ["softmax", "switch", "deepseek_v3", "st_moe"])
def test_compiled_as_one_graph_it_trains_the_same(name: str) -> None:
    layer = make.layer(make.CONFIGS[name])
    x = make.inputs(3, 7)
    expected, record = gradients(layer, call(layer, x)), layer.record
    make.tell(layer)
    torch.manual_seed(3)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    assert layer.record is not record
    assert layer.record.routing.expert_ids_TK.equal(record.routing.expert_ids_TK)
    assert_same(gradients(layer, out), expected)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("training", [True, False])
def test_export_stores_nothing_on_the_layer(name: str, training: bool) -> None:
    layer = make.layer(replace(make.CONFIGS[name], attach_losses=True)).train(training)
    shapes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(layer, (make.inputs(3, 7),), dynamic_shapes=(shapes,), strict=False)
    assert layer.record is None
    if not training:
        x = make.inputs(4, 5)
        torch.testing.assert_close(program.module()(x), layer(x))
