"""Damage of config.json: fields, text, and what stands in its place."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.damage import files, jsons

# What transformers and moeify read, besides what a saved config has.
NAMES = (
    "architectures", "model_type", "quantization_config", "auto_map", "torch_dtype", "dtype", "tie_word_embeddings",
    "num_labels", "id2label", "return_dict", "output_hidden_states", "attn_implementation", "use_cache", "layer_types",
    "rope_scaling", "rope_parameters", "sliding_window", "head_dim", "hidden_act", "pretraining_tp", "is_decoder",
    "transformers_weights", "text_config", "num_hidden_layers", "intermediate_size", "hidden_size", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "moeify", "experts_implementation",
)  # fmt: skip
ARCHITECTURES = (
    "LlamaModel", "LlamaForSequenceClassification", "MistralForCausalLM", "GPT2Model", "BertForMaskedLM", "pipeline",
    "AutoTokenizer", "AutoModel", "__name__", "PreTrainedModel", "LlamaConfig", "MambaForCausalLM", "no such",
)  # fmt: skip


def fields(rng: Random, src: Path) -> str:
    return jsons.of_values(rng, src / "config.json", NAMES)


def named(rng: Random, src: Path) -> str:
    """Another value of a field that is read by name."""
    path, field = src / "config.json", rng.choice(NAMES)
    return jsons.set_entry(path, field, rng.choice(jsons.ODD))


def another_architecture(rng: Random, src: Path) -> str:
    return jsons.set_entry(src / "config.json", "architectures", [rng.choice(ARCHITECTURES)])


text = files.at("config.json", files.of_text)
bits = files.at("config.json", files.flip)
place = files.at("config.json", files.in_its_place)
