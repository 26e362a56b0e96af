"""What a replacement in a live model would silently lose or break: refused, with names, before anything is changed."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor, nn

from moeify.arguments import check_model
from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.plan import Plan, Site

# Whoever holds parameters or compiled code of the model inside would go on using the dense FFNs.
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_ADAPTED = {"PeftModel", "BaseTunerLayer"}  # of PEFT
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
          "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_WEIGHTS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def check_convertible(model: nn.Module) -> None:
    """Refuse a model that is wrapped, adapted, converted already, quantized or offloaded, before it is traced.

    Raises:
        RefusedError: It is.
        ConfigError: It is no model.
    """
    check_model(model)
    for path, module in model.named_modules():
        where = path or type(model).__name__
        kinds = {kind.__name__ for kind in type(module).__mro__}
        wrapper = next((name for name in _WRAPPERS if name in kinds), None)
        if wrapper:
            raise RefusedError(f"{where} is wrapped ({wrapper}): convert the model inside, then wrap it")
        if isinstance(module, MoELayer):
            raise RefusedError(f"{where} is converted already: convert the dense model, with all layers at once")
        if kinds & _ADAPTED:
            raise RefusedError(
                f"{where} has adapters of PEFT: merge the adapters first (model.merge_and_unload()), and convert that"
            )
        if hasattr(module, "_hf_hook"):
            raise RefusedError(
                f"{where} is moved between devices by accelerate: load the model without offloading and convert it then"
            )
    scheme = _quantization(getattr(model, "config", None))
    if scheme:
        raise RefusedError(f"the model is quantized ({scheme}): convert it unquantized, then quantize")


def _quantization(config: object) -> str | None:
    """Return the scheme by which a transformers model is quantized, if it is."""
    text = getattr(config, "get_text_config", lambda: None)()
    entry = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not entry:
        return None
    scheme = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return str(getattr(scheme, "value", scheme))


def check_replaceable(model: nn.Module, plan: Plan) -> None:
    """Refuse hooks, shared parameters, and weights that are not one plain floating-point dtype.

    Raises:
        RefusedError: One of them is in the way.
    """
    empty = all(parameter.is_meta for parameter in model.parameters())
    for site in plan.sites:
        _check_hooks(model, site)
        _check_weights(model, site, empty)
    _check_ties(model, plan)


def _check_hooks(model: nn.Module, site: Site) -> None:
    for path in (site.path, *site.bypassed):
        for inner in model.get_submodule(path).modules():
            if not all(_is_left_over(hook) for hooks in _HOOKS for hook in getattr(inner, hooks).values()):
                raise RefusedError(f"{path} has hooks, which would be lost: remove them, convert, register again")
    for name in site.parameters:
        if any(getattr(model.get_parameter(name), hooks) for hooks in _PARAMETER_HOOKS):
            raise RefusedError(f"{name} has hooks, which would be lost: remove them, convert, register again")


def _is_left_over(hook: object) -> bool:
    """Whether torch left a hook behind that renames what older checkpoints hold, when it folded a weight in."""
    return str(getattr(getattr(hook, "hook", None), "__module__", "")).startswith("torch.nn.utils.")


def _check_weights(model: nn.Module, site: Site, empty: bool) -> None:
    weights = {name: model.get_parameter(name) for name in site.parameters}
    for name, weight in weights.items():
        if type(weight.data) is not Tensor:
            kind = type(weight.data).__name__
            raise RefusedError(f"{name} is a {kind}: convert the model before it is sharded or quantized")
        if weight.dtype not in _WEIGHTS:
            raise RefusedError(f"{name} holds {weight.dtype}: convert the model unquantized, then quantize")
        if weight.is_meta and not empty:
            raise RefusedError(f"{name} has no values (it is on the meta device): load the whole model, then convert")
    (first, one), *others = weights.items()
    for name, weight in others:
        if weight.dtype != one.dtype or weight.device != one.device:
            pair = f"{one.dtype} on {one.device} and {name} {weight.dtype} on {weight.device}"
            raise RefusedError(f"{first} is {pair}: bring them to one dtype and device (`model.to`), then convert")


def _check_ties(model: nn.Module, plan: Plan) -> None:
    names = _names_by_memory(model)
    claimed: dict[str, str] = {}
    for site in plan.sites:
        for dense in site.reads:
            parameter = attrgetter(dense)(model)
            if not isinstance(parameter, nn.Parameter):
                continue
            outside = (name for name in names[_memory(parameter)] if not _is_inside(name, site))
            other = claimed.get(dense) or next(outside, None)
            if other and (dense in site.parameters or other != dense):
                raise RefusedError(f"{dense} is tied to {other}: converting it would tear the tie apart")
            claimed[dense] = f"what {site.path} computes"


def _names_by_memory(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # each module once, under the path that its parameters are named by
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(_memory(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    return names


def _memory(parameter: Tensor) -> int:
    """Return what tells whether two parameters are one: where their values lie, or, without values, which object."""
    return parameter.data_ptr() if type(parameter.data) is Tensor and parameter.data_ptr() else id(parameter)


def _is_inside(name: str, site: Site) -> bool:
    """Return whether a parameter's name lies in what a site replaces."""
    return any(name.startswith(f"{path}.") for path in (site.path, *site.bypassed))
