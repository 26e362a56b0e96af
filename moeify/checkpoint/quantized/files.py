"""Quantized checkpoints, read as if they were not: each weight is computed when it is read, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

from moeify.checkpoint.derived import Computed, DerivedFiles, Stored
from moeify.checkpoint.quantized.base import Parts, Weight
from moeify.checkpoint.quantized.schemes import FIELDS, MODULES, entry_of, scheme_of
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError
from moeify.files.json_text import JsonObject

_NAME = re.compile(r"(.*?)\.(weight\..+|[^.]+)")  # a module, and what a tensor is in it
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def dequantized(stored: Stored, config: JsonObject, folder: Path) -> tuple[DerivedFiles, JsonObject]:
    """Return the tensors and the config of a quantized checkpoint without its quantization.

    Weights have the dtype that the config names, as transformers dequantizes them; float32 if it names none. What
    quantizes activations is left out.

    Args:
        stored: What is stored.
        config: Its config, with the quantization_config.
        folder: Where it lies, for messages.

    Raises:
        CheckpointError: The tensors of a module do not fit together, or none is quantized.
    """
    settings = entry_of(config)
    module = import_module(f"{__package__}.{MODULES[scheme_of(settings)]}")
    found = list(_weights(stored, module.find_weight, settings, _dtype(config), folder))
    if not found:
        raise CheckpointError(
            f"{folder} has the quantization {scheme_of(settings)} in config.json, and no tensor that is stored so: "
            "the weights are of another checkpoint, or in a form that is not known here; dequantize it first"
        )
    plain = {name: value for name, value in config.items() if name not in FIELDS}
    return DerivedFiles(stored, found), plain


def _weights(
    stored: Stored,
    find_weight: Callable[[Parts], Weight | None],
    settings: Mapping[str, object],
    dtype: str,
    folder: Path,
) -> Iterator[Computed]:
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.tensors.items():
        if found := _NAME.fullmatch(name):
            modules.setdefault(found[1], {})[found[2]] = info
    for path, infos in modules.items():
        parts = Parts(infos, lambda name, path=path: stored.read(f"{path}.{name}"), settings)  # type: ignore[misc]
        try:
            weight = find_weight(parts)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: {path} cannot be dequantized ({error}): download it again") from error
        if weight is not None:
            names = tuple(f"{path}.{name}" for name in weight.replaces)
            yield Computed(TensorInfo(f"{path}.weight", dtype, weight.shape), names, weight.compute)


def _dtype(config: Mapping[str, object]) -> str:
    text = config.get("text_config")
    inside = cast("JsonObject", text) if isinstance(text, dict) else {}
    named = (entry.get(field) for entry in (config, inside) for field in ("dtype", "torch_dtype"))
    return next((_FLOATS[name] for name in named if isinstance(name, str) and name in _FLOATS), "F32")
