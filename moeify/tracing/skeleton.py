"""Models without weights, built by transformers from a `config.json`, and their names for the tensors on disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, cast

import torch
import transformers
from transformers import modeling_utils
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify.checkpoint.tensor_info import TensorInfo, torch_dtype
from moeify.errors import CheckpointError, MoeifyError, first_line, told_as
from moeify.files.json_text import JsonObject
from moeify.plan import stored_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# For a config that names no class: what its model type is trained for, in this order.
_USUAL_CLASSES: tuple[JsonObject, ...] = (
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
_BUILT_FROM = "{} cannot be built from config.json"
# What a forward returns beside the logits, and in which form: no part of the model.
_OF_A_CALL = {"return_dict", "use_return_dict", "output_hidden_states", "output_attentions"}


def model_class(config: JsonObject) -> type[PreTrainedModel]:
    """Return the transformers class that a `config.json` names, or the usual one for its model type.

    Raises:
        MoeifyError: This transformers has no such class.
    """
    model_type = config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise MoeifyError(_unknown(f"the model type {model_type[:99]!r}", model_type))
    named = config.get("architectures") or [names[model_type] for names in _USUAL_CLASSES if model_type in names][:1]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise MoeifyError(f"config.json has architectures = {str(named)[:99]}: expected a list of names of classes")
    for name in named:
        if found := _class_of_a_model(name):
            return found
    what = ", ".join(named)[:200] or f"a class of the model type {model_type!r}"
    raise MoeifyError(_unknown(what, model_type))


def _unknown(what: str, model_type: str) -> str:
    close = [name for name in get_close_matches(model_type, list(CONFIG_MAPPING), n=1) if name != model_type]
    advice = f"did you mean {close[0]!r}?" if close else "a newer one may"
    return f"transformers {transformers.__version__} does not know {what}: {advice}"


def _class_of_a_model(name: str) -> type[PreTrainedModel] | None:
    """Return a class of transformers if it is that of a model: it has functions and other classes too."""
    try:
        found = getattr(transformers, name, None)
    except Exception as error:  # its module does not import, mostly because a package is missing
        raise MoeifyError(f"transformers cannot import {name}: {first_line(error)}") from error
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class is not None:
        return found
    return None


def build_on_meta(config: JsonObject) -> PreTrainedModel:
    """Build a model's structure without weights.

    Args:
        config: The contents of `config.json`.

    Raises:
        MoeifyError: transformers cannot build the configuration, or its model is converted already.
    """
    cls = model_class(config)
    entry = stored_plan(config)
    if entry is not None or config.get("quantization_config"):
        raise MoeifyError(f"this {cls.__name__} {_converted(entry)}; start from the dense checkpoint")
    built = config_of(config)
    # Whatever stops transformers, the config is what the user can change.
    with told_as(_BUILT_FROM.format(cls.__name__)), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = cls(built)
        return cast("PreTrainedModel", model.eval())


def _converted(plan: object) -> str:
    """Say what the plan in a config has made of the model."""
    match plan:
        case {"sites": [*sites], "config": {"experts": int(experts), "top_k": int(top_k)}}:
            return f"is converted already: {len(sites)} of its FFNs are {experts} experts, top-{top_k}"
        case _:
            return "is converted already, or quantized, and the plan in its config is damaged"


def config_of(config: JsonObject) -> PreTrainedConfig:
    """Return transformers' configuration object for the contents of a `config.json`.

    Raises:
        MoeifyError: A field is not what transformers expects.
    """
    cls = model_class(config)
    config_class = cast("type[PreTrainedConfig]", cls.config_class)
    with told_as(_BUILT_FROM.format(cls.__name__)):
        fields = {name: _decoded(value) for name, value in config.items() if name not in _OF_A_CALL}
        return config_class.from_dict(fields)


def _decoded(value: object) -> object:
    """Return a value of a `config.json` with the numbers that JSON lacks, which transformers writes as objects."""
    if isinstance(value, dict):
        number = value.get("__float__") if len(value) == 1 else None
        if number in ("Infinity", "-Infinity", "NaN"):
            return float(str(number))
        return {name: _decoded(inner) for name, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


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
    rules = modeling_utils.get_model_conversion_mapping(model)  # type: ignore[attr-defined]
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


def check_shapes(model: PreTrainedModel, names: StoredNames, stored: Mapping[str, TensorInfo]) -> None:
    """Check that every stored tensor fits its place, before anything is traced or written.

    What transformers merges or splits while it loads is compared when the result is loaded.

    Raises:
        CheckpointError: A shape differs, or integers or 8-bit floats are stored where a parameter is floating-point.
    """
    places = model.state_dict(keep_vars=True)
    for name, on_disk in names.of.items():
        place, info = places[name], stored[on_disk]
        dtype = torch_dtype(info.dtype)
        same_kind = dtype.is_floating_point == place.is_floating_point() and (
            dtype.itemsize > 1 or place.dtype == dtype
        )
        if tuple(place.shape) != info.shape:
            found, expected = f"shape {list(info.shape)}", str(list(place.shape))
            why = "config and weights belong to different models, or the file is damaged"
        elif isinstance(place, torch.nn.Parameter) and not same_kind:
            found, expected = f"dtype {info.dtype}", str(place.dtype).removeprefix("torch.")
            why = "if it is quantized, dequantize it first; else the file is damaged"
        else:
            continue
        raise CheckpointError(f"{on_disk} has {found}, the model of config.json expects {expected}: {why}")


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Return whether a checkpoint is whole without this parameter, because the model makes it itself (sinusoids)."""
    patterns = (*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ()))
    return any(re.search(pattern, name) for pattern in patterns)
