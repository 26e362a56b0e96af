"""The `config.json` of a native MoE checkpoint, complete for engines other than transformers too."""

from __future__ import annotations

from typing import Any

import transformers

from moeify.errors import CheckpointError, told_as
from moeify.families.table import Config, Family
from moeify.plan import Plan

# What each config says of itself.
_OWN = {"architectures", "model_type", "transformers_version", "dtype", "_name_or_path", "auto_map"}
_DENSE_ONLY = {"attention_bias", "mlp_bias", "pretraining_tp"}  # the conditions of a family say that they are off


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
    dropped = _OWN | (_DENSE_ONLY - known.keys())
    carried = {key: value for key, value in dense.items() if key not in dropped}
    added = family.fields(plan, dense)
    with told_as(f"config.json does not make a config of {family.model_type}", CheckpointError):
        data: dict[str, Any] = config_class(**{**carried, **added}).to_dict()
    generic = transformers.PreTrainedConfig().to_dict()
    concise = {key: value for key, value in data.items() if not (key in generic and generic[key] == value)}
    return {
        **concise,
        **added,
        **_older_rope(data.get("rope_parameters") or {}),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "tie_word_embeddings": dense.get("tie_word_embeddings", False),
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,
    }


def _older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings as transformers 4 and engines that follow it spell them."""
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": parameters.get("rope_theta"), "rope_scaling": None if plain else scaling}
