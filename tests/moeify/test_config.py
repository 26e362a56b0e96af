from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moeify.config import MoEConfig
from moeify.errors import ConfigError

PRESETS: dict[str, Callable[..., MoEConfig]] = {
    "switch": MoEConfig.switch,
    "gshard": MoEConfig.gshard,
    "st_moe": MoEConfig.st_moe,
    "noisy_topk": MoEConfig.noisy_topk,
    "mixtral": MoEConfig.mixtral,
    "deepseek_v3": MoEConfig.deepseek_v3,
    "expert_choice": MoEConfig.expert_choice,
    "dropless": MoEConfig.dropless,
}


def test_two_numbers_are_enough_and_mean_dropless_renormalised_softmax() -> None:
    config = MoEConfig(8, 2)
    assert config.exact
    assert (config.router, config.renormalize, config.capacity_factor, config.jitter) == ("softmax", True, None, 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_go_round_and_can_be_changed(preset: str) -> None:
    config = PRESETS[preset](experts=32)
    assert config.experts == 32
    assert MoEConfig(**config.to_dict()) == config
    assert PRESETS[preset](32, seed=7, z_loss=0.5) == MoEConfig(**{**config.to_dict(), "seed": 7, "z_loss": 0.5})


def test_presets_have_the_values_of_their_papers() -> None:
    switch = MoEConfig.switch(16)
    assert (switch.top_k, switch.jitter, switch.aux_loss, switch.capacity_factor) == (1, 1e-2, 1e-2, 1.25)
    assert not switch.renormalize  # else the router would get no gradient
    st_moe = MoEConfig.st_moe(16)
    assert (st_moe.top_k, st_moe.z_loss, st_moe.aux_loss) == (2, 1e-3, 1e-2)
    assert st_moe.capacity_factor == 1.25 / st_moe.top_k  # the paper's factor leaves out top_k
    v3 = MoEConfig.deepseek_v3()
    assert (v3.experts, v3.top_k, v3.groups, v3.groups_kept, v3.routed_scale) == (256, 8, 8, 4, 2.5)
    assert (v3.bias_rate, v3.aux_loss) == (1e-3, 1e-4)


def test_what_is_exact() -> None:
    assert MoEConfig.mixtral().exact
    assert MoEConfig.noisy_topk(8).exact
    assert MoEConfig.deepseek_v3(routed_scale=1.0).exact
    assert not MoEConfig.deepseek_v3().exact
    assert not MoEConfig.switch(8).exact
    assert not MoEConfig.expert_choice(8).exact
    assert MoEConfig(8, 2, capacity_factor=1.0).exact  # in evaluation nothing is dropped
    assert not MoEConfig(8, 2, eval_capacity_factor=1.0).exact


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k is 9 but there are only 8"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"router": "oracle"}, "router is 'oracle'"),
        ({"balance": "x"}, "balance is 'x'"),
        ({"balance_level": "x"}, "balance_level is 'x'"),
        ({"drop_order": "x"}, "drop_order is 'x'"),
        ({"aux_loss": -0.1}, "aux_loss is -0.1"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor is inf"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"expert_dropout": 1.5}, "expert_dropout is 1.5"),
        ({"router": "gshard", "top_k": 3}, "'gshard' takes 2"),
        ({"router": "expert_choice"}, "capacity_factor is None"),
        ({"router": "hash", "top_k": 1}, "vocabulary is None"),
        ({"router": "sigmoid", "groups": 3}, "groups is 3"),
        ({"router": "sigmoid", "groups": 8, "groups_kept": 1}, "top_k is 2: more than"),
        ({"router": "soft", "slots": 0}, "slots is 0"),
        ({"bias_rate": 1e-3}, "bias_rate is for the router 'sigmoid'"),
        ({"slots": 2}, "slots is for the router 'soft'"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        MoEConfig(**{"experts": 8, "top_k": 2, **changes})
    assert "\n" not in str(caught.value)
