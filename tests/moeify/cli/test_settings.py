"""What is typed becomes the settings that Python would make."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

from moeify.cli.settings import config_from, config_options
from moeify.config import MoEConfig
from moeify.config.choice import words
from moeify.config.presets import PRESETS
from moeify.errors import ConfigError
from moeify.methods.drop import Drop
from moeify.routers.sigmoid import Sigmoid


def typed(*arguments: object) -> MoEConfig:
    """The settings that a command line makes."""

    @click.command()
    @config_options
    def command(**options: Any) -> None:
        made.append(config_from(options))

    made: list[MoEConfig] = []
    command.main([str(each) for each in arguments], standalone_mode=False)
    return made[0]


BASE = ("--experts", 8, "--top-k", 2)


def test_options_and_fields_of_every_type() -> None:
    assert typed(*BASE) == MoEConfig(8, 2)
    fields = ("z_loss=1e-3", "attach_losses=true", "eval_capacity_factor=None", "balance=cv2", "renormalize=False",
              "capacity_factor=2", "expert_dropout=.1")  # fmt: skip
    found = typed(
        *BASE, "--granularity", 2, "--shared-experts", 1, "--seed", 5, *(x for f in fields for x in ("--set", f))
    )
    assert found == MoEConfig(8, 2, granularity=2, shared_experts=1, seed=5, z_loss=1e-3, attach_losses=True,
                              balance="cv2", renormalize=False, capacity_factor=2.0, expert_dropout=0.1)  # fmt: skip


def test_options_of_the_router_and_the_method() -> None:
    assert typed(*BASE, "--router", "sigmoid", "--set", "router.bias_rate=1e-3").router == Sigmoid(bias_rate=1e-3)
    assert typed(*BASE, "--set", "router=sigmoid", "--set", "router.n_group=2").router == Sigmoid(n_group=2)
    assert typed(*BASE, "--method", "drop", "--set", "method.share=0.3").method == Drop(share=0.3)
    found = typed("--preset", "deepseek_v3", "--experts", 6, "--top-k", 2, "--set", "router.n_group=1",
                  "--set", "router.topk_group=1")  # fmt: skip
    assert found == MoEConfig.deepseek_v3(6, 2, router={"n_group": 1, "topk_group": 1})


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    assert typed("--preset", preset, "--experts", 32) == getattr(MoEConfig, preset)(experts=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "z_loss"), "--set z_loss: expected FIELD=VALUE"),
        (("--set", "zloss=1"), "there is no field zloss; there are experts, top_k, method"),
        (("--set", "seed.x=1"), "there is no field seed.x"),
        (("--set", "z_loss=much"), "z_loss is 'much': expected a number"),
        (("--set", "attach_losses=1"), "attach_losses is 1: expected True or False"),
        (("--set", "seed=1", "--seed", 2), "seed is given twice"),
        (("--set", "router.bias_rate=1", "--set", "router.bias_rate=2"), "router.bias_rate is given twice"),
        (("--router", "topk"), "router is 'topk': expected one of expert_choice"),
        (("--set", "router.bias_rate=1"), "router.bias_rate is no option of the router 'softmax'"),
        (("--router", "sigmoid", "--set", "router.bias_rate=-1"), "router.bias_rate is -1: expected a number"),
        (("--set", "method.share=0.3"), "method.share is no option of the method 'copy': it has no options"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(*BASE, *arguments)
    assert message in str(caught.value)


def test_the_numbers_of_experts_are_needed() -> None:
    for arguments in ((), ("--experts", 3), ("--top-k", 2), ("--preset", "mixtral")):
        with pytest.raises(click.UsageError, match="--experts and --top-k are needed"):
            typed(*arguments)


def test_help_lists_what_there_is() -> None:
    @click.command()
    @config_options
    def command(**_: Any) -> None: ...

    shown = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for word in (*PRESETS, *words("moeify.routers"), *words("moeify.methods")):
        assert word in shown


def test_wrong_usage_needs_no_torch() -> None:
    program = """
import sys
from moeify.cli.settings import config_from
from moeify.errors import ConfigError
try:
    config_from({"preset": None, "settings": ["router.bias_rate=1", "z_loss=x"], "experts": 8, "top_k": 2})
except ConfigError as error:
    assert "z_loss is 'x'" in str(error)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
