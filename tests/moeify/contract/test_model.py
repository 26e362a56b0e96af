"""Converted models of any architecture keep transformers' contract for MoEs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moeify
from moeify.config import MoEConfig
from moeify.contract.model import remember
from moeify.layers import MoELayer
from moeify.measure import TOLERANCE, relative_difference
from moeify.plan import Plan, stored_plan
from tests.moeify import tiny
from tests.moeify.contract import architectures

CONFIG = MoEConfig(experts=5, top_k=2, method="noise", z_loss=0.001)
FIELDS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 57,
          "output_router_logits": False, "router_aux_loss_coef": 0.01}  # fmt: skip


def moe_layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, MoELayer)]


def first(model: Any, name: str, **options: Any) -> torch.Tensor:
    """The logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        output = model(**architectures.inputs(name), **options)
    value: torch.Tensor = output["logits"] if "logits" in output else output[0]
    return value


@pytest.mark.parametrize("name", architectures.NAMES)
def test_experts_follow_the_choice_of_implementation_and_it_is_saved(name: str, tmp_path: Path) -> None:
    model: Any = moeify.convert(architectures.build(name), CONFIG)
    expected = first(model, name)
    layers = moe_layers(model)
    model.save_pretrained(tmp_path)
    moeify.register()
    for chosen in ("eager", "batched_mm", "moeify"):
        model.set_experts_implementation(chosen)
        assert {layer.experts.config._experts_implementation for layer in layers} == {chosen}
        assert relative_difference(first(model, name), expected) <= TOLERANCE["float32"]
    assert torch.equal(first(model, name), expected)
    loaded = type(model).from_pretrained(tmp_path)
    assert relative_difference(first(loaded, name), expected) <= TOLERANCE["float32"]
    asked = type(model).from_pretrained(tmp_path, experts_implementation="batched_mm")
    held = [layer.experts.config for layer in moe_layers(asked)]
    assert {config._experts_implementation for config in held} == {"batched_mm"}
    assert relative_difference(first(asked, name), expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", architectures.NAMES)
def test_the_config_says_what_an_moe_says(name: str, tmp_path: Path) -> None:
    model: Any = moeify.convert(architectures.build(name), CONFIG)
    model.save_pretrained(tmp_path)
    moeify.register()
    for each in (model, type(model).from_pretrained(tmp_path)):
        text = each.config.get_text_config()
        assert {field: getattr(text, field) for field in FIELDS} == FIELDS
        assert {field: getattr(each.config, field) for field in FIELDS} == FIELDS


def test_the_sizes_of_layers_that_a_model_has_already_stay(tmp_path: Path) -> None:
    tf: Any = transformers
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
    own = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
    model = tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**sizes, **own)).eval()
    src = tiny.save(model, tmp_path / "src")
    tokens, copies = torch.arange(7)[None], MoEConfig(experts=5, top_k=2)
    with torch.no_grad():
        expected = model(tokens).logits
        tiny.convert_files(src, tmp_path / "streamed", copies)
        converted: Any = moeify.convert(model, copies)
        converted.save_pretrained(tmp_path / "saved")
        for folder in ("saved", "streamed"):
            loaded: Any = moeify.load(tmp_path / folder)
            assert {name: getattr(loaded.config, name) for name in own} == own
            assert relative_difference(loaded(tokens).logits, expected) < TOLERANCE["float32"]


def test_another_model_of_the_class_stays_as_it_is() -> None:
    dense = architectures.build("llama")
    moeify.convert(architectures.build("llama"), CONFIG)
    assert not dense._can_set_experts_implementation()


def test_a_copy_follows_its_own_config() -> None:
    model: Any = moeify.convert(architectures.build("llama"), CONFIG)
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    configs = [m.model.layers[0].mlp.experts.config for m in (model, twin)]
    assert [config._experts_implementation for config in configs] == ["moeify", "eager"]


def test_a_model_of_another_library_needs_no_config() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.ReLU(), torch.nn.Linear(24, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = x + self.ffn(x)
            return y

    model = moeify.convert(Block(), CONFIG, example_inputs=torch.randn(2, 6))
    assert [layer.experts.config for layer in moe_layers(model)] == [None]


def unfuse(experts: Any) -> None:
    """What auto-round does to the experts of a forward with `__wrapped__`: numbered children of linears, no stacks."""
    assert hasattr(type(experts).forward, "__wrapped__")
    for number in range(experts.num_experts):
        expert = torch.nn.Module()
        for name in ("up_proj", "down_proj"):
            rows, columns = getattr(experts, name)[number].shape
            linear = torch.nn.Linear(columns, rows)
            linear.weight.data = getattr(experts, name)[number].detach()
            linear.bias.data = getattr(experts, f"{name}_bias")[number].detach()
            expert.add_module(name, linear)
        experts.add_module(str(number), expert)
    for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"):
        delattr(experts, name)


def by_numbered_linears(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for number in range(experts.num_experts):
        token, choice = (ids == number).nonzero(as_tuple=True)
        expert = experts.get_submodule(str(number))
        y = expert.down_proj(experts.act_fn(expert.up_proj(x[token])))
        out = out.index_add(0, token, y * weights[token, choice, None])
    return out


def test_a_tool_that_takes_experts_apart_and_registers_how_to_compute_them_gets_its_way() -> None:
    model: Any = moeify.convert(architectures.build("gpt2"), CONFIG)
    expected = first(model, "gpt2")
    registry: Any = ALL_EXPERTS_FUNCTIONS
    registry["by_numbered_linears"] = by_numbered_linears
    try:
        for layer in moe_layers(model):
            unfuse(layer.experts)
        model.config._experts_implementation = "by_numbered_linears"
        assert relative_difference(first(model, "gpt2"), expected) <= TOLERANCE["float32"]
    finally:
        del registry["by_numbered_linears"]


def test_a_size_stays_that_the_class_has_under_its_other_name() -> None:
    """Qwen3-VL-MoE: the class has `num_experts`, and its map lets that be `num_local_experts`."""
    config: Any = transformers.AutoConfig.for_model("qwen3_vl_moe").get_text_config()
    before = config.num_experts, config.num_local_experts
    converted: Any = moeify.convert(tiny.build("llama"), MoEConfig(experts=5, top_k=2))
    remember(config, Plan.from_dict(stored_plan(vars(converted.config))))
    assert (config.num_experts, config.num_local_experts) == before == (60, 60)
