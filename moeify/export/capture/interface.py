"""The inputs and outputs of a graph, and the model behind them: flat tensors, with the names that ONNX users expect.

Shape legend: B batch, S new tokens, P tokens in the cache, H heads of keys and values, D their size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
DECODER_SEQUENCE = "decoder_sequence"
STATE, PRESENT = "past_key_values.", "present."  # how the names of keys and values start, as inputs and outputs

Axes = Mapping[str, Mapping[int, str]]
_check: Callable[[bool], None] = torch._check


@dataclass(frozen=True)
class Interface:
    """A model as the graph sees it.

    Attributes:
        inputs: Example inputs by name; keys and values come last.
        axes: For each input its dynamic dimensions, by position, with their names.
        outputs: Names of the outputs.
        output_axes: As `axes`, for the outputs whose dimensions have names.
        vocab_size: Number of token ids, 0 where inputs are not token ids.
    """

    inputs: Mapping[str, Tensor]
    axes: Axes
    outputs: tuple[str, ...]
    output_axes: Axes
    vocab_size: int = 0

    @property
    def states(self) -> dict[str, Tensor]:
        """The inputs that are keys and values."""
        return {name: tensor for name, tensor in self.inputs.items() if name.startswith(STATE)}

    def in_float32(self) -> Interface:
        """Return the interface of the same model in float32."""
        floats = {n: t.float() if t.is_floating_point() else t for n, t in self.inputs.items()}
        return replace(self, inputs=floats)


class FlatModel(nn.Module):
    """A model that takes the inputs of its interface in order and returns a tuple of tensors.

    Args:
        model: Called by keyword.
        interface: Its inputs.
    """

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.model, self.names, self.axes = model, tuple(interface.inputs), tuple(interface.axes.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs."""
        _assume_sizes(tensors, self.axes)
        given = dict(zip(self.names, tensors, strict=True))
        states = [given.pop(name) for name in self.names if name.startswith(STATE)]
        if not states:
            return tuple(flat_outputs(self.model(**given, **without_cache(self.model))).values())
        cache = DynamicCache(list(zip(states[::2], states[1::2], strict=True)))
        output = self.model(**given, past_key_values=cache, use_cache=True)
        return output.logits, *(t for layer in output.past_key_values.layers for t in (layer.keys, layer.values))


def _assume_sizes(tensors: tuple[Tensor, ...], axes: tuple[Mapping[int, str], ...]) -> None:
    """Tell the trace that dimensions of one name have one size, and what the total is the sum of."""
    sizes: dict[str, int] = {}
    for tensor, named in zip(tensors, axes, strict=True):
        for axis, name in named.items():
            _check(sizes.setdefault(name, tensor.shape[axis]) == tensor.shape[axis])
    if TOTAL in sizes and PAST in sizes:
        _check(sizes[TOTAL] == sizes[PAST] + sizes[SEQUENCE])


def flat_outputs(output: object) -> dict[str, Tensor]:
    """Name the floating-point tensors of an output; what a module returns without a name is called `output`."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        named = list(output.items())
    else:
        named = [(f"output_{i}", value) for i, value in enumerate(output)] if isinstance(output, tuple | list) else []
    return {str(name): value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that keep caches out of the outputs."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
