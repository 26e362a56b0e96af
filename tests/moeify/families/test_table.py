from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import output_config, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import ConfigError, MoeifyError, RefusedError
from moeify.families.table import FAMILIES, fit_target, remarks, why_not
from moeify.plan import Plan
from moeify.routers.sigmoid import Sigmoid
from moeify.tracing.skeleton import build_on_meta, model_class
from tests.moeify import native, tiny

CONFIG = MoEConfig(experts=3, top_k=2)


def plan_for(name: str, tmp_path: Path, layers: str = "all", **changes: Any) -> tuple[Plan, dict[str, Any]]:
    """A plan, and the dense config with its defaults, some of them changed."""
    src = tiny.save(tiny.build(name), tmp_path / "src")
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        return plan_checkpoint(dense, CONFIG, layers, "moeify"), {**dense.config, **changes}


@pytest.mark.parametrize(
    ("name", "layers", "changes", "expected"),
    [
        ("llama", "all", {}, "mixtral"),
        ("mistral", "all", {}, "mixtral"),
        ("qwen2", "all", {}, "glm4_moe"),
        ("qwen2", "1-2", {}, "glm4_moe"),
        ("qwen2", "0", {}, "qwen2_moe"),
        ("qwen2", "all", {"layer_types": ["sliding_attention"] * 3}, "qwen2_moe"),
        ("llama", "1-2", {}, "glm4_moe"),
        ("llama", "all", {"attention_bias": True}, "granitemoe"),
        ("phi3", "all", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "glm4_moe"),
        ("qwen3", "all", {}, "qwen3_moe"),
        ("gemma", "all", {}, "moeify"),
        ("llama", "0", {}, "ernie4_5_moe"),
        ("llama", "0,2", {}, "qwen2_moe"),
        ("llama", "0,2", {"head_dim": 10}, "moeify"),
        ("llama", "all", {"mlp_bias": True}, "moeify"),
        ("mistral", "0", {}, "moeify"),
        ("llama", "all", {"architectures": ["LlamaModel"]}, "moeify"),
        ("llama", "all", {"architectures": ["LlamaForSequenceClassification"]}, "moeify"),
        ("llama", "all", {"architectures": None}, "mixtral"),
        ("qwen3", "all", {"layer_types": ["sliding_attention"] * 3}, "mellum"),
    ],
)
def test_auto_takes_the_exact_family_that_most_engines_run(
    name: str, layers: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    plan, dense = plan_for(name, tmp_path, layers, **changes)
    assert fit_target(plan, dense, "auto").target == expected


@pytest.mark.parametrize(
    ("name", "changes", "target", "words"),
    [
        ("llama", {"attention_bias": True}, "mixtral", "attention_bias"),
        ("llama", {"mlp_bias": True}, "qwen2_moe", "mlp_bias"),
        ("qwen3", {"architectures": ["Qwen3Model"]}, "qwen3_moe", "is not a language model"),
        ("llama", {"head_dim": 10}, "qwen2_moe", "head_dim"),
        ("mistral", {}, "qwen2_moe", "sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "qwen3_moe", "sliding-window"),
        ("qwen3", {"attention_bias": True}, "glm4_moe", "no bias of o_proj"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "mixtral", "partial_rotary_factor"),
        ("gpt2", {}, "mixtral", "can be made from llama, mistral"),
        ("gemma", {"use_bidirectional_attention": True}, "mixtral", "causal attention only"),
    ],
)
def test_a_condition_that_fails_is_said(
    name: str, changes: dict[str, Any], target: str, words: str, tmp_path: Path
) -> None:
    plan, dense = plan_for(name, tmp_path, **changes)
    with pytest.raises(RefusedError, match=words):
        fit_target(plan, dense, target)


def test_mixtral_cannot_keep_layers_dense_or_leave_weights_unnormalised(tmp_path: Path) -> None:
    plan, dense = plan_for("llama", tmp_path, "1")
    with pytest.raises(RefusedError, match="2 of its layers stay dense"):
        fit_target(plan, dense, "mixtral")
    whole, dense = plan_for("llama", tmp_path / "again")
    loose = replace(whole, config=MoEConfig(3, 2, renormalize=False))
    with pytest.raises(RefusedError, match="renormalizes"):
        fit_target(loose, dense, "mixtral")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_weights_that_sum_to_less_are_kept_where_the_config_can_say_so(name: str, tmp_path: Path) -> None:
    plan, dense = plan_for(name, tmp_path)
    found = [family for family in FAMILIES.values() if why_not(family, plan, dense) is None]
    assert len(found) > 1
    for family in found:
        one = fit_target(plan, dense, family.model_type)
        loose = replace(one, config=replace(one.config, renormalize=False))
        says = family.fields(one, dense) != family.fields(loose, dense)
        assert (why_not(family, loose, dense) is None) == says, family.model_type


def test_an_unknown_family_is_wrong_usage(tmp_path: Path) -> None:
    plan, dense = plan_for("llama", tmp_path)
    with pytest.raises(ConfigError, match="expected auto, moeify, cohere2_moe"):
        fit_target(plan, dense, "phimoe")


def test_native_configs_say_what_older_engines_read(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("qwen3"), tmp_path / "src")
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        config = output_config(dense, plan_checkpoint(dense, CONFIG), "BF16")
    assert config["num_experts"] == config["num_local_experts"] == 3
    assert config["norm_topk_prob"] is True and config["num_experts_per_tok"] == 2
    assert config["moe_intermediate_size"] == tiny.INTERMEDIATE
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["head_dim"] == 10


def test_rotary_scaling_of_llama_3_reaches_mixtral(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model: Any = tiny.build("llama")
    config = transformers.LlamaConfig.from_dict(
        {**model.config.to_dict(), "rope_parameters": scaling, "max_position_embeddings": 512}
    )
    src = tiny.save(transformers.LlamaForCausalLM(config), tmp_path / "src")
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        native = output_config(dense, plan_checkpoint(dense, CONFIG), "F32")
    assert native["rope_parameters"] == scaling and native["rope_theta"] == 5e5
    assert native["rope_scaling"] == {key: value for key, value in scaling.items() if key != "rope_theta"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_names_a_class_of_transformers_and_sources_it_knows(family: Any) -> None:
    assert getattr(transformers, family.architecture).config_class.model_type == family.model_type
    for source in family.sources:
        assert source in transformers.CONFIG_MAPPING


def test_an_architecture_that_transformers_lacks_is_named() -> None:
    with pytest.raises(MoeifyError, match="does not know NoneSuchForCausalLM"):
        build_on_meta({"model_type": "llama", "architectures": ["NoneSuchForCausalLM"]})
    with pytest.raises(MoeifyError, match="does not know the model type 'nonesuch'"):
        build_on_meta({"model_type": "nonesuch"})
    with pytest.raises(MoeifyError, match="cannot be built"):
        build_on_meta(json.loads('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}'))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration"),
     ("vit", "ViTForImageClassification")],
)  # fmt: skip
def test_a_config_that_names_no_class_gets_the_usual_one(model_type: str, name: str) -> None:
    assert model_class({"model_type": model_type}).__name__ == name


def test_a_family_puts_its_router_in_place_of_the_default_one_and_refuses_others(tmp_path: Path) -> None:
    plan, dense = plan_for("llama", tmp_path)
    assert fit_target(plan, dense, "glm4_moe").config.router == Sigmoid()
    grouped = replace(plan, config=MoEConfig(4, 2, router=Sigmoid(n_group=2, topk_group=2)))
    assert fit_target(grouped, dense, "glm4_moe").config.router == Sigmoid(n_group=2, topk_group=2)
    assert fit_target(grouped, dense, "auto").target == "glm4_moe"
    with pytest.raises(RefusedError, match="no place for router = 'sigmoid'"):
        fit_target(grouped, dense, "mixtral")
    moved = replace(plan, config=MoEConfig(4, 2, router=Sigmoid(bias_rate=0.1)))
    with pytest.raises(RefusedError, match=r"router\.bias_rate = 0.1"):
        fit_target(moved, dense, "glm4_moe")


@pytest.mark.parametrize(
    ("layers", "target", "words"),
    [("0", "glm4_moe", "only the first layers"), ("0,2", "ernie4_5_moe", "at the beginning and at the end")],
)
def test_layers_that_stay_dense_where_a_family_has_none_are_refused(
    layers: str, target: str, words: str, tmp_path: Path
) -> None:
    plan, dense = plan_for("llama", tmp_path, layers)
    with pytest.raises(RefusedError, match=words):
        fit_target(plan, dense, target)


def test_shared_experts_are_refused_by_families_that_have_none(tmp_path: Path) -> None:
    plan, dense = plan_for("llama", tmp_path)
    shared = replace(plan, config=MoEConfig(3, 2, shared_experts=1))
    with pytest.raises(RefusedError, match="mixtral has no place for shared_experts = 1"):
        fit_target(shared, dense, "mixtral")
    assert fit_target(shared, dense, "auto").target == "glm4_moe"


def test_what_a_user_must_know_is_said(tmp_path: Path) -> None:
    plan, dense = plan_for("qwen2", tmp_path)
    said = remarks(fit_target(plan, dense, "qwen2_moe"), dense)
    assert "intermediate size 128 that outputs zeros" in said[0] and "llama.cpp and mlx-lm" in said[1]
    assert remarks(fit_target(plan, dense, "glm4_moe"), dense)[0] == "glm4_moe has a sigmoid router"
    assert f"intermediate size {tiny.INTERMEDIATE} " in remarks(fit_target(plan, dense, "glm4_moe"), dense)[1]
    shared = replace(plan, config=MoEConfig(3, 2, shared_experts=1))
    assert len(remarks(fit_target(shared, dense, "qwen2_moe"), dense)) == 1
    assert remarks(fit_target(plan, dense, "moeify"), dense) == []


def test_a_note_is_said_where_it_applies(tmp_path: Path) -> None:
    plan, dense = plan_for("llama", tmp_path)
    plan = fit_target(plan, dense, "mixtral")
    assert remarks(plan, dense) == []
    assert "no head_dim but" in remarks(plan, {**dense, "head_dim": 2 * tiny.HIDDEN})[0]
    (said,) = remarks(plan, {**dense, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}})
    assert said == "mlx-lm ignores rope scaling in this format"


@pytest.mark.parametrize(
    ("source", "target", "corner", "words"),
    [
        ("llama", "mixtral", {"head_dim": 2 * tiny.HIDDEN}, "mlx-lm and SGLang have no head_dim"),
        ("llama", "granitemoe_swa", {"head_dim": 2 * tiny.HIDDEN}, "vLLM and llama.cpp's converter have no head_dim"),
        ("llama", "granitemoe_swa", {"attention_bias": True}, "vLLM drops the attention biases"),
        (
            "qwen2",
            "qwen2_moe",
            {"layer_types": ["sliding_attention", "full_attention"]},
            "in all layers here or in none",
        ),
    ],
)
def test_a_note_of_an_engine_comes_with_the_corner_that_it_is_wrong_in(
    source: str, target: str, corner: dict[str, object], words: str, tmp_path: Path
) -> None:
    plan, dense = plan_for(source, tmp_path)
    plan = fit_target(plan, dense, target)
    assert not any(words in said for said in remarks(plan, dense))
    assert any(words in said for said in remarks(plan, {**dense, **corner}))


def test_auto_leaves_out_what_transformers_alone_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, dense = plan_for("llama", tmp_path)
    monkeypatch.setattr("moeify.families.table.FAMILIES", {"gpt_oss": FAMILIES["gpt_oss"]})
    assert fit_target(plan, dense, "auto").target == "moeify"
    if native.OLD:
        with pytest.raises(RefusedError, match=r"by transformers 5\.24 and newer only"):
            fit_target(plan, dense, "gpt_oss")
        return
    assert "older ones and all other engines compute another" in remarks(fit_target(plan, dense, "gpt_oss"), dense)[0]
