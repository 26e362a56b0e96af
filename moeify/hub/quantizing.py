"""Experts with quantized weights: of a live model, while a checkpoint is loaded, and of a checkpoint that holds them.

To transformers it is a quantization of its own, under the name `moeify_experts`: the rest of the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeify.arguments import check_model
from moeify.checkpoint.quantized.schemes import QUANTIZED_EXPERTS
from moeify.contract.linearize import conversions, is_stacked, put
from moeify.contract.stock_experts import activation_name
from moeify.errors import CheckpointError, ConfigError, RefusedError
from moeify.kernels.quantized import FORMATS, quantize
from moeify.layers import Experts
from moeify.layers.quantized_experts import SCALE, QuantizedExperts
from moeify.plan import ASK_FOR_MOEIFY

Model = TypeVar("Model", bound=nn.Module)


def quantize_experts(model: Model, form: str) -> Model:
    """Quantize the weights of all experts, in place, layer by layer; for inference.

    The rest of the model stays as it is. It computes, generates and saves as before, and `moeify.load` reads what
    `save_pretrained` writes; it cannot be trained any more.

    Args:
        model: A converted model, or one of transformers with stacked experts.
        form: "fp8": e4m3, a scale for each block of 128 by 128; tokens are rounded to e4m3 too. "int4": a scale for
            each row and 128 columns.

    Returns:
        The same model.

    Raises:
        ConfigError: There is no such format.
        RefusedError: There are no stacked experts, or there are some that the format cannot hold.
    """
    check_model(model)
    config = QuantizedExpertsConfig(form)
    _replace(model, config)
    if isinstance(model, PreTrainedModel):
        untyped: Any = model
        untyped.hf_quantizer = _Quantizer(config)
        untyped.is_quantized, untyped.quantization_method = True, QUANTIZED_EXPERTS
        untyped._weight_conversions = conversions(model)
        untyped.hf_quantizer.postprocess_model(model)
    return model


class QuantizedExpertsConfig(QuantizationConfigMixin):
    """What a `config.json` says of quantized experts, and a `quantization_config` asks of `from_pretrained`.

    Args:
        form: "fp8" or "int4".

    Raises:
        ConfigError: There is no such format.
    """

    def __init__(self, form: str, **_: object) -> None:
        if form not in FORMATS:
            raise ConfigError(f"there is no format {form!r:.40} of quantized experts: expected {' or '.join(FORMATS)}")
        self.quant_method: Any = QUANTIZED_EXPERTS
        self.form = form


class _Quantizer(HfQuantizer):
    """What transformers asks about the quantization while it loads and saves a model."""

    is_trainable = False
    quantization_config: Any

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        dtype = model.dtype
        _replace(model, self.quantization_config)
        for module in model.modules() if not self.pre_quantized else ():
            if isinstance(module, QuantizedExperts):  # transformers 5.17 casts what it reads to what it finds here
                for name, weight in zip((module.up_name, "down_proj"), module.weights, strict=True):
                    shape = (module.num_experts, weight.rows, weight.columns)
                    module._buffers[name] = torch.empty(shape, dtype=dtype, device="meta")
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        for path, module in model.named_modules():
            if isinstance(module, QuantizedExperts):
                _check_loaded(path, module)
        untyped: Any = model
        untyped._weight_conversions = _others(untyped._weight_conversions)
        untyped.config.experts_implementation = ASK_FOR_MOEIFY  # so that no transformers loads it without this library
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: object) -> list[Any]:
        """Return the rules by which transformers loads the model: the scales of experts are stacked as weights are."""
        rules = [rule for rule in weight_conversions if rule not in _others(weight_conversions)]
        return weight_conversions + [_of_scales(rule) for rule in rules if self.pre_quantized]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Return whether a file holds a tensor of the model whole, or with scales that a new module does not expect."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedExperts) and not name.endswith("_bias")

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a tensor."""
        return _Quantize(self.quantization_config.form)


class _Quantize(ConversionOps):
    """A stacked weight as numbers and scales."""

    def __init__(self, form: str) -> None:
        self.form = form

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        ((name, found),) = input_dict.items()
        weight = quantize(found[0] if isinstance(found, list) else found, self.form)
        return {name: weight.values, name + SCALE: weight.scales}


def offer_quantization() -> None:
    """Add the quantization to those that transformers knows by name."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANTIZED_EXPERTS] = QuantizedExpertsConfig
    AUTO_QUANTIZER_MAPPING[QUANTIZED_EXPERTS] = _Quantizer


def _replace(model: nn.Module, config: Any) -> None:
    """Put quantized experts in the place of all stacked ones, after all checks."""
    found = {path: module for path, module in model.named_modules() if is_stacked(module)}
    if not found:
        raise RefusedError(
            f"{type(model).__name__} has no stacked experts: convert it first, or call moeify.stack if it is linear"
        )
    names = {path: _check(path, module, config.form) for path, module in found.items()}
    for path, module in found.items():
        put(model, module, QuantizedExperts(module, config.form, names[path]))


def _check(path: str, module: Any, form: str) -> str:
    """Return the name of a module's activation.

    Raises:
        RefusedError: It cannot be quantized.
    """
    parameters: Mapping[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        if isinstance(parameter.data, DTensor):
            raise RefusedError(f"{path}.{name} is sharded: quantize the model before it is parallelized")
        if not name.endswith("_bias") and (parameter.dim() != 3 or not parameter.is_floating_point()):
            raise RefusedError(f"{path}.{name} is {parameter.dtype} of shape {list(parameter.shape)}: it is quantized")
        if form == "int4" and not name.endswith("_bias") and parameter.shape[-1] % 2:
            raise RefusedError(
                f"{path}.{name} has {parameter.shape[-1]} columns, and int4 packs two in a byte: quantize to 'fp8'"
            )
    activation = _activation(module)
    if activation is None or module.is_transposed:
        raise RefusedError(
            f"{path}: {type(module).__name__} computes what the kernels of quantized experts do not: leave it as it is"
        )
    return activation


def _check_loaded(path: str, module: QuantizedExperts) -> None:
    """Check what a file gave.

    Raises:
        CheckpointError: It does not fit the model.
    """
    hidden, intermediate = module.hidden_dim, module.intermediate_dim
    for name, weight in zip((module.up_name, "down_proj"), module.weights, strict=True):
        rows, columns = (
            (hidden, intermediate) if name == "down_proj" else (intermediate * (1 + module.has_gate), hidden)
        )
        found = (len(weight.values), weight.rows, weight.columns)
        if (
            found != (module.num_experts, rows, columns)
            or len(weight.scales) != len(weight.values)
            or 0 in weight.block
        ):
            raise CheckpointError(
                f"{path}.{name} has shape {list(found)} and scales {list(weight.scales.shape)}, expected "
                f"{[module.num_experts, rows, columns]} in {module.form}: download it again"
            )


def _activation(module: Any) -> str | None:
    if not isinstance(module, Experts):
        return activation_name(module)
    return module.activation if module.region is None else None


def _of_scales(rule: WeightConverter) -> WeightConverter:
    """Return the rule that stacks the scales of what a rule stacks."""
    sources, targets = (
        [name + SCALE for name in names] for names in (rule._original_source_patterns, rule._original_target_patterns)
    )
    return WeightConverter(sources, targets, list(rule.operations))


def _others(rules: list[Any]) -> list[Any]:
    """Return those of transformers' rules that make no stacked experts."""
    stacked = tuple(name + end for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", SCALE))
    return [
        rule
        for rule in rules
        if not (isinstance(rule, WeightConverter) and rule._original_target_patterns[0].endswith(stacked))
    ]
