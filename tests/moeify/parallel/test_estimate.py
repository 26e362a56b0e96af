"""Formulas against simulations and worked examples; bytes are held to the real dispatcher's in test_dispatcher.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.conversion.dense import Dense
from moeify.errors import ConfigError
from moeify.parallel.costs import Layer, Setup
from moeify.parallel.estimate import dropped_share, estimate, worst_rows
from moeify.parallel.sizes import found_layers, planned_layers
from moeify.planning.make_plan import make_plan
from moeify.routing.capacity import drop_overflow, expert_capacity
from tests.moeify import native, tiny

MIXTRAL = Layer(32, 8, 2, 4096, 14336, 2 * 14336, 3 * 4096 * 14336)
SETUP = Setup((MIXTRAL,), 46_702_792_704, 2, ep=8, copies=1, tokens=8192, bandwidth=450e9, flops=400e12)


def test_dropped_shares_are_those_of_random_choices() -> None:
    draw = torch.Generator().manual_seed(0)
    for tokens, experts, top_k, factor in ((96, 8, 2, 1.0), (96, 8, 2, 1.25), (50, 6, 3, 0.7), (64, 16, 1, 2.0)):
        capacity = expert_capacity(tokens, experts, top_k, factor)
        dropped = 0
        for _ in range(200):
            scores = torch.rand(tokens, experts, generator=draw)
            dropped += int(drop_overflow(scores.topk(top_k).indices, scores, capacity)[1])
        share = dropped_share(tokens, experts, top_k, capacity)
        assert dropped / (200 * tokens * top_k) == pytest.approx(share, abs=0.004)
    normal = (0.75 * 250_000 / (2 * torch.pi)) ** 0.5 / 250_000  # E[max(0, X - mean)] is the deviation/sqrt(2 pi)
    assert dropped_share(1_000_000, 8, 2, 250_000) == pytest.approx(normal, rel=1e-3)
    assert dropped_share(100, 4, 4, 60) == pytest.approx(0.4) and dropped_share(100, 4, 2, 100) == 0


def test_the_worst_rows_are_reached_and_never_passed() -> None:
    """All tokens of all ranks like the experts of the first rank best."""
    tokens, experts, ep = 20, 8, 4
    for top_k in (1, 2, 3):
        for factor in (0.5, 1.0, 1.25, 2.0, None):
            layer = Layer(1, experts, top_k, 4, 4, 8, 96)
            setup = replace(SETUP, layers=(layer,), ep=ep, tokens=tokens)
            capacity = tokens if factor is None else expert_capacity(tokens, experts, top_k, factor)
            rows = 0
            for _ in range(ep):
                scores = torch.rand(tokens, experts)
                scores[:, : experts // ep] += 1
                ids, _ = drop_overflow(scores.topk(top_k).indices, scores, capacity)
                rows += int((ids < experts // ep).sum())
            most = worst_rows(layer, setup, capacity)
            assert rows <= most and ((top_k == 1 and factor is not None) or rows == most)


def test_a_known_model_costs_what_was_worked_out_by_hand() -> None:
    """Mixtral on 8 ranks: 4 exchanges of 2·T·K·H·7/8 bytes in the time of 6·T·K·H·(J+I) operations."""
    even = 4 * 2 * 7 / 8 * 400e12 / (6 * 3 * 14336)
    near, far = estimate(SETUP), estimate(replace(SETUP, bandwidth=50e9))
    assert near.layers[0].ratio == pytest.approx(even / 450e9, rel=0.01)
    assert far.layers[0].ratio == pytest.approx(even / 50e9, rel=0.01)
    assert "FSDP moves fewer bytes from 129,0" in near.advice[0] and near.advice[0].startswith(
        "engine: FSDP alone (0 ms"
    )
    assert far.advice[0].startswith("engine: EP and FSDP")  # experts of 240 GB need longer than they compute
    sent = 32 * 4 * 8192 * 2 * 4096 * 2 * 7 // 8
    assert near.engines[0].exchanged == far.engines[0].exchanged == pytest.approx(sent, rel=1e-3)
    assert near.engines[2].exchanged == 0 and near.engines[2].gathered == 3 * 32 * 8 * MIXTRAL.parameters * 2 * 7 // 8
    assert near.engines[0].weights == near.engines[2].weights == 46_702_792_704 * 8 // 8
    assert near.engines[0].whole == 0 and near.engines[2].whole == 2 * 2 * 8 * MIXTRAL.parameters
    fine = replace(MIXTRAL, experts=128, top_k=8, intermediate=768, up_rows=1536, parameters=3 * 4096 * 768)
    slow = estimate(replace(SETUP, layers=(fine,), bandwidth=50e9))
    assert "keep the 8 ranks inside one node" in slow.advice[1] and "capacity: factor 1.25" in slow.advice[2]
    assert "it may cross nodes" in far.advice[1] and "capacity: none, if memory" in far.advice[2]
    assert "2 times ours" in near.advice[3]


def test_copies_hold_less_and_move_weights() -> None:
    one, four = estimate(SETUP).engines, estimate(replace(SETUP, copies=4)).engines
    assert four[0].weights == one[0].weights // 4 and four[1].weights == one[1].weights
    experts = 32 * 8 * MIXTRAL.parameters
    assert four[0].gathered == 3 * experts // 8 * 2 * 3 // 4 and four[1].gathered == 2 * experts // 8 * 2 * 3 // 4
    assert one[1].gathered == 0 and four[0].whole == 4 * MIXTRAL.parameters


def test_expert_choice_fills_each_expert() -> None:
    layer = replace(MIXTRAL, balanced=True, capacity_factor=2.0)
    (at,) = estimate(replace(SETUP, layers=(layer,))).layers[0].at
    assert at.rows == at.worst_rows == 8 * 4096 and at.dropped == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ep": 3}, "8 experts cannot be shared evenly by 3 ranks: choose --ep 2 or 4 or 8"),
        ({"layers": ()}, "nothing to share"),
        ({"layers": (replace(MIXTRAL, slots=True),)}, "soft mixtures send slots"),
    ],
)
def test_what_cannot_be_counted_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        estimate(replace(SETUP, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5_gated"])
def test_a_plan_and_what_is_made_of_it_have_the_same_sizes(name: str) -> None:
    import moeify

    model, config = tiny.build(name), MoEConfig(6, 2, granularity=1, capacity_factor=1.5, method="noise")
    dense = Dense(model)
    planned = planned_layers(make_plan(dense.model, dense.graph_module, dense.inspection, config, "all"))
    assert planned == found_layers(find_layers(moeify.convert(model, config)))
    assert planned[0].capacity_factor == 1.5 and planned[0].hidden == tiny.HIDDEN


def test_layers_of_transformers_are_counted() -> None:
    (layer,) = found_layers(find_layers(native.build("qwen2_moe")))
    assert layer == Layer(3, native.EXPERTS, native.TOP_K, 36, 23, 46, 3 * 36 * 23)
    (layer,) = found_layers(find_layers(native.build("gpt_oss")))
    assert layer == Layer(3, native.EXPERTS, native.TOP_K, 36, 57, 114, 3 * 36 * 57 + 114 + 36)
