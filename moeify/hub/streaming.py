"""A checkpoint as a model whose layers are in memory only while they run.

transformers marks the layers of a stack (`GradientCheckpointingLayer`): each is called as a whole, and reads weights of
its own. Everything else is loaded at once. A layer's tensors go through transformers' loader too, right before it runs,
and make room for empty ones when it has run.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moeify.checkpoint.source import Source
from moeify.errors import VerificationError, told_as
from moeify.hub.loading import load_strictly, load_structure, load_whole
from moeify.hub.stored import Absent, Present, present
from moeify.pretrained import load_tensors
from moeify.tracing.skeleton import config_of, model_class, stored_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


def load_streamed(
    source: Source,
    change: Callable[[nn.Module], None],
    *,
    unused: bool = False,
    whole: bool = False,
    without: Collection[str] = (),
    **kwargs: Any,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a checkpoint in float32, the layers of safetensors files when they run, other files as a whole.

    Args:
        source: The checkpoint, which stays open while the model runs.
        change: What is done to the weights of a module after they were loaded.
        unused: Leave tensors out that the model has no place for.
        whole: Load the layers at once too.
        without: Paths of modules in the layers that do not run; looked at whenever a layer runs.
        kwargs: For `from_pretrained`.

    Returns:
        The model, and the names of the tensors that were left out.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape or kind.
    """
    if len(present(source, source.tensors)) < len(source.tensors):  # GGUF and pickles
        model = load_whole(source, unused=unused, **kwargs)
        change(model)
        return model, ()
    structure = load_structure(source, unused=unused, **kwargs)
    names = stored_names(structure, source.tensors)
    layers = () if whole else _layers(structure)
    at_once, of_layer = _by_layer({stored: place for place, stored in names.of.items()} | names.merged, layers)
    absent = {name: Absent(source.info(name)) for places in of_layer.values() for name in places}
    options = {"config": config_of(source.config), "state_dict": absent | present(source, at_once), **kwargs}
    model = load_strictly(model_class(source.config), None, dtype=torch.float32, **options)
    change(model)
    for path, places in of_layer.items():
        _load_when_run(model, path, partial(_present_but, without, source, places), source.path, change)
    return model, names.unused if unused else ()


def whole_if_needed(attempt: Callable[[bool], Result], failure: str) -> Result:
    """Load a model in layers, run it and forget it; load it whole if it reads a weight of a layer outside of it.

    Args:
        attempt: Loads and runs it; told whether as a whole.
        failure: What is said if that fails.

    Raises:
        VerificationError: It fails.
    """
    try:
        with told_as(failure, VerificationError):
            try:
                return attempt(False)
            except RuntimeError:  # torch's, of a tensor without values
                return attempt(True)
    finally:
        gc.collect()  # the hooks of its layers know the model, so it would stay


def _by_layer(places: Mapping[str, str], layers: Collection[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the places of stored tensors outside of all layers, and those in each layer by its path."""
    of_layer: dict[str, dict[str, str]] = {path: {} for path in layers}
    at_once: dict[str, str] = {}
    for name, place in places.items():
        path = next((path for path in layers if place.startswith(f"{path}.")), None)
        (at_once if path is None else of_layer[path])[name] = place
    return at_once, of_layer


def _present_but(without: Collection[str], source: Source, places: Mapping[str, str]) -> dict[str, Present]:
    """Return stored tensors by their names on disk, but those whose place is in a module that does not run."""
    idle = tuple(f"{path}." for path in without)
    return present(source, [name for name, place in places.items() if not place.startswith(idle)])


def _layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of the layers that can be loaded by themselves: none of their weights has a second place."""
    uses = Counter(map(id, model.state_dict(keep_vars=True).values()))
    found: list[str] = []

    def alone(path: str) -> bool:
        return all(uses[id(tensor)] == 1 for tensor in model.get_submodule(path).state_dict(keep_vars=True).values())

    for path, module in model.named_modules():  # the outer ones first
        outer = not any(path.startswith(f"{other}.") for other in found)
        if outer and isinstance(module, GradientCheckpointingLayer):
            found.append(path)
    return tuple(filter(alone, found))


def _load_when_run(
    model: PreTrainedModel, path: str, tensors: Callable[[], Mapping[str, Present]], file: Path,
    change: Callable[[nn.Module], None],
) -> None:  # fmt: skip
    """Load a layer's tensors before each of its runs, and forget them after it."""
    layer = model.get_submodule(path)
    empty = [
        (module, name, tensor)
        for module in layer.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.is_meta
    ]

    def load(*_: object) -> None:
        load_tensors(model, tensors(), file)
        change(layer)

    def forget(*_: object) -> None:
        for module, name, tensor in empty:
            setattr(module, name, tensor)

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(forget)
