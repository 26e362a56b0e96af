"""Experts as linears and back: the same outputs, training, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import moeify
from moeify.config import MoEConfig
from moeify.contract.linearize import linearize, stack
from moeify.errors import RefusedError
from moeify.layers.linear_experts import LinearExperts
from moeify.measure import TOLERANCE
from tests.moeify import tiny
from tests.moeify.contract import architectures

tf: Any = transformers
_SIZES = {"vocab_size": tiny.VOCABULARY, "hidden_size": 36, "intermediate_size": 57, "moe_intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
          "num_experts_per_tok": 2}  # fmt: skip
_NEMOTRON = {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "head_dim": 12,
             "moe_shared_expert_intermediate_size": 24, "layers_block_type": ["moe", "attention"]}  # fmt: skip
STOCK: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=5)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_SIZES, num_experts=5, head_dim=12)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_SIZES, num_local_experts=5, head_dim=12)),
    "granitemoe": lambda: tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**_SIZES, num_local_experts=5)),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(tf.NemotronHConfig(**_SIZES, **_NEMOTRON)),
}
CONVERTED = ("llama", "gpt2", "phi3", "t5_gated", "bert")
NAMES = (*STOCK, *CONVERTED)


def build(name: str) -> Any:
    if name in STOCK:
        torch.manual_seed(0)
        model: Any = STOCK[name]().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    else:
        model = moeify.convert(tiny.build(name), MoEConfig(5, 2, method="noise", shared_experts=1))
    model.set_experts_implementation("eager")
    return model


def logits(model: nn.Module, name: str) -> Tensor:
    return tiny.logits(model, name if name in CONVERTED else "llama")


def linears(model: nn.Module) -> list[LinearExperts]:
    return [module for module in model.modules() if isinstance(module, LinearExperts)]


def bit_equal_in(dtype: torch.dtype, name: str) -> bool:
    """Whether the linears must give the same bits.

    Gate and up are two products instead of one: how float32 is rounded then is up to the BLAS. The weights of gpt-oss
    lie otherwise in linears, and Nemotron adds up in the dtype of the routing weights.
    """
    return name in ({"gpt2", "bert", "nemotron_h"} if dtype == torch.float32 else {*NAMES} - {"gpt_oss", "nemotron_h"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_of_the_loop_and_the_way_back_gives_the_same_weights(
    name: str, dtype: torch.dtype
) -> None:
    model = build(name).to(dtype)
    expected, weights = logits(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    assert linearize(model) is model and linears(model)
    result = logits(model, name)
    if bit_equal_in(dtype, name):
        assert torch.equal(result, expected)
    assert tiny.relative(result, expected) < TOLERANCE[str(dtype).removeprefix("torch.")]
    stack(model)
    assert not linears(model) and torch.equal(logits(model, name), expected)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_every_projection_of_every_expert_is_a_linear(name: str) -> None:
    model = linearize(build(name))
    assert not any(parameter.dim() == 3 and "experts" in key for key, parameter in model.named_parameters())
    for experts in linears(model):
        for number in range(experts.num_experts):
            projections = list(experts.get_submodule(str(number)).children())
            assert {type(each) for each in projections} == {nn.Linear} and len(projections) in {2, 3}
            assert all(parameter.is_contiguous() for each in projections for parameter in each.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_the_stacked_form_does(name: str) -> None:
    model = build(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = linearize(copy.deepcopy(model))
    each: Any
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            torch.manual_seed(3)
            optimizer.zero_grad()
            each(**tiny.inputs(name if name in CONVERTED else "llama")).logits.square().mean().backward()
            optimizer.step()
    expected, result = model.state_dict(), stack(twin).state_dict()
    assert expected.keys() == result.keys()
    assert all(tiny.relative(result[key], value) < 1e-4 for key, value in expected.items() if value.abs().max() > 0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_as_linears_loads(name: str, tmp_path: Path) -> None:
    moeify.register()
    model = build(name)
    expected = logits(model, name)
    linearize(model).save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, experts_implementation="eager", output_loading_info=True)
    assert not any(info.values())
    assert bool(linears(loaded)) == (name in CONVERTED)  # a stock class has one form
    assert tiny.relative(logits(loaded, name), expected) < TOLERANCE["float32"]
    if name in CONVERTED:
        stack(loaded)
        assert torch.equal(logits(loaded, name), expected)
    loaded.save_pretrained(tmp_path / "stacked")
    again = type(model).from_pretrained(tmp_path / "stacked", experts_implementation="eager")
    assert not linears(again) and torch.equal(logits(again, name), expected)


def test_a_linear_that_was_stacked_again_is_saved_as_ever(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.save_pretrained(tmp_path / "one")
    stack(linearize(model)).save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_linears_hold_views_so_that_nothing_is_there_twice(name: str) -> None:
    model = build(name)
    before = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    linearize(model)
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == before


def test_frozen_weights_stay_frozen_one_by_one() -> None:
    model = build("gpt_oss")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("gate_up_proj", "down_proj_bias")))
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    linearize(model)
    trained = {".".join(n.split(".")[-2:]) for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"gate_proj.weight", "up_proj.weight", "down_proj.bias"}
    stack(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == expected


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("name", ["granitemoe", "llama"])  # peft takes linears of Mixtral for stacked weights
def test_adapters_on_linears_train_and_are_merged_before_stacking(name: str) -> None:
    model = linearize(build(name))
    targets = r".*experts\.\d+\.\w+"
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with pytest.raises(RefusedError, match=r"experts.0.\w+ is a Linear and no nn.Linear any more.*merge"):
        stack(model)
    ids = tiny.inputs("llama")["input_ids"]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    adapted.eval()
    expected = logits(adapted, name)
    merged = stack(adapted.merge_and_unload())
    assert not linears(merged) and tiny.relative(logits(merged, name), expected) < 1e-4


def test_a_tool_may_put_its_own_module_in_the_place_of_the_experts() -> None:
    model = linearize(build("llama"))
    layer = model.model.layers[0].mlp

    class Own(nn.Module):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            assert ids.shape == weights.shape == (len(x), 2)
            return torch.zeros_like(x)

    layer.experts = Own()
    assert logits(model, "llama").isfinite().all()
    moeify.routing_stats(model)
    assert len(moeify.param_groups(model)) == 3


def test_hooks_on_the_linears_see_the_tokens_of_their_expert() -> None:
    model, seen = linearize(build("mixtral")), []
    for experts in linears(model):
        for number in range(experts.num_experts):
            experts.get_submodule(f"{number}.w2").register_forward_hook(lambda _, x, y: seen.append(len(x[0])))
    logits(model, "mixtral")
    assert sum(seen) == 2 * 2 * tiny.inputs("llama")["input_ids"].numel()  # layers, choices


def test_a_module_of_another_library_needs_no_config() -> None:
    ffn = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.ffn(x)
            return y

    x = torch.randn(3, 6)
    model = moeify.convert(Block(), MoEConfig(3, 2, method="noise"), example_inputs=x)
    expected = model(x)
    assert tiny.relative(linearize(model)(x).detach(), expected.detach()) < TOLERANCE["float32"]
    assert torch.equal(stack(model)(x), expected)


def test_copies_are_apart() -> None:
    model = linearize(build("llama"))
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert logits(model, "llama").abs().max() > 0
    assert stack(twin).model.layers[0].mlp.experts is not model.model.layers[0].mlp.experts.stacked


def test_what_cannot_be_linear_is_refused_and_stays() -> None:
    model = build("llama")
    with pytest.raises(RefusedError, match="no linear experts"):
        stack(model)
    with pytest.raises(RefusedError, match="has no stacked experts: convert it first"):
        linearize(tiny.build("llama"))
    linearize(model)
    with pytest.raises(RefusedError, match="or it is linear already"):
        linearize(model)
    with pytest.raises(RefusedError, match="a part of a converted model"):
        whole: Any = moeify.convert(architectures.build("llava"), MoEConfig(3, 2), "language_model")
        linearize(whole.model.language_model)
    quantized = build("mixtral")
    quantized.model.layers[1].mlp.experts.down_proj = nn.Parameter(
        quantized.model.layers[1].mlp.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(RefusedError, match=r"layers.1.mlp.experts.down_proj is quantized \(torch.float8_e4m3fn\)"):
        linearize(quantized)
    assert not linears(quantized)


def test_sharded_experts_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    experts = model.model.layers[2].mlp.experts
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.data, mesh))
        with pytest.raises(RefusedError, match=r"layers.2.mlp.experts.down_proj is sharded: linearize .* before"):
            linearize(model)
        assert not linears(model)
    finally:
        torch.distributed.destroy_process_group()


def test_the_form_is_in_the_config(tmp_path: Path) -> None:
    model = build("llama")
    for change, expected in ((linearize, True), (stack, False)):
        change(model).save_pretrained(tmp_path)
        assert ("linear" in json.loads((tmp_path / "config.json").read_text())["moeify"]) == expected
