"""Example inputs for a transformers model, guessed from its configuration: shapes that its forward accepts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moeify.errors import MoeifyError

BATCH, TOKENS = 2, 8


def guess_inputs(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments for `model.forward` on the meta device: zeros of the right shapes and dtypes.

    Raises:
        MoeifyError: the model is not from transformers, or its main input is of a kind not known here.
    """
    config = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", None)
    if config is None or main_input is None:
        raise MoeifyError(
            f"the inputs of {type(model).__name__} cannot be guessed: its forward takes {_arguments(model)}; "
            "pass example_inputs"
        )
    inputs = {main_input: _main_input(main_input, config, model)}
    accepted = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _token_ids()
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _main_input(name: str, config: Any, model: nn.Module) -> torch.Tensor:
    match name:
        case "input_ids":
            return _token_ids()
        case "pixel_values":
            side = config.image_size
            height, width = (side, side) if isinstance(side, int) else side
            return torch.zeros(BATCH, config.num_channels, height, width, device="meta")
        case "input_features":
            frames = 2 * getattr(config, "max_source_positions", TOKENS)
            return torch.zeros(BATCH, config.num_mel_bins, frames, device="meta")
        case "input_values":
            return torch.zeros(BATCH, 4000, device="meta")
    raise MoeifyError(
        f"the main input {name!r} of {type(model).__name__} cannot be guessed: its forward takes "
        f"{_arguments(model)}; pass example_inputs"
    )


def _token_ids() -> torch.Tensor:
    return torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")


def _arguments(model: nn.Module) -> str:
    return "(" + ", ".join(inspect.signature(model.forward).parameters) + ")"
