"""The inputs and outputs of a graph, and the model behind them: flat tensors, with the names that ONNX users expect.

Shape legend: B batch, S new tokens, P tokens in the cache, H heads of keys and values, D their size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moeify.errors import MoeifyError, RefusedError
from moeify.tracing.inputs import candidate_inputs

# The opaque nodes: they keep the inputs of the torch operators, the lowering replaces them, and no file holds them.
DOMAIN, EXPERTS, GROUPED_LINEAR = "moeify", "Experts", "GroupedLinear"
OPSET = 20  # of the standard operators: the first with Gelu

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past_sequence", "total_sequence"
DECODER_SEQUENCE = "decoder_sequence"
STATE, PRESENT = "past_key_values.", "present."  # how the names of keys and values start, as inputs and outputs

_KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer"}  # of a cache; classes derived from these hold more

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

    def sized(self, batch: int, sequence: int) -> dict[str, Tensor]:
        """Return inputs without values for a batch of sequences; a target of its own is longer by 2."""
        sizes = {BATCH: batch, SEQUENCE: sequence, DECODER_SEQUENCE: sequence + 2}
        return {
            name: example.new_empty(
                [sizes.get(self.axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
            )
            for name, example in self.inputs.items()
        }

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


def flat_outputs(output: Tensor | Mapping[str, object] | Iterable[object]) -> dict[str, Tensor]:
    """Name the floating-point tensors of an output; what a module returns without a name is called `output`."""
    if isinstance(output, Tensor):
        return {"output": output}
    named = output.items() if isinstance(output, Mapping) else ((f"output_{i}", t) for i, t in enumerate(output))
    return {str(name): value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that keep caches out of the outputs."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def choose_interface(model: nn.Module, example_inputs: Mapping[str, object] | None) -> Interface:
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
    if _is_decoder(model):
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


def _is_decoder(model: nn.Module) -> bool:
    can_generate, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    if can_generate is None or config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return bool(can_generate())


def _decoder(model: nn.Module) -> Interface:
    batch, new, past = 2, 3, 5
    given = {
        "input_ids": (torch.ones(batch, new, dtype=torch.long), {0: BATCH, 1: SEQUENCE}),
        "attention_mask": (torch.ones(batch, past + new, dtype=torch.long), {0: BATCH, 1: TOTAL}),
        "position_ids": (torch.arange(past, past + new).repeat(batch, 1), {0: BATCH, 1: SEQUENCE}),
    }
    accepted = inspect.signature(model.forward).parameters
    inputs = {name: tensor for name, (tensor, _) in given.items() if name in accepted}
    axes = {name: given[name][1] for name in inputs}
    output_axes = {"logits": {0: BATCH, 1: SEQUENCE}}
    for name, (heads, size, dtype) in cache_states(model).items():
        inputs[STATE + name] = torch.zeros(batch, heads, past, size, dtype=dtype)
        axes[STATE + name] = {0: BATCH, 2: PAST}
        output_axes[PRESENT + name] = {0: BATCH, 2: TOTAL}
    return Interface(inputs, axes, tuple(output_axes), output_axes, _vocab_size(model))


def _vocab_size(model: nn.Module) -> int:
    """Number of token ids, 0 where a model has none."""
    config = getattr(model, "config", None)
    return 0 if config is None else getattr(config.get_text_config(), "vocab_size", None) or 0


@torch.no_grad()
def cache_states(model: nn.Module) -> dict[str, tuple[int, int, torch.dtype]]:
    """Return heads, size and dtype of every layer's keys and values, by name (`0.key`, `0.value`, `1.key`, …).

    Raises:
        RefusedError: the model keeps something else between steps.
    """
    ids = torch.ones(1, 1, dtype=torch.long, device=device_of(model))
    output = model(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", output)  # Mamba's state has a field of its own in transformers 5.17
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


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU where there is none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _usual_inputs(model: nn.Module) -> Iterator[Mapping[str, object]]:
    """Yield inputs that the forward may take, best first: text with its padding, then whatever else can be guessed."""
    if getattr(model, "main_input_name", None) == "input_ids":
        config, lengths = getattr(model, "config", None), {"input_ids": 7, "attention_mask": 7}
        if getattr(config, "is_encoder_decoder", False):
            lengths["decoder_input_ids"] = 5  # the target so far, whose length is its own
        elif (getattr(config, "type_vocab_size", 0) or 0) > 1:
            lengths["token_type_ids"] = 7
        accepted = inspect.signature(model.forward).parameters
        yield {n: torch.full((2, size), int(n != "token_type_ids")) for n, size in lengths.items() if n in accepted}
    yield from candidate_inputs(model)


def _plain(model: nn.Module, inputs: Mapping[str, object]) -> Interface:
    """Inputs as they are: the first dimension is the batch, the second of token ids the sequence, one on each side."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    made = {name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in tensors.items()}
    if not made:
        raise MoeifyError(f"{type(model).__name__} has no tensor among its example inputs: give at least one")
    axes = {
        n: {0: BATCH} | ({1: _sequence(n)} if not t.is_floating_point() and t.dim() > 1 else {})
        for n, t in made.items()
    }
    with torch.no_grad():
        outputs = flat_outputs(model(**made, **without_cache(model)))
    return Interface(made, axes, tuple(outputs), {}, _vocab_size(model))


def _sequence(name: str) -> str:
    return DECODER_SEQUENCE if name.startswith("decoder_") else SEQUENCE
