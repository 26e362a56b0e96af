"""Which loss each setting asks for, over which tokens, alone and among data-parallel ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.routers.noisy_topk import noisy_topk
from moeify.routers.sigmoid import sigmoid_grouped
from moeify.routers.softmax import softmax_topk
from moeify.routing import losses as reference
from moeify.routing.balance import layer_losses, step_counts, weighted_sum
from moeify.routing.record import Routing
from tests.moeify.routing.draw import randn

MASK = torch.arange(21) % 7 != 5


def routed(seed: int = 0) -> Routing:
    return softmax_topk(randn(21, 5, seed=seed) + torch.linspace(0, 2, 5), 2)


def balance(config: MoEConfig, routing: Routing) -> Tensor:
    step = step_counts(routing, config, mask_T=MASK)
    return layer_losses(routing, config, mask_T=MASK, sequences=3, step=step)["balance"]


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("level", ["batch", "sequence", "global"])
@pytest.mark.parametrize("choices", ["topk", "first_choice"])
def test_choices_levels_and_scales(choices: Any, level: Any, divide: bool) -> None:
    config = MoEConfig(5, 2, balance=choices, balance_level=level, divide_loss_by_top_k=divide)
    routing = routed()
    expected = reference.load_balancing_loss(
        routing.scores_TE,
        routing.expert_ids_TK[:, : 1 if choices == "first_choice" else 2],
        divide_by_top_k=divide,
        mask_T=MASK,
        sequences=3 if level == "sequence" else 1,
    )
    torch.testing.assert_close(balance(config, routing), expected)


def test_deepseek_is_a_loss_within_each_sequence_at_any_level() -> None:
    routing = routed()
    expected = reference.deepseek_sequence_loss(routing.scores_TE, 2, mask_T=MASK, sequences=3)
    assert torch.equal(balance(MoEConfig(5, 2, balance="deepseek"), routing), expected)


def test_cv2_is_importance_and_load_where_there_is_noise() -> None:
    config = MoEConfig(5, 2, balance="cv2")
    torch.manual_seed(0)
    noisy = noisy_topk(randn(21, 5), randn(21, 5, seed=1), 2)
    assert noisy.clean_logits_TE is not None and noisy.noise_std_TE is not None
    importance = reference.importance_cv2(noisy.scores_TE, mask_T=MASK)
    load = reference.load_cv2(noisy.clean_logits_TE, noisy.logits_TE, noisy.noise_std_TE, 2, mask_T=MASK)
    assert torch.equal(balance(config, noisy), importance + load)
    assert torch.equal(balance(config, replace(noisy, noise_std_TE=None)), importance)


def test_only_losses_with_a_coefficient_are_there_and_each_is_multiplied_by_its_own() -> None:
    routing = routed()
    for aux, z in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)):
        config = MoEConfig(5, 2, aux_loss=aux, z_loss=z)
        found = layer_losses(routing, config, mask_T=None, sequences=1)
        assert set(found) == {name for name, value in (("balance", aux), ("z", z)) if value}
        total = weighted_sum(found, config)
        if not found:
            assert total is None
        else:
            assert total is not None
            torch.testing.assert_close(total, sum({"balance": aux, "z": z}[n] * v for n, v in found.items()))


RANK = """
import json, sys, torch.distributed as dist
from moeify.config import MoEConfig
from tests.moeify.routing.test_balance import balance, routed
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
found = {}
for choices in ("topk", "first_choice"):
    for level in ("batch", "sequence", "global"):
        config = MoEConfig(5, 2, balance=choices, balance_level=level)
        found[f"{choices} {level}"] = float(balance(config, routed(rank)))
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_only_the_global_level_looks_at_other_ranks(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True, cwd=root)
        for r in range(2)
    ]
    found = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    for choices, top_k in (("topk", 2), ("first_choice", 1)):
        counts = sum(reference.expert_counts(routed(r).expert_ids_TK[:, :top_k], 5, mask_T=MASK) for r in range(2))
        for rank in range(2):
            for level in ("batch", "sequence"):
                config = MoEConfig.from_dict({"experts": 5, "top_k": 2, "balance": choices, "balance_level": level})
                assert found[rank][f"{choices} {level}"] == float(balance(config, routed(rank)))
            alone = found[rank][f"{choices} batch"]
            together = reference.load_balancing_loss(
                routed(rank).scores_TE, routed(rank).expert_ids_TK[:, :top_k], divide_by_top_k=False, mask_T=MASK,
                counts_E=torch.as_tensor(counts),
            )  # fmt: skip
            assert found[rank][f"{choices} global"] == pytest.approx(float(together), rel=1e-6) != alone


def test_a_selection_bias_does_not_count() -> None:
    logits, bias = randn(21, 5), 5 * torch.eye(5)[0]
    routing = sigmoid_grouped(logits, 2, bias_E=bias)
    assert (routing.expert_ids_TK == 0).any(-1).all()
    plain = sigmoid_grouped(logits, 2)
    expected = reference.load_balancing_loss(plain.scores_TE, plain.expert_ids_TK, divide_by_top_k=False, mask_T=MASK)
    torch.testing.assert_close(balance(MoEConfig(5, 2, router="sigmoid"), routing), expected)


def test_the_z_loss_is_on_the_logits_without_noise() -> None:
    torch.manual_seed(0)
    routing = noisy_topk(randn(21, 5), randn(21, 5, seed=1), 2)
    config = MoEConfig(5, 2, router="noisy_topk", aux_loss=0.0, z_loss=0.1)
    found = layer_losses(routing, config, mask_T=MASK, sequences=3)["z"]
    torch.testing.assert_close(found, reference.z_loss(randn(21, 5), mask_T=MASK))
