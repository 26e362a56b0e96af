"""Models in which a replacement would lose something are refused with names, and stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import nn

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)
X = (torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12),)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, 31), act or nn.GELU(), nn.Linear(31, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self.act(self.up(x)))
        return y


class Block(nn.Module):
    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(12), mlp or Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.mlp(self.norm(x))
        return y


def blocks(count: int = 2) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def hooked(register: str) -> Any:
    model = blocks()
    getattr(model[1].mlp.down, register)(lambda *_: None)
    return model


def with_parameter_hook() -> Any:
    model = blocks()
    model[1].mlp.up.weight.register_hook(lambda gradient: gradient)
    return model


def with_gradient_hook() -> Any:
    """The optimizer step in backward, which frees each gradient at once."""
    model = blocks()
    model[1].mlp.down.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def with_one_memory() -> Any:
    model = blocks()
    model[0].mlp.up.weight.data = model[1].mlp.up.weight.data
    return model


class OneSlope(nn.Module):
    """FFNs that are handed one learned slope, which belongs to none of them."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0.1, 0.4, 31))
        self.ffns = nn.ModuleList(Sloped() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for ffn in self.ffns:
            x = x + ffn(x, self.slope)
        return x


class Sloped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12)

    def forward(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        z = self.up(x)
        y: torch.Tensor = self.down(torch.where(z > 0, z, slope * z))
        return y


class Borrowing(nn.Module):
    """Its activation reads a parameter that is not its module's."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = nn.ParameterList([torch.linspace(0.1, 0.4, 31)])
        self.held = [self.lent[0]]
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.up(x)
        y: torch.Tensor = self.down(torch.where(z > 0, z, self.held[0] * z))
        return y


def with_one_learned_activation() -> Any:
    activation = nn.PReLU()
    return nn.Sequential(Block(Mlp(activation)), Block(Mlp(activation)))


class Stored(nn.Linear):
    """Its weight is cast before it is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def with_dtype(dtype: torch.dtype) -> Any:
    model = blocks()
    model[1].mlp.up = up = Stored(12, 31)
    up.weight = nn.Parameter(up.weight.detach().to(dtype), requires_grad=False)
    return model


def offloaded() -> Any:
    model = blocks()
    model[1]._hf_hook = object()
    return model


def quantized() -> Any:
    model: Any = tiny.build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(blocks(), backend="eager"), r"is wrapped \(OptimizedModule\)"),
    "compiled inside": (
        lambda: nn.Sequential(cast(nn.Module, torch.compile(Block(), backend="eager"))),
        r"^0 is wrapped",
    ),
    "data parallel": (lambda: nn.DataParallel(blocks()), r"is wrapped \(DataParallel\)"),
    "converted": (lambda: moeify.convert(blocks(), CONFIG, "0", example_inputs=X), r"^0\.mlp is converted already"),
    "quantized": (quantized, r"quantized \(bitsandbytes\)"),
    "offloaded": (offloaded, "^1 is moved between devices"),
    "int8": (lambda: with_dtype(torch.int8), r"^1\.mlp\.up\.weight holds torch\.int8"),
    "float8": (lambda: with_dtype(torch.float8_e4m3fn), r"holds torch\.float8"),
    "two dtypes": (lambda: with_dtype(torch.float16), r"^1\.mlp\.up\.weight is torch\.float16 .* and 1\.mlp\.up\.bias"),
    "one memory": (with_one_memory, r"^0\.mlp\.up\.weight is tied to 1\.mlp\.up\.weight"),
    "one activation": (with_one_learned_activation, r"act\.weight is tied to"),
    "one slope": (OneSlope, r"^slope is tied to what ffns\.0 computes"),
    "borrowed slope": (lambda: Block(Borrowing()), r"^mlp: its activation reads a tensor that no module holds"),
    "backward hook": (lambda: hooked("register_full_backward_pre_hook"), r"^1\.mlp has hooks"),
    "state dict hook": (lambda: hooked("register_state_dict_post_hook"), r"^1\.mlp has hooks"),
    "loading hook": (lambda: hooked("register_load_state_dict_pre_hook"), r"^1\.mlp has hooks"),
    "forward hook": (lambda: hooked("register_forward_hook"), r"^1\.mlp has hooks"),
    "parameter hook": (with_parameter_hook, r"^1\.mlp\.up\.weight has hooks"),
    "gradient hook": (with_gradient_hook, r"^1\.mlp\.down\.weight has hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_left_alone(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    said, state = repr(model), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RefusedError, match=message):
        moeify.convert(model, CONFIG, example_inputs=None if name == "quantized" else X)
    assert repr(model) == said
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key].view(torch.uint8), state[key].view(torch.uint8)) for key in state)


def test_weights_that_are_somewhere_else_are_not_made_up() -> None:
    model = blocks()
    model[1].mlp.to("meta")
    with pytest.raises(RefusedError, match=r"^1\.mlp\.up\.weight has no values"):
        moeify.convert(model, CONFIG, example_inputs=X)
    assert not any(isinstance(module, SparseMoE) for module in model.modules())


def test_a_model_without_any_weights_converts() -> None:
    model = moeify.convert(blocks().to("meta"), CONFIG, example_inputs=X)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("share", ["mlp", "block"])
@torch.no_grad()
def test_layers_that_hold_one_ffn_hold_one_moe(share: str) -> None:
    model = blocks(3)
    if share == "mlp":
        model[1].mlp = model[0].mlp
    else:
        model[1] = model[0]
    before = model(*X)
    moeify.convert(model, CONFIG, example_inputs=X)
    assert model[0].mlp is model[1].mlp
    assert sum(isinstance(module, SparseMoE) for module in model.modules()) == 2
    assert tiny.relative(model(*X), before) < TOLERANCE["float32"]


def test_shared_experts_are_converted_where_they_are_named() -> None:
    import transformers

    tf: Any = transformers

    def model() -> Any:
        return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(
            hidden_size=32, intermediate_size=52, moe_intermediate_size=20, shared_expert_intermediate_size=44,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, num_experts=4,
            mlp_only_layers=[0]))  # fmt: skip

    def converted(layers: str) -> list[str]:
        moe = moeify.convert(model(), CONFIG, layers)
        return [name for name, module in moe.named_modules() if isinstance(module, SparseMoE)]

    assert converted("all") == converted("0") == ["model.layers.0.mlp"]
    assert converted("shared_expert") == ["model.layers.1.mlp.shared_expert"]


def test_where_all_are_shared_experts_the_way_is_named() -> None:
    import transformers

    tf: Any = transformers
    model = tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(
        hidden_size=32, intermediate_size=52, moe_intermediate_size=20, shared_expert_intermediate_size=44,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, num_experts=4))  # fmt: skip
    with pytest.raises(RefusedError, match=r"1 shared experts? of an MoE .*regular expression"):
        moeify.convert(model, CONFIG)
