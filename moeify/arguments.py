"""What callers of the library pass: a value of another kind is answered by one line that says what to pass."""

from __future__ import annotations

from os import PathLike

import torch
from torch import nn

from moeify.config import MoEConfig
from moeify.errors import ConfigError


def check_model(value: object, name: str = "model") -> None:
    """Check that a model was passed.

    Raises:
        ConfigError: Something else was.
    """
    if isinstance(value, nn.Module):
        return
    hint = "pass the model itself"
    if isinstance(value, str | PathLike):
        hint = f"moeify.load({str(value)!r}) makes one of a folder (from a shell: moeify --help)"
    elif isinstance(value, torch.export.ExportedProgram):
        hint = "moeify.convert_graph takes an exported program"
    raise ConfigError(f"{name} is a {type(value).__name__}: expected a torch.nn.Module; {hint}")


def check_config(value: object) -> None:
    """Check that settings were passed.

    Raises:
        ConfigError: Something else was.
    """
    if not isinstance(value, MoEConfig):
        example = "moeify.MoEConfig(**config)" if isinstance(value, dict) else "moeify.MoEConfig(experts=8, top_k=2)"
        raise ConfigError(f"config is a {type(value).__name__}: expected a moeify.MoEConfig, such as {example}")
