"""The experts of a model as one `nn.Linear` each, and back: converted layers, and stock ones of the experts interface.

Checkpoints: a converted model says in its config which form it has, and is made in that form, however its tensors are
stored. A stock model is saved in the layout that its class loads, whatever the form: where that has a tensor per
expert, the linears have its names, else transformers' own operations stack them while it is saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightTransform,
)

from moeify.arguments import check_model
from moeify.contract.forms import SaveStacked, to_save
from moeify.errors import RefusedError
from moeify.layers import Experts
from moeify.layers.linear_experts import DOWN, GATE, UP, LinearExperts
from moeify.plan import FIELD, LINEAR

Model = TypeVar("Model", bound=nn.Module)
_OWN_NAMES = {GATE: GATE, UP: UP, DOWN: DOWN}
_PROJECTIONS = {"gate_up_proj", UP, DOWN}
_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated")
_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def linearize(model: Model) -> Model:
    """Give every expert its projections as one `nn.Linear` each, in place, layer by layer.

    For tools that see nothing else (GPTQ, AWQ, adapters on linears). Outputs stay what they are, and it trains and
    saves; `stack` is the way back. The linears hold views of the stacked tensors, so no memory is needed, but for one
    layer where the tensors lie otherwise (gpt-oss).

    Args:
        model: A converted model, or one of transformers with experts of its own, as a whole.

    Returns:
        The same model.

    Raises:
        RefusedError: There are no stacked experts, or they are sharded or quantized.
    """
    check_model(model)
    found = {path: module for path, module in model.named_modules() if is_stacked(module)}
    if not found:
        raise RefusedError(f"{type(model).__name__} has no stacked experts: convert it first, or it is linear already")
    for path, module in found.items():
        _check(path, module)
    _mark(model, True)
    rules = conversions(model) if isinstance(model, PreTrainedModel) else []
    names = _stored_names(rules)
    converters: list[WeightTransform] = []
    for path, module in found.items():
        own = isinstance(module, Experts) or not _fits(names, module)
        if own and not isinstance(module, Experts):
            converters.extend(to_save(path, module, rules))
        put(model, module, LinearExperts(module, _OWN_NAMES if own else names))
    if converters and isinstance(model, PreTrainedModel):
        untyped: Any = model
        untyped._weight_conversions = [*rules, *converters]
    return model


def stack(model: Model) -> Model:
    """Stack the experts again that `linearize` took apart, in place, layer by layer, with the weights they have now.

    Args:
        model: The model.

    Returns:
        The same model.

    Raises:
        RefusedError: Nothing is linear, or a projection is no `nn.Linear` any more.
    """
    check_model(model)
    found = {path: module for path, module in model.named_modules() if isinstance(module, LinearExperts)}
    if not found:
        raise RefusedError(f"{type(model).__name__} has no linear experts: there is nothing to stack")
    for path, module in found.items():
        module.check(path)
    _mark(model, False)
    for module in found.values():
        put(model, module, module.restack())
    if isinstance(model, PreTrainedModel) and getattr(model, "_weight_conversions", None) is not None:
        untyped: Any = model
        untyped._weight_conversions = [rule for rule in conversions(model) if not isinstance(rule, SaveStacked)]
    return model


def is_stacked(module: Any) -> bool:
    """Return whether a module is of transformers' experts interface and has its weights in stacked tensors only."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    names = {name.removesuffix("_bias") for name, _ in module.named_parameters(recurse=False)}
    return DOWN in names and names <= _PROJECTIONS and not list(module.named_buffers(recurse=False))


def _check(path: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter.data, DTensor):
            raise RefusedError(f"{path}.{name} is sharded: linearize the model before it is parallelized")
        if type(parameter.data) is not torch.Tensor or parameter.dtype not in _FLOATS:
            raise RefusedError(f"{path}.{name} is quantized ({parameter.dtype}): linearize the model, then quantize it")


def _mark(model: nn.Module, linear: bool) -> None:
    """Say in the config of a converted model in which form its experts are, so that it is loaded in that form.

    Raises:
        RefusedError: The model is a part of one whose config would have to say it.
    """
    config = getattr(model, "config", None)
    entry = getattr(config, FIELD, None)
    if isinstance(entry, dict):
        setattr(
            config, FIELD, {**{k: v for k, v in entry.items() if k != LINEAR}, **({LINEAR: True} if linear else {})}
        )
    elif isinstance(model, PreTrainedModel) and any(isinstance(module, Experts) for module in _experts_of(model)):
        raise RefusedError(f"this {type(model).__name__} is a part of a converted model: give the whole model")


def _fits(names: dict[str, str], module: Any) -> bool:
    """Return whether checkpoints have a name for each of a module's projections; they have none for biases."""
    wanted = {GATE, UP, DOWN} if module.has_gate else {UP, DOWN}
    return wanted <= names.keys() and not any(
        name.endswith("_bias") for name, _ in module.named_parameters(recurse=False)
    )


def _experts_of(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        yield module.stacked if isinstance(module, LinearExperts) else module


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever it is."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _stored_names(rules: list[Any]) -> dict[str, str]:
    """Return the names of the projections in checkpoints with these rules, if they have a tensor for each expert."""
    names: dict[str, str] = {}
    for rule in rules:
        stored = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in rule._original_source_patterns]
        target = rule._original_target_patterns[0].rpartition(".")[2]
        keys = {"gate_up_proj": (GATE, UP), UP: (UP,), DOWN: (DOWN,)}.get(target, ())
        if not isinstance(rule, WeightConverter) or not all(stored) or len(stored) != len(keys):
            continue
        if all(type(each) in {MergeModulelist, Concatenate} for each in rule.operations):
            names |= {key: match[1] for key, match in zip(keys, stored, strict=True) if match}
    return names


def conversions(model: PreTrainedModel) -> list[Any]:
    """Return the rules by which transformers would save the model."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    return [
        rule for rule in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(rule, PrefixChange)
    ]
