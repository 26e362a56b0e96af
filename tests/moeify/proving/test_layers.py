from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moeify
from moeify.config import MoEConfig
from moeify.errors import VerificationError
from moeify.measure import TOLERANCE
from moeify.proving.layers import answering, chains_of, comparing, recording, reports
from moeify.proving.proof import run
from tests.moeify import tiny

tf: Any = transformers
CONFIG = MoEConfig(4, 2)


def pair(name: str, config: MoEConfig = CONFIG) -> tuple[Any, Any]:
    dense = tiny.build(name)
    return dense, moeify.convert(copy.deepcopy(dense), config)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_layer_is_compared_in_float64_and_a_right_one_is_equal(name: str) -> None:
    dense, moe = pair(name)
    for seed in range(3):
        ids = torch.randint(0, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(seed))
        inputs = tiny.inputs(name) if name == "vit" else {key: ids for key in tiny.inputs(name)}
        report = moeify.verify(dense, moe, inputs)
        assert report.passed and report.outside is not None and report.outside < 1e-6
        assert [layer.name for layer in report.layers] == [p for p, m in moe.named_modules() if hasattr(m, "experts")]
        assert all(layer.dtype == "float64" and layer.relative < 1e-14 for layer in report.layers)


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def test_a_block_that_writes_into_what_its_ffn_gave() -> None:
    dense = tf.FalconForCausalLM(tf.FalconConfig(**SIZES, alibi=False)).eval()  # it adds the attention in place
    report = moeify.verify(dense, moeify.convert(copy.deepcopy(dense), CONFIG))
    assert report.passed and report.outside is not None and report.outside < 1e-6


def test_an_activation_with_rounded_constants_is_held_to_that_rounding() -> None:
    dense: Any = tf.BloomForCausalLM(tf.BloomConfig(**SIZES)).eval()  # its GELU has 8 digits of sqrt(2 / pi)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    moe: Any = moeify.convert(copy.deepcopy(dense), CONFIG)
    report = moeify.verify(dense, moe)
    assert report.passed and max(layer.relative for layer in report.layers) > TOLERANCE["float64"]
    moe.transformer.h[0].mlp.dense_4h_to_h.experts.down_proj.data[:, 3, 5] *= 1.01
    assert not moeify.verify(dense, moe).passed


def test_a_model_that_does_not_run_is_one_line() -> None:
    dense, moe = pair("llama")
    with pytest.raises(VerificationError, match="the dense model does not run on the inputs of the proof"):
        moeify.verify(dense, moe, {"input_ids": torch.zeros(2)})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5_gated"])
def test_one_weight_that_is_off_by_a_thousandth_is_seen_in_its_layer_alone(name: str) -> None:
    dense, moe = pair(name)
    paths = list(chains_of(moe))
    weights = moe.get_submodule(paths[1]).experts.down_proj.data
    weights[:, 3, 5] *= 1.001
    report = moeify.verify(dense, moe)
    assert not report.passed
    assert [layer.name for layer in report.layers if not layer.exact] == [paths[1]]


def test_one_token_with_huge_values_hides_nothing() -> None:
    dense, moe = pair("llama")
    ids = torch.arange(20)[None]
    for model in (dense, moe):
        model.model.embed_tokens.weight.data[0] *= 1e3
        model.model.layers[0].input_layernorm.weight.data.zero_()
    moe.model.layers[1].mlp.experts.down_proj.data[:, 3, 5] *= 1.001
    assert [layer.exact for layer in moeify.verify(dense, moe, {"input_ids": ids}).layers] == [True, False, True]


def test_scaled_weights_are_held_to_the_rounding_of_their_dtype() -> None:
    for config in (MoEConfig(6, 3, granularity=3), MoEConfig(5, 2, shared_experts=2)):
        report = moeify.verify(*pair("llama", config))
        assert report.passed and {layer.dtype for layer in report.layers} == {"float32"}


def test_narrow_models_are_compared_in_float64_too() -> None:
    dense, moe = pair("llama")
    report = moeify.verify(dense.bfloat16(), moe.bfloat16())
    assert report.passed and all(layer.dtype == "float64" and layer.exact for layer in report.layers)


def test_models_without_an_moe_layer_in_the_place_of_an_ffn_are_compared_as_a_whole() -> None:
    dense = tiny.build("llama")
    report = moeify.verify(dense, copy.deepcopy(dense))
    assert report.layers == () and report.outside is None and report.tolerance == 1e-5
    _, moe = pair("llama")
    assert moeify.verify(moe, moe).layers == ()  # both have MoE layers there


def test_a_module_of_the_same_name_that_is_no_ffn_is_left_out() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, 2)

    with recording(nn.ModuleDict({"a": (wide := Wide())}), {"a": ("a",), "b": ("b",)}) as calls:
        wide(torch.ones(2, 3))
    assert calls == {}


def test_nothing_is_left_behind() -> None:
    dense, moe = pair("llama")
    before = tiny.logits(moe, "llama")
    arguments = tiny.inputs("llama")
    with recording(dense, chains_of(moe)) as calls:
        expected = run(dense, arguments)
    with comparing(moe, calls) as comparers:
        run(moe, arguments)
    with answering(moe, calls):
        assert run(moe, arguments).equal(expected)
    assert len(reports(comparers)) == 3
    assert tiny.logits(moe, "llama").equal(before)
    for module in (*dense.modules(), *moe.modules()):
        hooks = module._forward_hooks.values()
        assert not any("proving" in getattr(hook, "__module__", "") for hook in hooks)
        assert "forward" not in vars(module)


def test_rows_of_nan_go_around_a_layer_whose_router_would_refuse_them() -> None:
    dense, moe = pair("llama")
    for model in (dense, moe):
        model.model.embed_tokens.weight.data[7] = torch.nan
    report = moeify.verify(dense, moe, {"input_ids": torch.tensor([[7, 1, 2], [3, 1, 2]])})
    assert report.passed and report.nan > 0
    moe.model.layers[2].mlp.experts.down_proj.data.mul_(1.001)
    assert not moeify.verify(dense, moe, {"input_ids": torch.tensor([[3, 1, 2], [7, 1, 2]])}).passed


def test_ffns_that_a_block_computes_itself_are_told_by_the_logits() -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=tiny.VOCABULARY, d_model=24, n_layer=2, n_head=2, d_inner=40)
    tf: Any = transformers
    dense = tf.XLNetLMHeadModel(config).eval()
    moe = moeify.convert(copy.deepcopy(dense), MoEConfig(3, 2))
    assert chains_of(moe) == {}
    inputs = {"input_ids": torch.arange(24).reshape(2, 12)}
    report = moeify.verify(dense, moe, inputs)
    assert report.passed and not report.layers and report.tolerance == TOLERANCE["float32"]


def test_ffns_of_several_modules_are_found_by_the_plan() -> None:
    moe = moeify.convert(tiny.build("bert"), MoEConfig(3, 2))
    layer = "bert.encoder.layer.0"
    assert chains_of(moe)[f"{layer}.output.dense"] == (f"{layer}.intermediate", f"{layer}.output.dense")
