from __future__ import annotations

import torch

from moeify.config import MoEConfig
from moeify.families.gated import IDLE, gated_shared_expert
from tests.moeify.conversion.test_stored_tensors import SITE


def test_the_gate_halves_shared_experts_and_is_no_zero_beside_an_idle_one() -> None:
    held = gated_shared_expert("m")
    gate, down = held["m.shared_expert_gate.weight"], held["m.shared_expert.down_proj.weight"]
    zero = gate("n", SITE, MoEConfig(4, 2, shared_experts=1)).build()  # type: ignore[operator]
    idle = gate("n", SITE, MoEConfig(4, 2)).build()  # type: ignore[operator]
    assert torch.sigmoid(zero.sum()) * down.scale == 1 and idle.ne(0).all()  # type: ignore[union-attr]
    assert down.idle == IDLE  # type: ignore[union-attr]
