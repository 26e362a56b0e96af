"""Which inputs and outputs a model gets in the graph, and examples of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moeify.errors import MoeifyError, RefusedError
from moeify.export.capture.interface import (
    BATCH,
    DECODER_SEQUENCE,
    PAST,
    PRESENT,
    SEQUENCE,
    STATE,
    TOTAL,
    Interface,
    flat_outputs,
    without_cache,
)  # fmt: skip
from moeify.tracing.inputs import candidate_inputs

_KEYS_AND_VALUES = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
}  # of a cache; classes derived from these hold more
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


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


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU where there is none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _usual_inputs(model: nn.Module) -> Iterator[Mapping[str, object]]:
    """Yield inputs that the forward may take, best first: text with its padding, then whatever else can be guessed."""
    if getattr(model, "main_input_name", None) == "input_ids":
        yield _text(model)
    yield from candidate_inputs(model)


def _text(model: nn.Module) -> dict[str, Tensor]:
    """Text with its padding; for an encoder-decoder also the target so far, whose length is its own."""
    config = getattr(model, "config", None)
    names, lengths = list(_TEXT_INPUTS), {}
    if getattr(config, "is_encoder_decoder", False):
        names, lengths = ["input_ids", "attention_mask", "decoder_input_ids"], {"decoder_input_ids": 5}
    elif (getattr(config, "type_vocab_size", 0) or 0) <= 1:
        names.remove("token_type_ids")
    accepted = inspect.signature(model.forward).parameters
    return {
        name: torch.full((2, lengths.get(name, 7)), int(name != "token_type_ids")) for name in names if name in accepted
    }


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
