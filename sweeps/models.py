"""The model types that transformers registers, each built from its default configuration with two layers a stack.

Where the default configuration is no valid model, sweeps/looked_up.json holds what was looked up by hand.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

DOCS = Path(__file__).resolve().parent.parent / "docs"
LAYERS = 2

TASKS: dict[str, tuple[Any, Any]] = {
    "causal LM": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
    "speech": (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, transformers.AutoModelForSpeechSeq2Seq),
    "masked LM": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    "base": (auto.MODEL_MAPPING_NAMES, transformers.AutoModel),
}
DEPTHS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|num_(encoder|decoder)_(layers|blocks)"
    r"|num_block_layers|depth|num_hidden_blocks|[lrx]_layers|.*_num_hidden_layers|resampler_depth|vision_depth"
)
PER_LAYER = re.compile(r"(mlp_|attn_)?layer_types|layers_block_type|num_attention_heads_per_layer|kv_source_layers")
STAGES = re.compile(r"depths|num_blocks|layers_per_stage|encoder_depths|stage_depths|blocks_per_stage")


def model_types() -> dict[str, str]:
    """Return every registered model type with the first task that it is registered for."""
    return {name: task for task, (names, _) in reversed(TASKS.items()) for name in sorted(names)}


def looked_up(model_type: str) -> dict[str, Any]:
    """Return what sweeps/looked_up.json says about a model type; what it calls small, only the small models get."""
    entries: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("looked_up.json").read_text())
    return entries.get(model_type, {})


def example_inputs(specified: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the inputs that sweeps/looked_up.json describes.

    `{"shape": [2, "2*text_config.hidden_size"], "dtype": …}` is a tensor on the meta device, sizes by name being the
    configuration's; with `"value"` it holds that number. `{"values": […]}` is a tensor that holds a list.
    """
    return {name: _example(value, config) for name, value in specified.items()}


def _example(value: Any, config: Any) -> Any:
    match value:
        case {"values": values}:
            return torch.tensor(values)
        case {"shape": shape}:
            sizes = [prod(_number(part, config) for part in str(size).split("*")) for size in shape]
            dtype = getattr(torch, value.get("dtype", "float32"))
            if "value" in value:
                return torch.full(sizes, value["value"], dtype=dtype)
            return torch.empty(sizes, dtype=dtype, device="meta")
        case dict():
            return {name: _example(inner, config) for name, inner in value.items()}
        case list():
            return [_example(inner, config) for inner in value]
    return value


def build(model_type: str, task: str, changes: dict[str, Any]) -> nn.Module:
    """Build a small model on the meta device: default widths, two layers."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    top = {name: _configuration(value) for name, value in changes.items() if "." not in name}
    config = config_class(**top)
    _cut(config, set())
    set_fields(config, changes | top)
    names, auto_class = TASKS[task]
    with torch.device("meta"):
        try:
            model: nn.Module = auto_class.from_config(config)
        except (ValueError, AttributeError):
            name = names[model_type]
            model_class = getattr(transformers, name if isinstance(name, str) else name[0])
            if not isinstance(config, model_class.config_class):  # the decoder of a model of several
                config = model_class.config_class()
                _cut(config, set())
            model = model_class(config)
    return model


def _number(text: str, config: Any) -> int:
    """Return a number as it is written, or a field by its path, in which numbers are those of layers."""
    if text.isdigit():
        return int(text)
    for name in text.split("."):
        config = config[int(name)] if name.isdigit() else getattr(config, name)
    return int(config)


def set_fields(config: Any, changes: dict[str, Any]) -> None:
    """Set fields of a configuration by their paths."""
    for path, value in changes.items():
        *holders, name = path.split(".")
        holder = config
        for inner in holders:
            holder = holder[inner] if isinstance(holder, dict) else getattr(holder, inner)
        if isinstance(holder, dict):
            holder[name] = value
        else:
            setattr(holder, name, value)


def _configuration(value: Any) -> Any:
    """Return a configuration for a dictionary that names a model type, and anything else as it is."""
    named = isinstance(value, dict) and "model_type" in value
    return transformers.AutoConfig.for_model(**value) if named else value


def _cut(config: Any, seen: set[int]) -> None:
    """Cut every stack of a configuration and of those inside it to two layers, and every stage to one."""
    seen.add(id(config))
    spec, depth = vars(config).get("_heterogeneity_spec"), vars(config).get("num_hidden_layers", LAYERS)
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig) and id(value) not in seen:
            _cut(value, seen)
        elif DEPTHS.fullmatch(name) and type(value) is int and value > LAYERS:
            setattr(config, name, LAYERS)
        elif PER_LAYER.fullmatch(name) and isinstance(value, list):
            setattr(config, name, value[:LAYERS] if spec is None else [value[0], value[-1]])
        elif STAGES.fullmatch(name) and isinstance(value, list | tuple):
            setattr(config, name, type(value)(1 for _ in value))
    if spec is not None:  # its layers differ: the first and the last stay
        held = spec.per_layer_overrides
        config.per_layer_config = {n: held[layer] for n, layer in enumerate((0, depth - 1)) if layer in held}
    _cut_stages(config)


def _cut_stages(config: Any) -> None:
    """Let a backbone whose layers are its stages give the last one, if it gave the last one before it was cut."""
    names = getattr(config, "stage_names", None)
    if names and not any(map(STAGES.fullmatch, vars(config))) and config.out_features == names[-1:]:
        config.stage_names = names[: config.num_hidden_layers + 1]
        config.set_output_features_output_indices(config.stage_names[-1:], None)
