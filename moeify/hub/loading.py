"""Loading checkpoints through transformers, but strictly: every tensor must have its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from torch.overrides import TorchFunctionMode

from moeify.checkpoint.quantized.schemes import entry_of
from moeify.checkpoint.source import Accepted, Source, open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.errors import CheckpointError, ConfigError
from moeify.files.json_text import JsonObject
from moeify.hub.quantizing import QuantizedExpertsConfig
from moeify.hub.registration import register
from moeify.hub.stored import Absent, present
from moeify.plan import FIELD, LINEAR, Plan, stored_plan
from moeify.pretrained import load_generation_config, load_model
from moeify.tracing.skeleton import config_of, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OF_SOURCES = ("revision", "allow_pickle", "trust_remote_code", "dequantize")


def load(
    path: str | Path, *, linear: bool | None = None, quantize_experts: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint: dense, native MoE or in moeify format; every tensor must have its place.

    Args:
        path: A model folder, a GGUF file, or a hub id, which is looked for in the hub's cache and then downloaded.
        linear: Of a converted model: whether its experts are to be linears (`moeify.linearize`) or stacked, however
            they are stored; None for the form in which it was saved.
        quantize_experts: "fp8" or "int4": quantize the experts as `moeify.quantize_experts` does, each stacked tensor
            when it is read, so that no more than one is whole. Those of a quantized checkpoint are taken as they are
            stored, if they are in this form, and the rest of it in full size; with `dequantize`, they are quantized
            anew.
        kwargs: For `from_pretrained` (`dtype`, `device_map`, `revision`, `distributed_config`, …). `allow_pickle=True`
            accepts pickles, read with weights_only; `trust_remote_code=True` a config that names code of its own, which
            is not run; `dequantize=True` quantized weights, in full size.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape, where transformers would only log it; or
            there is no such model.
        ConfigError: A form is asked for of a model that moeify has not converted, or there is no such format.
        RefusedError: There are no experts to quantize, or the format cannot hold them.
    """
    trust = {name: kwargs.pop(name) for name in _OF_SOURCES if name in kwargs}
    asked = None if quantize_experts is None else QuantizedExpertsConfig(quantize_experts)
    with open_source(path, **trust, quantized_experts=quantize_experts or "") as source:
        if asked is not None and not entry_of(source.config):
            kwargs["quantization_config"] = asked
        config = source.config if linear is None else _in_form(source, linear)
        if source.computed:  # torch's reader would leave what no file holds as it finds it
            return _load_present(source, config, **kwargs)
        cls = model_class(source.config)
    if linear is not None:
        kwargs[FIELD] = config[FIELD]
    return load_strictly(cls, source.path, **kwargs)


def _in_form(source: Source, linear: bool) -> JsonObject:
    """Return the config of a converted model with its experts as linears, or stacked."""
    entry = source.config.get(FIELD)
    if not isinstance(entry, dict):
        raise ConfigError(f"{source.path} holds no converted model: leave out linear, and call moeify.linearize(model)")
    return {**source.config, FIELD: {**entry, LINEAR: linear}}


def load_whole(source: Source, *, unused: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a GGUF file, which transformers reads by its own means, or pickles.

    Args:
        source: The opened checkpoint.
        unused: Let tensors through that the model has no place for.
        kwargs: For `from_pretrained`; float32 unless they say otherwise.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    if source.path.suffix == ".gguf":
        return load(source.path, **{"dtype": torch.float32, **kwargs})
    return load_first_layers(source, None, unused=unused, **kwargs)


def load_sparingly(path: Path, dtype: torch.dtype, **accepted: Unpack[Accepted]) -> PreTrainedModel:
    """Load a checkpoint in the memory of its weights: `load` maps whole files, so what is merged is there twice.

    Args:
        path: A folder or a GGUF file.
        dtype: Of its weights in memory.
        accepted: As for `open_source`.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    with open_source(path, **accepted) as source:
        if not present(source, source.tensors):
            return load_whole(source, dtype=dtype)
        return _load_present(source, source.config, dtype=dtype)


def _load_present(source: Source, config: JsonObject, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint whose tensors are read one at a time."""
    load_structure(source)  # before memory is taken for what may be missing
    made, dtypes = config_of(config), (torch_dtype(info.dtype) for info in source.tensors.values())
    own = made.dtype or next(
        (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32
    )
    given = {"config": made, "state_dict": present(source, source.tensors), "dtype": own, **kwargs}
    model = load_strictly(model_class(source.config), None, **given)
    load_generation_config(model, source.path)
    return model


def load_structure(source: Source, *, unused: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a model whose weights are on the meta device; transformers renames and merges them as ever.

    Args:
        source: The opened checkpoint; no tensor is read.
        unused: Let tensors through that the model has no place for.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape or kind.
    """
    cls, tensors = model_class(source.config), {name: Absent(info) for name, info in source.tensors.items()}
    options = {"config": config_of(source.config), "state_dict": tensors, "dtype": torch.float32, **kwargs}
    with _WithoutValues():
        return load_strictly(cls, None, unused=unused, **options)


class _WithoutValues(TorchFunctionMode):
    """Makes what transformers gives to missing tensors empty, too: a damaged config may ask for any size."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty_like else {})})


@dataclass(frozen=True)
class FirstLayers:
    """The first layers of a stack.

    Attributes:
        stack: What stands before the number in the names of its tensors, such as `model.layers.`.
        count: How many layers.
    """

    stack: str
    count: int

    def keeps(self, name: str) -> bool:
        """Return whether a tensor or module is outside the stack or in one of its first layers."""
        number = name.removeprefix(self.stack).split(".")[0]
        return not (name.startswith(self.stack) and number.isdigit() and int(number) >= self.count)


def load_first_layers(
    source: Source,
    layers: FirstLayers | None,
    *,
    unused: bool = False,
    beside: PreTrainedModel | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the first layers of a checkpoint in float32, with everything before and after the stack.

    Args:
        source: The opened checkpoint.
        layers: The layers to keep; None loads all.
        unused: Let tensors through that the model has no place for.
        beside: A model in float32 that is compared with this one: of tensors that are equal there is only one.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    cls, config = model_class(source.config), config_of(source.config)
    if layers is not None:
        _keep_first_layers(config, layers)
    there = {} if beside is None else beside.state_dict()
    kept = [name for name in source.tensors if layers is None or layers.keeps(name)]
    later = present(source, [name for name in kept if name not in there])
    tensors = {name: later.get(name) or _same(source.read(name), there.get(name)) for name in kept}
    given = {"config": config, "state_dict": tensors, "dtype": torch.float32, **kwargs}
    return load_strictly(cls, None, unused=unused, **given)


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """Return the other tensor if it is equal."""
    is_equal = other is not None and tensor.shape == other.shape and torch.equal(tensor.to(other.dtype), other)
    return tensor if other is None or not is_equal else other


def _keep_first_layers(config: PreTrainedConfig, layers: FirstLayers) -> None:
    """Make a config describe its first layers only."""
    fields = config.to_dict()
    depth, count = config.num_hidden_layers, layers.count
    changed: dict[str, object] = {
        name: value[:count] for name, value in fields.items() if isinstance(value, list) and len(value) == depth
    }
    changed["num_hidden_layers"] = count
    if fields.get("mlp_only_layers"):  # numbers of layers, not one entry per layer
        changed["mlp_only_layers"] = [number for number in fields["mlp_only_layers"] if number < count]
    if (entry := stored_plan(fields)) is not None:
        plan = Plan.from_dict(entry).renamed(lambda path: path if layers.keeps(path) else None)
        changed[FIELD] = {**fields[FIELD], "plan": plan.to_dict()}
    for name, value in changed.items():
        setattr(config, name, value)


def load_strictly(
    cls: type[PreTrainedModel], path: Path | None, *, unused: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a model in evaluation mode.

    Args:
        cls: The model's class.
        path: A folder or a GGUF file; None when `kwargs` hold the config and the tensors.
        unused: Let tensors through that the model has no place for.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = load_model(cls, path, **kwargs)
    for kind in ("missing", "mismatched", *(() if unused else ("unexpected",))):
        if found := sorted(map(_described, info.get(f"{kind}_keys") or ())):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            where = f"{path}: " if path else ""
            raise CheckpointError(f"{where}{kind} tensor {found[0]}{more} for {cls.__name__}")
    module: torch.nn.Module = model
    return cast("PreTrainedModel", module.eval())


def _described(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """Return a tensor's name, with its shapes where these differ."""
    if isinstance(key, str):
        return key
    name, found, expected = key
    return f"{name} ({list(found)} instead of {list(expected)})"
