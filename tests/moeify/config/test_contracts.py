from __future__ import annotations

import pytest
import torch

from moeify.config import MoEConfig
from moeify.config.contracts import MethodChoice, RouterChoice


def test_what_a_router_says_of_itself_unless_it_says_otherwise() -> None:
    router, config = RouterChoice(), MoEConfig(8, 2)
    facts = (router.joint, router.needs_token_ids, router.keeps_capacity, router.mixes_tokens, router.updates_bias)
    assert facts == (False,) * 5
    router.check(config)
    assert router.exact(config)
    assert not router.exact(MoEConfig(8, 2, renormalize=False))
    assert not router.exact(MoEConfig(8, 2, eval_capacity_factor=2.0))
    assert not MethodChoice().exact


def test_what_a_router_and_a_method_must_say_themselves() -> None:
    with pytest.raises(NotImplementedError):
        RouterChoice().start(MoEConfig(8, 2), 4, "mlp")
    with pytest.raises(NotImplementedError):
        MethodChoice().changed(torch.ones(1, 1), 0, 0, "experts.0", "up0")


def test_a_module_is_built_on_the_device_asked_for_and_at_least_in_float32() -> None:
    config = MoEConfig(8, 2)
    router = config.router.module(5, config, device=torch.device("meta"), dtype=torch.bfloat16)
    weight = router.get_parameter("weight")
    assert (weight.shape, weight.dtype, weight.is_meta) == ((8, 5), torch.float32, True)
    assert not config.router.module(5, config).get_parameter("weight").any()
