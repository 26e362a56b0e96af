"""Example inputs from a file: named tensors in safetensors, or JSON that a person writes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeify.checkpoint.safetensors_file import SafetensorsFiles
from moeify.checkpoint.tensor_info import dtype_name
from moeify.errors import CheckpointError, ConfigError
from moeify.files.json_text import parse_json
from moeify.files.limits import INPUT_ELEMENTS, INPUTS_BYTES, TENSOR_DIMENSIONS
from moeify.files.reading import read_bytes


def read_inputs(path: Path) -> dict[str, object]:
    """Read the arguments of a model's forward, by name.

    In JSON a list is a tensor, `{"shape": [2, 8], "dtype": "int64"}` is a tensor without values (dtype is float32 if it
    is missing), and anything else is passed on as it is:

        {"input_ids": [[1, 2, 3]], "pixel_values": {"shape": [1, 3, 224, 224]}, "use_cache": false}

    Args:
        path: A file that ends in `.json` or `.safetensors`.

    Returns:
        Tensors and plain values; tensors without values are on the meta device.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    try:
        match path.suffix:
            case ".safetensors":
                return _read_tensors(path)
            case ".json":
                data = parse_json(read_bytes(path, INPUTS_BYTES))
            case _:
                raise ConfigError(f"{path}: example inputs are read from .json or .safetensors, not {path.suffix!r}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a json file: {error}") from error
    if not isinstance(data, dict) or not data:
        raise ConfigError(f'{path}: expected the arguments of forward by name, such as {{"input_ids": [[1, 2, 3]]}}')
    return {name: _value(path, name, value) for name, value in data.items()}


def check_token_ids(model: PreTrainedModel, inputs: Mapping[str, object]) -> None:
    """Check the token ids among example inputs.

    Raises:
        ConfigError: One of them is not in the model's embedding.
    """
    ids = inputs.get("input_ids")
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return  # it looks its tokens up in another way
    if not isinstance(embedding, nn.Embedding) or not isinstance(ids, Tensor) or ids.is_meta or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= embedding.num_embeddings:
        wrong = low if low < 0 else high
        raise ConfigError(f"input_ids hold {wrong}: the model has the token ids 0 to {embedding.num_embeddings - 1}")


def _read_tensors(path: Path) -> dict[str, object]:
    files = SafetensorsFiles([path])
    for name, info in files.tensors.items():
        _check_size(path, name, info.shape)
    return {name: files.read(name) for name in files.tensors}


def _value(path: Path, name: str, value: object) -> object:
    try:
        match value:
            case list():
                return torch.tensor(value)
            case {"shape": [*shape], **rest} if len(shape) <= TENSOR_DIMENSIONS:
                _check_size(path, name, shape)
                return _shaped(shape, {str(key): each for key, each in rest.items()})
            case {"shape": _}:
                raise ValueError(f"its shape is not a list of at most {TENSOR_DIMENSIONS} numbers")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"{path}: {name} is not a tensor ({error}): write nested lists of numbers, or "
            '{"shape": [2, 8], "dtype": "int64"}'
        ) from error
    return value


def _check_size(path: Path, name: str, shape: tuple[int, ...] | list[int]) -> None:
    if prod(shape) > INPUT_ELEMENTS:
        raise ConfigError(f"{path}: {name} has {prod(shape):.3g} values, expected at most {INPUT_ELEMENTS:,}")


def _shaped(shape: list[int], rest: dict[str, object]) -> Tensor:
    """Return a tensor without values."""
    dtype = getattr(torch, str(rest.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype) or dtype_name(dtype) is None:
        raise ValueError("its dtype is not one of torch's that safetensors can hold")
    if rest:
        raise ValueError(f"{', '.join(rest)} beside shape and dtype")
    return torch.empty(shape, dtype=dtype, device="meta")
