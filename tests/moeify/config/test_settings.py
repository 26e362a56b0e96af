from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.methods.drop import Drop
from moeify.routers.sigmoid import Sigmoid
from moeify.routers.softmax import Softmax


def test_two_numbers_are_enough_and_mean_dropless_renormalized_softmax() -> None:
    config = MoEConfig(8, 2)
    assert config.exact
    assert config.to_dict() == {
        "experts": 8, "top_k": 2, "method": {"name": "copy"}, "granularity": 1, "shared_experts": 0,
        "router": {"name": "softmax"}, "renormalize": True, "aux_loss": 0.01, "balance": "topk",
        "balance_level": "batch", "divide_loss_by_top_k": False, "divide_loss_by_layers": False, "z_loss": 0.0,
        "attach_losses": True, "capacity_factor": None, "eval_capacity_factor": None, "min_capacity": 4,
        "drop_order": "position", "jitter": 0.0, "expert_dropout": None, "seed": 0,
    }  # fmt: skip


def test_a_router_is_an_object_a_word_or_plain_data() -> None:
    expected = MoEConfig(8, 2, router=Sigmoid(bias_rate=1e-3))
    assert MoEConfig(8, 2, router=moeify.routers.Sigmoid(bias_rate=1e-3)) == expected
    assert MoEConfig(8, 2, router={"name": "sigmoid", "bias_rate": 1e-3}) == expected
    assert MoEConfig(8, 2, router="sigmoid").router == Sigmoid()
    assert MoEConfig(8, 2, method={"name": "drop", "share": 0.25}).method == Drop(share=0.25)
    assert replace(expected, router="softmax") == MoEConfig(8, 2)


def test_settings_are_equal_hash_copy_and_pickle_by_value_and_cannot_be_changed() -> None:
    config = MoEConfig(8, 2, router="sigmoid", method="drop")
    other = MoEConfig(8, 2, router=Sigmoid(), method=Drop())
    assert config == other and hash(config) == hash(other)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.router = Softmax()  # type: ignore[misc]


def test_settings_go_to_json_and_back() -> None:
    config = MoEConfig(8, 2, router=Sigmoid(bias_rate=1e-3), method="drop", eval_capacity_factor=1.5)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["router"] == {"name": "sigmoid", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
                              "bias_rate": 0.001}  # fmt: skip
    assert data["method"] == {"name": "drop", "share": 0.5}
    assert MoEConfig.from_dict(data) == config
    for damaged in ({**data, "zloss": 1.0}, {"experts": 8}):
        with pytest.raises(ConfigError, match="these are not the settings of a conversion"):
            MoEConfig.from_dict(damaged)


def test_a_conversion_is_exact_if_its_method_and_its_router_are() -> None:
    assert MoEConfig(8, 2, method="copy").exact
    assert not MoEConfig(8, 2, method="noise").exact
    assert not MoEConfig(8, 2, router="sinkhorn").exact


def test_importing_and_refusing_numbers_and_words_loads_no_torch() -> None:
    program = """
import sys
from moeify.config import MoEConfig
from moeify.errors import ConfigError
import moeify
for wrong in ({"experts": 0}, {"router": "oracle"}, {"method": "magic"}, {"granularity": 3}):
    try:
        MoEConfig(**{"experts": 8, "top_k": 2, **wrong})
    except ConfigError:
        continue
    raise SystemExit("not refused")
assert moeify.routers and moeify.methods
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 0}, "experts is 0: expected a whole number of at least 1"),
        ({"experts": True}, "experts is True: expected a whole number"),
        ({"top_k": 0}, "top_k is 0: expected a whole number of at least 1"),
        ({"top_k": 2.0}, "top_k is 2.0: expected a whole number"),
        ({"top_k": 9}, "top_k is 9 but there are only 8"),
        ({"method": "magic"}, "method is 'magic': expected one of copy, drop, noise"),
        ({"method": Softmax()}, "method is Softmax(): expected one of copy, drop, noise"),
        ({"router": "oracle"}, "router is 'oracle': expected one of expert_choice, gshard"),
        ({"router": "base"}, "router is 'base': expected one of"),
        ({"router": {"bias_rate": 1e-3}}, "router.bias_rate is no option of the router 'softmax': it has no options"),
        (
            {"router": {"name": "soft", "slot": 2}},
            "router.slot is no option of the router 'soft': its options are",
        ),
        ({"method": {"name": "drop", "share": 2}}, "method.share is 2: expected a number from 0 to 1"),
        ({"balance": "x"}, "balance is 'x': expected one of topk, first_choice, deepseek, cv2"),
        ({"balance_level": "x"}, "balance_level is 'x': expected one of batch, sequence, global"),
        ({"drop_order": "x"}, "drop_order is 'x': expected one of position, probability, random, batch_prioritized"),
        ({"renormalize": 1}, "renormalize is 1: expected True or False"),
        ({"aux_loss": -0.1}, "aux_loss is -0.1: expected a number that is not negative"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0: expected a positive number or None"),
        ({"eval_capacity_factor": float("inf")}, "eval_capacity_factor is inf"),
        ({"jitter": 1.0}, "jitter is 1.0: expected a number from 0 to below 1"),
        ({"expert_dropout": 1.5}, "expert_dropout is 1.5: expected a number from 0 to below 1 or None"),
        ({"shared_experts": -1}, "shared_experts is -1: expected a whole number of at least 0"),
        ({"experts": 10**9}, "experts is 1000000000: expected a whole number of at least 1, at most 8192"),
        ({"experts": 10**30}, "at most 8192"),
        (
            {"shared_experts": 10**9},
            "shared_experts is 1000000000: expected a whole number of at least 0",
        ),
        ({"granularity": 10**9}, "granularity is 1000000000: expected a whole number of at least 1, at most 8192"),
        ({"granularity": 0}, "granularity is 0: expected a whole number of at least 1"),
        ({"granularity": 3}, "granularity is 3: 8 experts do not make up whole FFNs"),
        ({"granularity": 4}, "top_k is 2: with granularity 4 choose a multiple of it"),
        ({"seed": None}, "seed is None: expected a whole number"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MoEConfig(**{"experts": 8, "top_k": 2, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("router", "renormalize", "aux_loss"),
    [
        ("softmax", True, 0.01), ("noisy_topk", True, 0.01), ("sigmoid", True, 0.01), ("gshard", True, 0.01),
        ("sinkhorn", False, 0.0), ("expert_choice", False, 0.0), ("soft", True, 0.0),
    ],
)  # fmt: skip
def test_what_is_not_given_is_what_the_router_needs(router: str, renormalize: bool, aux_loss: float) -> None:
    config = MoEConfig(8, 2, router=router, capacity_factor=1.0)
    assert (config.renormalize, config.aux_loss) == (renormalize, aux_loss)
    given = MoEConfig(8, 2, router=router, capacity_factor=1.0, renormalize=not renormalize, aux_loss=0.5)
    assert (given.renormalize, given.aux_loss) == (not renormalize, 0.5)
    assert MoEConfig.from_dict(given.to_dict()) == given
