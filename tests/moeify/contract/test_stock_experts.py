from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, replace_with_fp8_linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from moeify.contract.stock_experts import stock_experts, through_moeify
from moeify.kernels import ops, reference
from moeify.measure import TOLERANCE, relative_difference

tf: Any = transformers
_SIZES = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 1,
          "num_attention_heads": 3, "num_key_value_heads": 1, "num_experts_per_tok": 2}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=5)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_SIZES, num_experts=5)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_SIZES, num_local_experts=5, head_dim=12)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_moe_gives_what_it_gave(name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        with through_moeify(model):
            assert model.config._experts_implementation == "moeify"
            result = model(ids).logits
    assert relative_difference(result, expected) <= TOLERANCE["float32"]
    assert model.config._experts_implementation == "eager"


def test_a_transformers_without_norms_after_the_experts() -> None:
    model: Any = MODELS["mixtral"]().eval()
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(4, 36), torch.randint(0, 5, (4, 2)), torch.rand(4, 2)
    with torch.no_grad():
        expected = stock_experts(experts, x, ids, weights)
        vars(experts).pop("has_post_expert_norm", None)  # gone already, in such a version
        assert torch.equal(stock_experts(experts, x, ids, weights), expected)


@use_experts_implementation
class Normed(nn.Module):
    """Experts as transformers wants them, with a norm after each."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 5))
        self.post_expert_norm = nn.RMSNorm(6)
        self.act_fn = nn.SiLU()


@torch.no_grad()
def test_a_norm_after_each_expert_comes_before_the_weights() -> None:
    torch.manual_seed(0)
    experts: Any = Normed(None)
    experts.has_post_expert_norm = True  # an option of the decorator, in newer versions
    x = torch.randn(4, 6)
    ids, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]]), torch.rand(4, 2)
    expected = torch.zeros(4, 6)
    for token in range(4):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            y = experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
            expected[token] += weight * experts.post_expert_norm(y)
    assert relative_difference(stock_experts(experts, x, ids, weights), expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("act", "name"), [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.CELU(), None)])
def test_activations_that_the_kernels_know_are_computed_by_one_operator(
    act: nn.Module, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = MODELS["mixtral"]().eval()
    experts = model.model.layers[0].mlp.experts
    experts.act_fn = act
    fused: list[str] = []

    def spy(*args: Any, activation: str, **kwargs: Any) -> torch.Tensor:
        fused.append(activation)
        return experts_operator(*args, activation=activation, **kwargs)

    experts_operator = ops.experts
    monkeypatch.setattr(ops, "experts", spy)
    stock_experts(experts, torch.randn(4, 36), torch.randint(0, 5, (4, 2)), torch.rand(4, 2))
    assert fused == ([] if name is None else [name])


def test_a_model_that_is_not_from_transformers_stays_as_it_is() -> None:
    before = set(ALL_EXPERTS_FUNCTIONS)
    with through_moeify(nn.Linear(2, 3)):
        assert set(ALL_EXPERTS_FUNCTIONS) == before


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_kind_that_only_plain_operations_take_go_through_the_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    experts = next(module for path, module in model.named_modules() if path.endswith(".experts"))
    x, ids, weights = torch.randn(4, 36), torch.randint(0, 5, (4, 2)), torch.rand(4, 2)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = experts(x, ids, weights)
        monkeypatch.setattr("moeify.contract.stock_experts.is_quantized", lambda weight: weight is experts.down_proj)
        monkeypatch.setattr("moeify.contract.stock_experts.stacked_weights", None)
        with through_moeify(model):
            assert torch.equal(experts(x, ids, weights), expected)


def test_experts_that_transformers_has_in_fp8_are_computed_by_ours() -> None:
    config = tf.MixtralConfig(**{**_SIZES, "intermediate_size": 96}, num_local_experts=5)
    model: Any = tf.MixtralForCausalLM(config).eval()
    replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
    experts = model.model.layers[0].mlp.experts
    whole = []
    for name in ("gate_up_proj", "down_proj"):
        values = torch.randn(getattr(experts, name).shape).mul(40).to(torch.float8_e4m3fn)
        scale = torch.rand(5, *getattr(experts, f"{name}_scale_inv").shape[1:]) / 400
        for suffix, tensor in (("", values), ("_scale_inv", scale)):
            setattr(experts, name + suffix, nn.Parameter(tensor, requires_grad=False))
        each = scale.repeat_interleave(128, 1)[:, : values.shape[1]].repeat_interleave(128, 2)[..., : values.shape[2]]
        whole.append(values.double() * each.double())
    x, ids, weights = torch.randn(4, 36), torch.tensor([[4, 5], [-1, 2], [0, 1], [3, 3]]), torch.rand(4, 2)
    with through_moeify(model), torch.no_grad():
        got = experts(x, ids, weights)
    want = reference.experts(x.double(), ids, weights.double(), whole[0], whole[1], None, None, "silu", True)
    assert 0 < relative_difference(got, want) < 0.1  # tokens are rounded too


def test_experts_in_fp8_are_computed_by_the_default_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *given: seen.extend(given[1:]))
    model: Any = MODELS["mixtral"]().eval()
    with through_moeify(model):
        config = FineGrainedFP8Config(weight_block_size=(4, 4))
        replace_with_fp8_linear(model, ["lm_head"], config)
        x, ids, weights = torch.randn(2, 36), torch.tensor([[4, 5], [-1, 2]]), torch.rand(2, 2)
        model.model.layers[0].mlp.experts(x, ids, weights)
    assert seen[0] is x and seen[1].tolist() == [[4, 0], [0, 2]]
    assert seen[2].tolist() == [[weights[0, 0].item(), 0], [0, weights[1, 1].item()]]
