"""The `config.json` of a native MoE checkpoint, complete for engines other than transformers too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from moeify.errors import CheckpointError, told_as
from moeify.families.base import Config, Family
from moeify.families.conditions import slides
from moeify.plan import Plan

# What each config says of itself.
_OWN = {"architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "auto_map"}
# Left out of what is written: a family says it by another field, which every engine and transformers reads.
_SAID_OTHERWISE = {"layers_block_type"}
# Left out where the format has no such field: its conditions say that nothing depends on them.
_DENSE_ONLY = {"attention_bias", "mlp_bias", "pretraining_tp", "sliding_window", "use_sliding_window", "layer_types",
               "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "attention_out_bias"}  # fmt: skip

_ROTATE_SHARES = {"glm", "phi3", "qwen3_5_text"}  # the types that read `partial_rotary_factor`; the others rotate all


def native_config(family: Family, plan: Plan, dense: Config, dtype: str) -> dict[str, Any]:
    """Return the config of the MoE model.

    Args:
        family: The target format.
        plan: What is converted.
        dense: The dense config, defaults filled in: two classes may have different ones.
        dtype: Name of the torch dtype that the weights are stored in.

    Raises:
        CheckpointError: Transformers does not take a value of the dense config for a field of this format.
    """
    config_class = getattr(transformers, family.architecture).config_class
    known = config_class().to_dict()
    strange = known.keys() - transformers.AutoConfig.for_model(dense["model_type"]).to_dict().keys()
    dense = {key: value for key, value in dense.items() if key not in strange}  # the dense class did not read them
    dense = _as_read(dense, known)
    dropped = _OWN | _SAID_OTHERWISE | (_DENSE_ONLY - known.keys())
    carried = {key: value for key, value in dense.items() if key not in dropped}
    pair = family.sources[plan.model_type]
    added = {**family.fields(plan, dense), **pair.fields(dense)}
    with told_as(f"config.json does not make a config of {family.model_type}", CheckpointError):
        data: dict[str, Any] = config_class(**{**carried, **added}).to_dict()
    generic = transformers.PreTrainedConfig().to_dict()
    unsaid = {key for key, value in generic.items() if data.get(key) == value} | _SAID_OTHERWISE
    concise = {key: value for key, value in data.items() if key not in unsaid}
    return {
        **concise,
        **added,
        **_older_rope(data.get("rope_parameters") or {}),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "tie_word_embeddings": dense.get("tie_word_embeddings", False) and not family.untied,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,
    }


def _as_read(dense: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a window that no layer has and a share of heads that the dense type ignores: others read them."""
    read = dict(dense)
    if not slides(dense) and ("use_sliding_window" in dense or "layer_types" not in known):
        read.update(sliding_window=None, use_sliding_window=False)
    if dense["model_type"] not in _ROTATE_SHARES and dense.get("rope_parameters"):
        rope = dense["rope_parameters"]
        read["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
        read.pop("partial_rotary_factor", None)
    return read


def _older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings as transformers 4 and engines that follow it spell them."""
    if "rope_theta" not in parameters:  # some formats have settings for each kind of layer
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in {"rope_theta", "partial_rotary_factor"}}
    kind = scaling.get("rope_type", "default")
    beside = ("partial_rotary_factor", *(("original_max_position_embeddings",) if kind == "longrope" else ()))
    apart = {key: parameters[key] for key in beside if key in parameters}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if kind == "default" else scaling, **apart}
