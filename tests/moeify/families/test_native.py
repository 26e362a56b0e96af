from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from moeify.config import MoEConfig
from moeify.conversion.dense import Dense
from moeify.errors import CheckpointError
from moeify.families.native import native_config
from moeify.families.table import FAMILIES
from moeify.planning.make_plan import make_plan
from tests.moeify import tiny

CONFIG = MoEConfig(experts=6, top_k=2, granularity=1)


def config_for(target: str, name: str, **changes: Any) -> dict[str, Any]:
    model: Any = tiny.build(name)
    dense, config = Dense(model), replace(CONFIG, router=FAMILIES[target].router)
    plan = replace(make_plan(model, dense.graph_module, dense.inspection, config), target=target)
    return native_config(FAMILIES[target], plan, {**model.config.to_dict(), **changes}, "bfloat16")


@pytest.mark.parametrize(("target", "name"), [("mixtral", "mistral"), ("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3")])
def test_transformers_reads_what_is_written(target: str, name: str) -> None:
    data = config_for(target, name)
    read: Any = getattr(transformers, FAMILIES[target].architecture).config_class.from_dict(data)
    assert data["architectures"] == [FAMILIES[target].architecture] and data["model_type"] == target
    assert (read.hidden_size, read.num_hidden_layers, read.vocab_size) == (tiny.HIDDEN, tiny.LAYERS, tiny.VOCABULARY)
    assert read.num_experts_per_tok == 2 and data["dtype"] == data["torch_dtype"] == "bfloat16"


def test_what_the_dense_config_says_of_itself_stays_behind() -> None:
    data = config_for("mixtral", "llama", pretraining_tp=3, _name_or_path="dense")
    assert {"mlp_bias", "attention_bias", "pretraining_tp", "_name_or_path"}.isdisjoint(data)
    assert data["tie_word_embeddings"] is False  # some engines know no other Mixtral


def test_a_field_that_only_the_moe_class_reads_is_not_carried_over() -> None:
    assert config_for("mixtral", "llama", sliding_window=3, num_local_experts=99)["sliding_window"] is None
    assert config_for("mixtral", "mistral", sliding_window=3)["sliding_window"] == 3


def test_a_value_that_transformers_does_not_take_is_told_in_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"does not make a config of mixtral \(.*sliding_window"):
        config_for("mixtral", "mistral", sliding_window="x")


def test_rotary_settings_are_written_for_older_engines_too() -> None:
    plain = config_for("mixtral", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    assert plain["rope_theta"] == 5e4 and plain["rope_scaling"] is None
    scaled = config_for("mixtral", "llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    assert (
        "partial_rotary_factor" not in scaled
        and scaled["rope_theta"] == 1e4
        and scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    )


def test_a_share_of_the_head_that_rotates_is_written_for_older_engines_too() -> None:
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    data = config_for("glm4_moe", "phi3", rope_parameters=partial)
    assert data["partial_rotary_factor"] == 0.5 and data["rope_scaling"] is None and data["head_dim"] == 12


def test_the_size_of_a_head_is_written_for_engines_that_have_no_default() -> None:
    assert config_for("glm4_moe", "qwen2")["head_dim"] == 12


def test_rotary_settings_for_each_kind_of_layer_have_no_older_form() -> None:
    data = config_for("mellum", "qwen3")
    assert data["rope_parameters"].keys() == {"full_attention", "sliding_attention"} and "rope_scaling" not in data


def test_llama_cpp_is_told_which_layers_rotate_and_gets_a_window_that_spans_all() -> None:
    data = config_for("granitemoe_swa", "llama", no_rope_layers=[1, 0, 1])
    assert data["no_rope_layers"] == [1, 0, 1] and data["layer_rope_theta"] == [1e4, 0, 1e4]
    assert data["layer_types"] == ["sliding_attention"] * 3 and data["sliding_window"] == 2048


def test_heads_of_two_sizes_are_said_in_the_words_of_the_hub() -> None:
    config = tiny.tf.Gemma4TextConfig(num_hidden_layers=2, head_dim=8, global_head_dim=16).to_dict()
    said = FAMILIES["gemma4_text"].sources["gemma4_text"].fields(config)
    assert said == {"global_head_dim": 16, "num_global_key_value_heads": None}


def test_what_the_dense_model_does_not_read_is_left_out_for_engines_that_would() -> None:
    share = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    data = config_for("qwen3_moe", "qwen3", rope_parameters=share, partial_rotary_factor=0.5)
    assert "partial_rotary_factor" not in data and "partial_rotary_factor" not in data["rope_parameters"]
    assert config_for("glm4_moe", "qwen3", rope_parameters=share)["partial_rotary_factor"] == 1.0
    full = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * tiny.LAYERS}
    for target in ("mellum", "qwen3_moe"):
        data = config_for(target, "qwen3", **full)
        assert data["sliding_window"] is None and not data.get("use_sliding_window")
    data = config_for("mellum", "qwen3", **{**full, "layer_types": ["sliding_attention"] * tiny.LAYERS})
    assert data["sliding_window"] == 5


def test_the_length_of_longrope_stands_where_transformers_4_looks_for_it() -> None:
    model: Any = tiny.build("llama")
    factors = [1.5] * (model.config.head_dim // 2)
    lengths = {"factor": 2.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors, **lengths}
    assert config_for("mixtral", "llama", rope_parameters=rope)["original_max_position_embeddings"] == 64
