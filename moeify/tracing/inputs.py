"""Guesses of example inputs, from a transformers model's configuration or from the first weight of a model's part.

Everything is on the meta device: only shapes and dtypes matter. The best guess comes first; the caller takes the first
one that the forward accepts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from moeify.errors import MoeifyError

BATCH, TOKENS, SIDE, SAMPLES = 2, 8, 224, 4000
ADVICE = "pass example_inputs (inspect and convert: --example-inputs FILE)"
_COMPANIONS = ("input_ids", "pixel_values", "input_features", "decoder_input_ids", "input_features_mask", "bbox")


def candidate_inputs(model: nn.Module) -> Iterator[dict[str, object]]:
    """Yield keyword arguments that a transformers model's forward may accept, best first.

    Raises:
        MoeifyError: The model is not from transformers, or its main input is of an unknown kind.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    shapes = [] if config is None or not isinstance(name, str) else list(_tensors(name, config))
    if not shapes:
        arguments = ", ".join(inspect.signature(model.forward).parameters)
        raise MoeifyError(
            f"the inputs of {type(model).__name__} cannot be guessed: its forward takes ({arguments}); {ADVICE}"
        )
    accepted = inspect.signature(model.forward).parameters
    always: dict[str, object] = {"use_cache": False} if "use_cache" in accepted else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        always["decoder_input_ids"] = _token_ids()
    for other in set(_required(model)) - {name}:
        always |= dict(zip([other], _tensors(other, config), strict=False))
    for tensor in shapes:
        yield {str(name): tensor, **always}
    beside = [other for other in _COMPANIONS if other in accepted and other != name and other not in always]
    for tensor in shapes:
        for other in beside:
            for companion in _tensors(other, config):
                yield {str(name): tensor, other: companion, **always}


def part_inputs(module: nn.Module) -> Iterator[dict[str, object]]:
    """Yield keyword arguments that a part of a model may accept: activations as wide as its first weight reads.

    The other arguments that its forward requires get None, or else the activation too.
    """
    if hasattr(module, "main_input_name") and hasattr(module, "config"):
        with suppress(MoeifyError):
            yield from candidate_inputs(module)
    required = _required(module)
    shapes = list(_entry_shapes(module))
    if required:
        for shape in shapes:
            yield {**dict.fromkeys(required), required[0]: torch.zeros(shape, device="meta")}
    if len(required) > 1:
        for shape in shapes:
            yield dict.fromkeys(required, torch.zeros(shape, device="meta"))


def _required(module: nn.Module) -> list[str]:
    """Return the names of the arguments that a forward cannot do without."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    return [p.name for p in named if p.default is p.empty]


def _tensors(name: str, config: object) -> Iterator[torch.Tensor]:
    """Yield the forms that an input of this name may have."""
    match name:
        case "input_ids" | "decoder_input_ids" | "qformer_input_ids":
            yield _token_ids()
        case "inputs_embeds" | "query_embeds":
            yield torch.zeros(BATCH, TOKENS, _field(config, "hidden_size", TOKENS), device="meta")
        case "bbox":
            yield torch.zeros(BATCH, TOKENS, 4, dtype=torch.long, device="meta")
        case "pixel_values" | "pixel_values_videos":
            height, width = _pair(_field(config, "image_size", SIDE))
            channels, frames = _field(config, "num_channels", 3), _field(config, "num_frames", 4)
            if name == "pixel_values":
                yield torch.zeros(BATCH, channels, height, width, device="meta")
            yield torch.zeros(BATCH, frames, channels, height, width, device="meta")
        case "input_features":
            bins = _field(config, "num_mel_bins", _field(config, "feature_size", 80))
            frames = 2 * _field(config, "max_source_positions", 32)
            yield torch.zeros(BATCH, bins, frames, device="meta")
            yield torch.zeros(BATCH, frames, bins, device="meta")
        case "input_features_mask":
            yield torch.zeros(BATCH, 2 * _field(config, "max_source_positions", 32), dtype=torch.long, device="meta")
        case "inputs":
            yield _token_ids()
            yield from _tensors("input_values", config)
        case "input_values":
            yield torch.zeros(BATCH, SAMPLES, device="meta")
            yield torch.zeros(BATCH, 1, SAMPLES, device="meta")
            length, bins = _field(config, "max_length", 64), _field(config, "num_mel_bins", 128)
            yield torch.zeros(BATCH, length, bins, device="meta")


def _field(config: object, name: str, otherwise: int) -> Any:
    """Return a number, or a list of numbers, of a configuration or of a configuration inside it."""
    for holder in (config, *vars(config).values()):
        value = getattr(holder, name, None) if hasattr(holder, "to_dict") else None
        if isinstance(value, int | list | tuple):
            return value
    return otherwise


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[-2], size[-1])


def _entry_shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of an activation that the first layer of a module may read."""
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if weight is None or isinstance(layer, nn.Embedding):
            continue
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield (BATCH, layer.in_channels, *[16] * (weight.dim() - 2))
            return
        stored_in_out = weight.dim() == 2 and not isinstance(layer, nn.Linear) and hasattr(layer, "nx")
        width = weight.shape[0] if stored_in_out else weight.shape[-1]
        yield (BATCH, TOKENS, width)
        yield (TOKENS, width)
        yield (BATCH, 4, 4, width)
        return


def _token_ids() -> torch.Tensor:
    return torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")
