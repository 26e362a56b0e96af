from __future__ import annotations

from typing import Any

import pytest
import transformers as tf

from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError, MoeifyError
from moeify.tracing.skeleton import build_on_meta, check_shapes, config_of, may_be_missing, model_class, stored_names

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
LLAMA = {"model_type": "llama", **SIZES}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification",
        ),
        ({"model_type": "llama"}, "LlamaForCausalLM"),
        ({"model_type": "bert"}, "BertForMaskedLM"),
        ({"model_type": "t5"}, "T5ForConditionalGeneration"),
        ({"model_type": "vit"}, "ViTForImageClassification"),
        ({"model_type": "clip_text_model", "architectures": []}, "CLIPTextModel"),
    ],
)
def test_the_class_is_the_one_that_is_named_or_the_usual_one(config: dict[str, Any], expected: str) -> None:
    assert model_class(config).__name__ == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nope"}, "does not know the model type 'nope'"),
        ({**LLAMA, "architectures": ["NoSuchModel"]}, "does not know NoSuchModel"),
        ({**LLAMA, "hidden_size": "x"}, r"LlamaForCausalLM cannot be built from config.json \(.*hidden_size.*expected"),
        (
            {**LLAMA, "moeify": {"plan": {"sites": [1, 2], "config": {"experts": 8, "top_k": 2}}}},
            "is converted already: 2 of its FFNs are 8 experts, top-2",
        ),
        ({**LLAMA, "moeify": {}}, "the plan in its config is damaged"),
        ({**LLAMA, "quantization_config": {"quant_method": "moeify"}}, "the plan in its config is damaged"),
        ({**LLAMA, "moeify": {"plan": {"sites": 5}}}, "the plan in its config is damaged"),
        ({**LLAMA, "moeify": {"plan": [1]}}, "the plan in its config is damaged"),
        ({**LLAMA, "architectures": "LlamaForCausalLM"}, "expected a list of names of classes"),
        ({**LLAMA, "architectures": [["LlamaForCausalLM"]]}, "expected a list of names of classes"),
        ({**LLAMA, "architectures": {"LlamaForCausalLM": 1}}, "expected a list of names of classes"),
        ({**LLAMA, "architectures": ["pipeline"]}, "does not know pipeline"),
        ({**LLAMA, "architectures": ["AutoTokenizer"]}, "does not know AutoTokenizer"),
        ({**LLAMA, "architectures": ["AutoModel"]}, "does not know AutoModel"),
        ({**LLAMA, "architectures": ["PreTrainedModel"]}, "does not know PreTrainedModel"),
        ({**LLAMA, "architectures": ["__name__"]}, "does not know __name__"),
    ],
)
def test_what_cannot_be_built_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeifyError, match=message) as caught:
        build_on_meta(config)
    assert "\n" not in str(caught.value)


def test_what_a_forward_returns_is_no_part_of_the_model() -> None:
    model = build_on_meta({**LLAMA, "return_dict": False, "output_hidden_states": "x", "output_attentions": True})
    assert model.config.return_dict and not model.config.output_hidden_states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"lm_head.weight": ("BF16", (11, 12))}, None),
        ({"stray": ("F32", (5,))}, None),
        (
            {"lm_head.weight": ("F32", (12, 11))},
            r"lm_head.weight has shape \[12, 11\], the model .* expects \[11",
        ),
        ({"model.norm.weight": ("F32", ())}, r"model.norm.weight has shape \[\], "),
        (
            {"model.norm.weight": ("I32", (12,))},
            "model.norm.weight has dtype I32, the model .* expects float32",
        ),
    ],
)
def test_every_stored_tensor_is_compared_with_its_place(
    change: dict[str, tuple[str, tuple[int, ...]]], message: str | None
) -> None:
    model = build_on_meta(LLAMA)
    stored = {name: TensorInfo(name, "F32", tuple(place.shape)) for name, place in model.state_dict().items()}
    stored |= {name: TensorInfo(name, *entry) for name, entry in change.items()}
    names = stored_names(model, stored)
    if message is None:
        check_shapes(model, names, stored)
        return
    with pytest.raises(CheckpointError, match=message):
        check_shapes(model, names, stored)


def test_a_skeleton_has_no_values_and_is_in_evaluation_mode() -> None:
    model = build_on_meta(LLAMA)
    assert all(parameter.is_meta for parameter in model.parameters()) and not model.training
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").shape == (20, 12)


def test_a_full_config_has_the_defaults_of_its_class() -> None:
    full = config_of(LLAMA).to_dict()
    assert full["hidden_act"] == "silu" and full["vocab_size"] == 11


def test_names_on_disk_may_be_older_than_those_of_the_model() -> None:
    names = stored_names(build_on_meta({"model_type": "bert", **SIZES}), ["bert.embeddings.LayerNorm.gamma", "stray"])
    assert names.of == {"bert.embeddings.LayerNorm.weight": "bert.embeddings.LayerNorm.gamma"}
    assert (names.merged, names.unused) == ({}, ("stray",))


def test_tensors_that_transformers_merges_are_told_apart() -> None:
    model = build_on_meta({"model_type": "mixtral", **SIZES, "num_key_value_heads": 1, "num_local_experts": 2})
    prefix = "model.layers.0.block_sparse_moe"
    names = stored_names(model, [f"{prefix}.experts.0.w1.weight", f"{prefix}.gate.weight", "lm_head.weight"])
    assert names.merged == {f"{prefix}.experts.0.w1.weight": "model.layers.0.mlp.experts.gate_up_proj"}
    assert names.of == {"model.layers.0.mlp.gate.weight": f"{prefix}.gate.weight", "lm_head.weight": "lm_head.weight"}


def test_what_a_model_makes_itself_may_be_missing() -> None:
    config = tf.PegasusConfig(d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                              decoder_attention_heads=2, vocab_size=11).to_dict()  # fmt: skip
    model = build_on_meta({**config, "architectures": ["PegasusForConditionalGeneration"]})
    assert may_be_missing(model, "final_logits_bias")
    assert not may_be_missing(model, "model.encoder.layers.0.fc1.weight")


def test_a_slip_in_the_model_type_is_answered_with_the_nearest() -> None:
    with pytest.raises(MoeifyError, match="does not know the model type 'lamma': did you mean 'llama'"):
        model_class({"model_type": "lamma", "architectures": ["LlamaForCausalLM"]})


def test_numbers_that_json_lacks_are_read_as_transformers_writes_them() -> None:
    limits = [0.0, {"__float__": "Infinity"}]
    fields = {"model_type": "mamba2", "time_step_limit": limits, "extra": {"a": {"__float__": "9"}}}
    config = config_of(fields).to_dict()
    assert tuple(config["time_step_limit"]) == (0.0, float("inf"))
    assert config["extra"] == {"a": {"__float__": "9"}}
