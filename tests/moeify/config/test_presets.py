from __future__ import annotations

import pytest

from moeify.config import MoEConfig
from moeify.config.presets import PRESETS
from moeify.errors import ConfigError
from moeify.routers.expert_choice import ExpertChoice
from moeify.routers.gshard import Gshard
from moeify.routers.noisy_topk import NoisyTopk
from moeify.routers.sigmoid import Sigmoid
from moeify.routers.softmax import Softmax


def preset(name: str, **fields: object) -> MoEConfig:
    made: MoEConfig = getattr(MoEConfig, name)(**fields)
    return made


def test_the_list_names_every_preset() -> None:
    assert PRESETS == (
        "switch", "gshard", "st_moe", "noisy_topk", "mixtral", "deepseek_v3", "expert_choice", "dropless",
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_round_and_can_be_changed(name: str) -> None:
    config = preset(name, experts=32)
    assert config.experts == 32
    assert MoEConfig.from_dict(config.to_dict()) == config
    changed = MoEConfig.from_dict({**config.to_dict(), "seed": 7, "z_loss": 0.5})
    assert preset(name, experts=32, seed=7, z_loss=0.5) == changed


def test_presets_have_the_values_of_their_papers() -> None:
    switch = MoEConfig.switch(16)
    assert (switch.top_k, switch.jitter, switch.aux_loss, switch.capacity_factor) == (1, 1e-2, 1e-2, 1.25)
    assert not switch.renormalize  # else the router would get no gradient
    st_moe = MoEConfig.st_moe(16)
    assert (st_moe.top_k, st_moe.z_loss, st_moe.aux_loss) == (2, 1e-3, 1e-2)
    assert st_moe.router == Gshard(threshold=0.2)
    assert st_moe.capacity_factor == 1.25 / st_moe.top_k  # the paper's factor leaves out top_k
    v3 = MoEConfig.deepseek_v3()
    assert (v3.experts, v3.top_k, v3.aux_loss, v3.balance) == (256, 8, 1e-4, "deepseek")
    assert v3.router == Sigmoid(n_group=8, topk_group=4, routed_scaling_factor=2.5, bias_rate=1e-3)
    assert (MoEConfig.gshard(16).router, MoEConfig.gshard(16).top_k) == (Gshard(), 2)
    assert (MoEConfig.noisy_topk(16).router, MoEConfig.noisy_topk(16).balance) == (NoisyTopk(), "cv2")
    assert (MoEConfig.mixtral().router, MoEConfig.mixtral().aux_loss) == (Softmax(), 1e-3)
    assert (MoEConfig.expert_choice(16).router, MoEConfig.expert_choice(16).aux_loss) == (ExpertChoice(), 0)
    dropless = MoEConfig.dropless(16)
    assert dropless.divide_loss_by_layers and MoEConfig.mixtral().divide_loss_by_layers
    assert not (switch.divide_loss_by_layers or st_moe.divide_loss_by_layers)
    assert (dropless.divide_loss_by_top_k, dropless.capacity_factor, dropless.aux_loss) == (True, None, 0.1)


def test_options_of_the_router_change_one_by_one_or_all_together() -> None:
    few = MoEConfig.deepseek_v3(6, 2, router={"n_group": 1, "topk_group": 1})
    assert few.router == Sigmoid(routed_scaling_factor=2.5, bias_rate=1e-3)
    assert MoEConfig.deepseek_v3(6, 2, router={"name": "sigmoid", "bias_rate": 0.5}).router == Sigmoid(bias_rate=0.5)
    assert MoEConfig.deepseek_v3(6, 2, router="softmax").router == Softmax()
    assert MoEConfig.mixtral(router={"name": "gshard"}).router == Gshard()
    with pytest.raises(ConfigError, match=r"router\.bias is no option of the router 'sigmoid'"):
        MoEConfig.deepseek_v3(router={"bias": 1.0})


def test_what_is_exact() -> None:
    assert MoEConfig.mixtral().exact
    assert MoEConfig.noisy_topk(8).exact
    assert not MoEConfig.switch(8).exact
    assert not MoEConfig.gshard(8).exact  # choices are dropped in evaluation too
    assert MoEConfig.gshard(8, eval_capacity_factor=None).exact
