"""Models without weights, built by transformers from a `config.json`, and their names for the tensors on disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto as auto

from moeify.errors import MoeifyError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

JsonObject: TypeAlias = dict[str, Any]

# For a config that names no class: what its model type is trained for, in this order.
_USUAL_CLASSES: tuple[JsonObject, ...] = (
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)


def model_class(config: JsonObject) -> type[PreTrainedModel]:
    """Return the transformers class that a `config.json` names, or the usual one for its model type.

    Raises:
        MoeifyError: This transformers has no such class.
    """
    model_type = config.get("model_type", "")
    named = config.get("architectures") or [names[model_type] for names in _USUAL_CLASSES if model_type in names][:1]
    for name in named:
        if hasattr(transformers, name):
            return cast("type[PreTrainedModel]", getattr(transformers, name))
    what = ", ".join(named) or f"the model type {model_type!r}"
    raise MoeifyError(f"transformers {transformers.__version__} does not know {what}: a newer one may")


def build_on_meta(config: JsonObject) -> PreTrainedModel:
    """Build a model's structure without weights.

    Args:
        config: The contents of `config.json`.

    Raises:
        MoeifyError: transformers cannot build the configuration, or its model is converted already.
    """
    cls = model_class(config)
    entry = config.get("quantization_config")
    if entry and "plan" in entry:
        layers, moe = len(entry["plan"]["sites"]), entry["plan"]["config"]
        raise MoeifyError(
            f"this {cls.__name__} is converted already: {layers} of its FFNs are {moe['experts']} experts, "
            f"top-{moe['top_k']}; start from the dense checkpoint"
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module = cls(config_of(config))
            return cast("PreTrainedModel", model.eval())
    except Exception as error:  # whatever stops transformers, the config is what the user can change
        raise MoeifyError(f"{cls.__name__} cannot be built from config.json: {error}") from error


def config_of(config: JsonObject) -> PreTrainedConfig:
    """Return transformers' configuration object for the contents of a `config.json`."""
    config_class = cast("type[PreTrainedConfig]", model_class(config).config_class)
    return config_class.from_dict(dict(config))


def full_config(config: JsonObject) -> JsonObject:
    """Return a `config.json` with every default that its class fills in."""
    return config_of(config).to_dict()


@dataclass(frozen=True)
class StoredNames:
    """How a checkpoint's tensors relate to a model's parameters and buffers.

    Attributes:
        of: The name on disk by the model's name, for tensors that the model holds as they are stored.
        merged: Where the tensors go that transformers merges or splits while it loads, by their names on disk.
        unused: Names on disk of tensors that the model has no place for.
    """

    of: dict[str, str]
    merged: dict[str, str]
    unused: tuple[str, ...]


def stored_names(model: PreTrainedModel, stored: Iterable[str]) -> StoredNames:
    """Find the place of every stored tensor in a model.

    Names on disk may be older than the model's; the renaming rules are transformers' own.
    """
    places = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of: dict[str, str] = {}
    merged: dict[str, str] = {}
    unused: list[str] = []
    for name in stored:
        renamed, rule = name, None
        if name not in places:
            renamed, rule = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if rule is not None:
            merged[name] = renamed
        elif renamed in places:
            of[renamed] = name
        else:
            unused.append(name)
    return StoredNames(of, merged, tuple(unused))


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Return whether a checkpoint is whole without this parameter, because the model makes it itself (sinusoids)."""
    patterns = (*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ()))
    return any(re.search(pattern, name) for pattern in patterns)
