"""LoRA adapters as PEFT saves them: a folder that changes some weights of a base model, merged as they are read.

A weight becomes W + s·B·A, with s = lora_alpha / r, or lora_alpha / √r with use_rslora; r is the number of A's rows
(PEFT's `get_delta_weight`). A weight that is stored transposed (GPT-2) gets the transpose. What was trained whole
(modules_to_save, biases) takes the place of the base's tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.checkpoint.derived import Computed, DerivedFiles, Stored
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError
from moeify.files.json_text import JsonObject, read_json_object
from moeify.files.limits import CONFIG_BYTES

if TYPE_CHECKING:
    import torch

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_INSTEAD = "load it on its base model with PEFT, merge_and_unload() it, save_pretrained() that, and give its folder"
# Fields that say how it was trained, or that are read here; any other one that is set changes what is computed.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_KEEPS_BASE = {True, False, None, "gaussian", "eva", "orthogonal"}  # starts that leave the base model as it is
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?"
    r"|(?:base_layer\.|modules_to_save\.)?(?P<whole>weight|bias))"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's config, checked.

    Attributes:
        folder: Where it lies.
        base: The folder or hub id of the model that it changes.
        revision: Of a hub id.
        settings: The contents of its config.
    """

    folder: Path
    base: str
    revision: str | None
    settings: JsonObject


def read_adapter(folder: Path) -> Adapter:
    """Read the config of an adapter.

    Raises:
        CheckpointError: It is damaged, or no plain LoRA, which alone is merged here.
    """
    settings = read_json_object(folder / ADAPTER, CONFIG_BYTES)
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    odd = [name for name, value in settings.items() if value and name not in _KNOWN]
    if kind != "LORA":
        odd = [f"peft_type = {kind!r:.40}"]
    elif not isinstance(start, str | bool | None) or start not in _KEEPS_BASE:
        odd = [f"init_lora_weights = {start!r:.40}"]
    if odd:
        raise CheckpointError(f"{folder} is an adapter ({ADAPTER}) with {odd[0]}, which is not merged here: {_INSTEAD}")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{folder} is an adapter, and its {ADAPTER} names no base_model_name_or_path: {_INSTEAD}")
    alpha, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    numbers = [alpha, *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise CheckpointError(f"{folder / ADAPTER} has lora_alpha and alpha_pattern {numbers}, expected numbers")
    if plain := next((key for key in pattern if not re.fullmatch(r"\^?[\w.]+", key)), None):
        raise CheckpointError(f"{folder} has alpha_pattern for {plain!r:.60}, a pattern that is not read: {_INSTEAD}")
    return Adapter(folder, base, revision if isinstance(revision, str) else None, settings)


def merged(adapter: Adapter, stored: Stored, base: Stored) -> DerivedFiles:
    """Return the tensors of the base model with an adapter in them.

    Args:
        adapter: The adapter.
        stored: Its tensors.
        base: Those of the base model.

    Raises:
        CheckpointError: They do not fit each other.
    """
    changes: dict[str, dict[str, str]] = {}
    for key in stored.tensors:
        if ".original_module." in key:  # what was trained whole is beside it, and is used
            continue
        found = _KEY.fullmatch(key)
        if found is None:
            raise CheckpointError(f"{adapter.folder} holds {key}, which is not merged here: {_INSTEAD}")
        name = f"{found['module']}.{found['whole'] or 'weight'}"
        place = _place(name, base.tensors)
        if place is None:
            raise CheckpointError(
                f"{adapter.folder} changes {name}, and its base model {adapter.base} holds no such tensor: {_INSTEAD}"
            )
        changes.setdefault(place, {})[found["part"] or "whole"] = key
    return DerivedFiles(base, _computed(adapter, stored, base, changes), stored)


def _place(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return a tensor's name on disk, where the model may lack its outer name (GPT-2) or have one more."""
    inner = name.partition(".")[2]
    outer = [each for each in tensors if each.endswith(f".{name}")]
    return next((each for each in (name, inner) if each in tensors), outer[0] if len(outer) == 1 else None)


def _computed(
    adapter: Adapter, stored: Stored, base: Stored, changes: Mapping[str, Mapping[str, str]]
) -> Iterator[Computed]:
    for name, keys in changes.items():
        info, read = base.tensors[name], partial(base.read, name)
        if "whole" in keys:
            read = partial(stored.read, keys["whole"])
            found = stored.tensors[keys["whole"]]
            info = TensorInfo(name, info.dtype, found.shape)
        compute: Callable[[], torch.Tensor] = read
        if "A" in keys or "B" in keys:
            compute = partial(_changed, read, *_factors(adapter, stored, info, keys))
        yield Computed(info, (name,), compute)


def _factors(
    adapter: Adapter, stored: Stored, info: TensorInfo, keys: Mapping[str, str]
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], float, bool]:
    """Return how to read B and A, their scale, and whether their product is transposed."""
    shapes = [stored.tensors[keys[part]].shape if part in keys else () for part in "BA"]
    match shapes:
        case [(out, rank), (inner, into)] if rank == inner > 0 and sorted(info.shape) == sorted((out, into)):
            product = (out, into)
        case _:
            raise CheckpointError(
                f"{adapter.folder} has lora_B and lora_A of shapes {list(map(list, shapes))} for {info.name} "
                f"{list(info.shape)}: adapter and base model do not belong together"
            )
    settings, module = adapter.settings, info.name.rpartition(".")[0]
    embedding = "lora_embedding_" in keys["A"]
    square = info.shape[0] == info.shape[1]
    turned = bool(settings.get("fan_in_fan_out")) or embedding if square else product != info.shape
    alpha = next(
        (value for key, value in (settings.get("alpha_pattern") or {}).items() if _is_for(key, module)),
        settings["lora_alpha"],
    )
    scale = alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
    return partial(stored.read, keys["B"]), partial(stored.read, keys["A"]), float(scale), turned


def _is_for(pattern: str, module: str) -> bool:
    return module == pattern[1:] if pattern.startswith("^") else f".{module}".endswith(f".{pattern}")


def _changed(
    read: Callable[[], torch.Tensor],
    read_b: Callable[[], torch.Tensor],
    read_a: Callable[[], torch.Tensor],
    scale: float,
    turned: bool,
) -> torch.Tensor:
    product = read_b().float() @ read_a().float()
    return read().float().add_(product.t() if turned else product, alpha=scale)
