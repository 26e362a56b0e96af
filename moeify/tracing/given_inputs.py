"""Example inputs from a file: named tensors in safetensors, or JSON that a person writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moeify.errors import ConfigError


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
                return dict(load_file(path))
            case ".json":
                data = json.loads(path.read_text())
            case _:
                raise ConfigError(f"{path}: example inputs are read from .json or .safetensors, not {path.suffix!r}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise ConfigError(f"{path} is not a {path.suffix[1:]} file: {error}") from error
    if not isinstance(data, dict) or not data:
        raise ConfigError(f'{path}: expected the arguments of forward by name, such as {{"input_ids": [[1, 2, 3]]}}')
    return {name: _value(path, name, value) for name, value in data.items()}


def _value(path: Path, name: str, value: object) -> object:
    try:
        match value:
            case list():
                return torch.tensor(value)
            case {"shape": shape, **rest}:
                return _shaped(shape, {str(key): each for key, each in rest.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{path}: {name} is not a tensor ({error}): write nested lists of numbers, or "
            '{"shape": [2, 8], "dtype": "int64"}'
        ) from error
    return value


def _shaped(shape: object, rest: dict[str, object]) -> Tensor:
    """Return a tensor without values."""
    dtype = getattr(torch, str(rest.pop("dtype", "float32")), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("its dtype is not one of torch's")
    if rest:
        raise ValueError(f"{', '.join(rest)} beside shape and dtype")
    return torch.empty(cast("list[int]", shape), dtype=dtype, device="meta")
