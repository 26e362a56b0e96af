"""What is exported: a model behind flat tensor inputs and outputs, with the names that ONNX users expect.

Shape legend: B batch, S new tokens, P tokens in the cache, H heads of keys and values, D their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import MoeifyError, RefusedError
from moeify.tracing.inputs import candidate_inputs

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
DECODER_SEQUENCE = "decoder_sequence"
_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # what a cache holds; those derived hold more
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Interface:
    """A model as the graph sees it.

    Attributes:
        module: Takes the inputs in order, returns a tuple of tensors.
        inputs: Example inputs by name.
        axes: For each input its dynamic dimensions, by position, with their names.
        outputs: Names of the outputs.
        output_axes: As `axes`, for the outputs whose dimensions have names.
        vocabulary: Number of token ids, 0 where inputs are not token ids.
        cached: Whether keys and values go in and come out.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    output_axes: Mapping[str, Mapping[int, str]]
    vocabulary: int = 0
    cached: bool = False


def interface(model: nn.Module, example_inputs: Mapping[str, Any] | None) -> Interface:
    """Choose the inputs and outputs of the graph.

    Args:
        model: A causal language model of transformers gets keys and values as inputs and outputs; any other
            transformers model its main input; a module of another kind what `example_inputs` says.
        example_inputs: Keyword arguments of the forward; None makes them up for a transformers model.

    Raises:
        MoeifyError: the inputs cannot be made up.
        RefusedError: the model does not run on them, or a decoder keeps something else than keys and values.
    """
    if example_inputs is not None:
        return _plain(model, example_inputs)
    config: Any = getattr(model, "config", None)
    if config is not None and _generates(model) and not getattr(config, "is_encoder_decoder", False):
        return _decoder(model)
    failures = []
    for inputs in _usual_inputs(model):
        try:
            return _plain(model, inputs)
        except MoeifyError:
            raise
        except Exception as error:  # whatever its forward raises for inputs that it is not made for
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
    raise RefusedError(
        f"{type(model).__name__} does not run on the inputs made up for it ({failures[0]}); use moeify.export_onnx in "
        "Python, with example_inputs"
    )


class _Flat(nn.Module):
    """Calls a model by keyword and returns the tensors of its output."""

    def __init__(self, model: nn.Module, axes: Mapping[str, Mapping[int, str]]) -> None:
        super().__init__()
        self.model, self.names, self.axes = model, tuple(axes), tuple(axes.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        _assume_sizes(tensors, self.axes)
        arguments = dict(zip(self.names, tensors, strict=True))
        return tuple(flat_outputs(self.model(**arguments, **quiet(self.model))).values())


class _WithCache(nn.Module):
    """Calls a causal language model with its keys and values as tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], axes: Mapping[str, Mapping[int, str]]) -> None:
        super().__init__()
        self.model, self.names, self.axes = model, names, tuple(axes.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        _assume_sizes(tensors, self.axes)
        arguments = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        states = tensors[len(self.names) :]
        cache = DynamicCache(list(zip(states[::2], states[1::2], strict=True)))
        output = self.model(**arguments, past_key_values=cache, use_cache=True)
        return output.logits, *(t for layer in output.past_key_values.layers for t in (layer.keys, layer.values))


def _assume_sizes(tensors: Sequence[Tensor], axes: Sequence[Mapping[int, str]]) -> None:
    """Tell the trace that dimensions of one name have one size, and what the total is the sum of."""
    check: Any = torch._check
    sizes: dict[str, int] = {}
    for tensor, named in zip(tensors, axes, strict=True):
        for axis, name in named.items():
            check(sizes.setdefault(name, tensor.shape[axis]) == tensor.shape[axis])
    if TOTAL in sizes and PAST in sizes:
        check(sizes[TOTAL] == sizes[PAST] + sizes[SEQUENCE])


def flat_outputs(output: Any) -> dict[str, Tensor]:
    """Name the floating-point tensors of an output; what a module returns without a name is called `output`."""
    if isinstance(output, Tensor):
        return {"output": output}
    named = output.items() if isinstance(output, Mapping) else ((f"output_{i}", t) for i, t in enumerate(output))
    return {str(name): value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}


def _decoder(model: Any) -> Interface:
    accepted = inspect.signature(model.forward).parameters
    names = tuple(name for name in ("input_ids", "attention_mask", "position_ids") if name in accepted)
    states = cache_states(model)
    batch, new, past = 2, 3, 5
    position_BS = torch.arange(past, past + new).expand(batch, new).contiguous()
    given = {
        "input_ids": torch.ones(batch, new, dtype=torch.long),
        "attention_mask": torch.ones(batch, past + new, dtype=torch.long),
        "position_ids": position_BS,
    }
    inputs = {name: given[name] for name in names}
    rows = {"input_ids": {0: BATCH, 1: SEQUENCE}, "position_ids": {0: BATCH, 1: SEQUENCE}}
    axes: dict[str, Mapping[int, str]] = {name: rows.get(name, {0: BATCH, 1: TOTAL}) for name in names}
    output_axes: dict[str, Mapping[int, str]] = {"logits": {0: BATCH, 1: SEQUENCE}}
    for name, (heads, width, dtype) in states.items():
        inputs[f"past_key_values.{name}"] = torch.zeros(batch, heads, past, width, dtype=dtype)
        axes[f"past_key_values.{name}"] = {0: BATCH, 2: PAST}
        output_axes[f"present.{name}"] = {0: BATCH, 2: TOTAL}
    vocabulary = model.config.get_text_config().vocab_size
    module = _WithCache(model, names, axes)
    return Interface(module, inputs, axes, tuple(output_axes), output_axes, vocabulary, cached=True)


@torch.no_grad()
def cache_states(model: Any) -> dict[str, tuple[int, int, torch.dtype]]:
    """Return heads, width and dtype of every layer's keys and values, by name (`0.key`, `0.value`, `1.key`, …).

    Raises:
        RefusedError: the model keeps something else between steps.
    """
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if type(cache).__name__ != "DynamicCache":
        raise RefusedError(_no_state(f"{type(model).__name__} keeps {type(cache).__name__}"))
    states: dict[str, tuple[int, int, torch.dtype]] = {}
    for number, layer in enumerate(cache.layers):
        for name in ("key", "value"):
            tensor = getattr(layer, f"{name}s", None) if type(layer).__name__ in _KEYS_AND_VALUES else None
            if not isinstance(tensor, Tensor) or tensor.dim() != 4:
                raise RefusedError(_no_state(f"layer {number} of {type(model).__name__} keeps {type(layer).__name__}"))
            states[f"{number}.{name}"] = (tensor.shape[1], tensor.shape[3], tensor.dtype)
    return states


def _no_state(what: str) -> str:
    return (
        f"{what} between steps: only keys and values can be inputs of the graph; to leave the cache out, use "
        "moeify.export_onnx in Python, with example_inputs"
    )


def _usual_inputs(model: Any) -> Iterator[Mapping[str, Any]]:
    """Yield inputs that the forward may take, best first: text with its padding, then whatever else can be guessed."""
    if getattr(model, "main_input_name", None) == "input_ids":
        yield _two_texts(model) if getattr(model.config, "is_encoder_decoder", False) else _text(model)
    yield from candidate_inputs(model)


def _text(model: Any) -> dict[str, Tensor]:
    accepted = inspect.signature(model.forward).parameters
    segments = getattr(model.config, "type_vocab_size", 0) or 0
    names = tuple(n for n in _TEXT_INPUTS if n in accepted and (n != "token_type_ids" or segments > 1))
    tokens_BS = torch.ones(2, 7, dtype=torch.long)
    return {name: tokens_BS * (name != "token_type_ids") for name in names}


def _two_texts(model: Any) -> dict[str, Tensor]:
    """Text in, with its padding, and the target so far, whose length is its own."""
    lengths = {"input_ids": 7, "attention_mask": 7, "decoder_input_ids": 5}
    accepted = inspect.signature(model.forward).parameters
    return {n: torch.ones(2, length, dtype=torch.long) for n, length in lengths.items() if n in accepted}


def _plain(model: nn.Module, inputs: Mapping[str, Any]) -> Interface:
    """Inputs as they are: the first dimension is the batch, the second of token ids the sequence, one on each side."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    made = {name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in tensors.items()}
    if not made:
        raise MoeifyError(f"{type(model).__name__} has no tensor among its example inputs: give at least one")
    axes = {
        n: {0: BATCH} | ({1: _sequence(n)} if not t.is_floating_point() and t.dim() > 1 else {})
        for n, t in made.items()
    }
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0) if config is not None else 0
    return _flat(model, made, axes, vocabulary or 0)


def _sequence(name: str) -> str:
    return DECODER_SEQUENCE if name.startswith("decoder_") else SEQUENCE


def _flat(
    model: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]], vocabulary: int
) -> Interface:
    module = _Flat(model, axes)
    with torch.no_grad():
        outputs = flat_outputs(model(**inputs, **quiet(model)))
    return Interface(module, inputs, axes, tuple(outputs), {}, vocabulary)


def _generates(model: Any) -> bool:
    can_generate: Callable[[], bool] | None = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate()


def quiet(model: nn.Module) -> dict[str, bool]:
    """Arguments that keep caches out of the outputs."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
