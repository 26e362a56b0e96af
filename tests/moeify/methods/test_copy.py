from __future__ import annotations

import torch

import moeify
from moeify.methods.copy import Copy


def test_a_copy_is_the_weight_itself_and_exact() -> None:
    weight = torch.ones(3, 2)
    assert Copy().changed(weight, 0, 1, "experts.0", "up0") is weight
    assert Copy.exact and moeify.MoEConfig(8, 2, method="copy").exact
