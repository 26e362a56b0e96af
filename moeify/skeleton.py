"""Models without weights, built by transformers from a `config.json`, and their names for the tensors on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from moeify.errors import CheckpointError, MoeifyError


def model_class(config: dict[str, Any]) -> Any:
    """Return the transformers class that a `config.json` names.

    Raises:
        MoeifyError: this transformers has no such class.
    """
    architectures = config.get("architectures") or []
    for name in architectures:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    model_type = config.get("model_type")
    if model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise MoeifyError(f"transformers {transformers.__version__} does not know the model type {model_type!r}")
    wanted = ", ".join(architectures) or "no class"
    raise MoeifyError(f"config.json names {wanted} in `architectures`: name transformers' class of this {model_type}")


def build_on_meta(config: dict[str, Any]) -> nn.Module:
    """Build a model's structure without weights.

    Args:
        config: The contents of `config.json`.

    Raises:
        MoeifyError: the configuration is not one that transformers can build.
    """
    cls = model_class(config)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = cls(config_of(config))
            return model.eval()
    except Exception as error:  # whatever transformers stumbles over, the config is what the user can change
        raise MoeifyError(f"{cls.__name__} cannot be built from config.json: {error}") from error


def config_of(config: dict[str, Any]) -> Any:
    """Return transformers' configuration object for the contents of a `config.json`."""
    return model_class(config).config_class.from_dict(dict(config))


def full_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a `config.json` with every default that its class fills in."""
    data: dict[str, Any] = config_of(config).to_dict()
    return data


def checkpoint_names(model: Any, stored: Iterable[str]) -> dict[str, str | None]:
    """Map the tensors of a checkpoint to the model's names for them, None for those it has no place for.

    Names on disk may be older than those in memory; the renaming rules are transformers' own.

    Raises:
        CheckpointError: transformers would merge or split a tensor on loading, which a byte copy cannot.
    """
    places = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names: dict[str, str | None] = {}
    for name in stored:
        if name in places:
            names[name] = name
            continue
        renamed, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if merged:
            raise CheckpointError(f"{name} is stored in another form than the model holds it in: convert it in place")
        names[name] = renamed if renamed in places else None
    return names
