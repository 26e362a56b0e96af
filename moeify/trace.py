"""A model becomes an FX graph, through torch.export on the meta device: no weight is read, any size takes seconds.

The graph's `get_attr` nodes carry the parameters' own names and every node carries the path of the module that
issued it, which is all that the passes need to know about the model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from moeify.errors import MoeifyError
from moeify.inputs import guess_inputs

Inputs = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor


def trace(model: nn.Module, example_inputs: Inputs | None = None) -> fx.GraphModule:
    """Trace `model` in evaluation mode into an ATen-level graph.

    Args:
        model: Any module, on any device; it is neither run nor changed.
        example_inputs: Keyword arguments, positional arguments, or one tensor; only shapes and dtypes matter.
            None guesses them for a transformers model.

    Returns:
        A GraphModule on the meta device whose `get_attr` targets are the model's parameter names.

    Raises:
        MoeifyError: the inputs cannot be guessed, or torch.export cannot trace the model.
    """
    twin = meta_twin(model).eval()
    args, kwargs = _split_inputs(guess_inputs(model) if example_inputs is None else example_inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(twin, args, kwargs, strict=False)
            return program.module(check_guards=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise MoeifyError(
            f"torch.export cannot trace {type(model).__name__}: {type(error).__name__}: {reason}; "
            "pass example_inputs that its forward accepts"
        ) from error


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a module's structure onto the meta device; no weight is read and ties between parameters stay ties."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
    return copy.deepcopy(model, memo)


def _to_meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def _split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {name: pytree.tree_map(_to_meta, value) for name, value in inputs.items()}
    positional = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    return tuple(pytree.tree_map(_to_meta, positional)), {}
