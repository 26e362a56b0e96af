"""Quantized checkpoints, read as if they were not: each weight is computed when it is read, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import cast

from moeify.checkpoint.derived import Computed, DerivedFiles, Stored
from moeify.checkpoint.quantized.base import Parts, Weight
from moeify.checkpoint.quantized.schemes import FIELDS, MODULES, QUANTIZED_EXPERTS, entry_of, scheme_of
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError
from moeify.files.json_text import JsonObject

_NAME = re.compile(r"(.*?)\.(weight\..+|[^.]+)")  # a module, and what a tensor is in it
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def dequantized(
    stored: Stored, config: JsonObject, folder: Path, form: str | None = None
) -> tuple[DerivedFiles, JsonObject]:
    """Return the tensors and the config of a quantized checkpoint without its quantization.

    Weights have the dtype that the config names, as transformers dequantizes them; float32 if it names none. What
    quantizes activations is left out.

    Args:
        stored: What is stored.
        config: Its config, with the quantization_config.
        folder: Where it lies, for messages.
        form: In which experts stay as they are, "fp8" or "int4", as those of `moeify.quantize_experts` are stored; None
            for none.

    Raises:
        CheckpointError: The tensors of a module do not fit together, none is quantized, or an expert is in another
            form.
    """
    settings = entry_of(config)
    module = import_module(f"{__package__}.{MODULES[scheme_of(settings)]}")
    found = list(_weights(stored, module.find_weight, settings, _dtype(config), folder, form))
    if not found:
        raise CheckpointError(
            f"{folder} has the quantization {scheme_of(settings)} in config.json, and no tensor that is stored so: "
            "the weights are of another checkpoint, or in a form that is not known here; dequantize it first"
        )
    plain = {name: value for name, value in config.items() if name not in FIELDS}
    if form is not None:
        plain[FIELDS[0]] = {"quant_method": QUANTIZED_EXPERTS, "form": form}
    return DerivedFiles(stored, found), plain


def _weights(
    stored: Stored,
    find_weight: Callable[[Parts], Weight | None],
    settings: Mapping[str, object],
    dtype: str,
    folder: Path,
    form: str | None,
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
        if weight is not None and form is not None and _EXPERT.search(path):
            yield from _as_stored(path, weight, form, folder)
        elif weight is not None:
            names = tuple(f"{path}.{name}" for name in weight.replaces)
            yield Computed(TensorInfo(f"{path}.weight", dtype, weight.shape), names, weight.compute)


def _as_stored(path: str, weight: Weight, form: str, folder: Path) -> Iterator[Computed]:
    """Return the numbers and the scales of an expert's weight, in the form that the kernels take."""
    numbers = weight.numbers
    if numbers is None or numbers.form != form:
        raise CheckpointError(
            f"{folder}: {path} is not stored as the kernels take {form}: pass dequantize=True too, to quantize it anew"
        )
    rows, columns = weight.shape
    values = TensorInfo(
        f"{path}.weight", *(("U8", (rows, columns // 2)) if form == "int4" else ("F8_E4M3", weight.shape))
    )
    first, *others = (f"{path}.{name}" for name in weight.replaces)
    yield Computed(values, (first,), numbers.values)
    yield Computed(TensorInfo(f"{path}.weight_scale", "F32", numbers.scale_shape), tuple(others), numbers.scales)


def _dtype(config: Mapping[str, object]) -> str:
    text = config.get("text_config")
    inside = cast("JsonObject", text) if isinstance(text, dict) else {}
    named = (entry.get(field) for entry in (config, inside) for field in ("dtype", "torch_dtype"))
    return next((_FLOATS[name] for name in named if isinstance(name, str) and name in _FLOATS), "F32")
