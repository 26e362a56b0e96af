"""Clipping on one rank is torch's own; that it is one process's on several is in test_shard.py."""

from __future__ import annotations

import copy

import pytest
import torch

import moeify
from moeify.errors import ConfigError
from tests.moeify.parallel import small


@pytest.mark.parametrize("limit", [0.05, 1e9])
def test_on_one_rank_it_is_what_torch_does(limit: float) -> None:
    model = small.net()
    torch.autograd.backward(model(small.batch(0, 0)).square().mean())
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = moeify.clip_grad_norm_(model, limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(other.parameters(), limit))
    assert small.apart(small.gradients(model), small.gradients(other)) < 1e-14


def test_without_gradients_the_norm_is_0() -> None:
    assert moeify.clip_grad_norm_(small.net(), 1.0) == 0


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=r"max_norm is .*: choose a number above 0"):
        moeify.clip_grad_norm_(small.net(), limit)
