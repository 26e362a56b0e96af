"""The hooks on all stock layers of a model, put there and taken away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moeify.contract.found import FoundLayer, find_layers
from moeify.contract.watch import Watch
from moeify.layers.model_inputs import connect

# Routers that return more than one tensor of E columns, which transformers before 5.24 records at the whole block.
_LOGITS_AT = {"Llama4Router": 1}


@dataclass(frozen=True)
class Tracking:
    """Hooks on stock layers; moeify's own layers need none."""

    watches: tuple[Watch, ...]
    inputs: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Take the hooks away."""
        for watch in self.watches:
            watch.remove()
        for hook in self.inputs:
            hook.remove()


def track(model: nn.Module) -> Tracking:
    """Hook the stock layers of a model that have no hooks yet."""
    watches: dict[str, Watch] = {}
    for path, layer in find_layers(model).items():
        if layer.state is None:
            watches[path] = Watch(layer.num_experts, layer.top_k or 1, _logits_at(model, layer))
            watches[path].attach(layer.router, layer.experts[0])
    return Tracking(tuple(watches.values()), tuple(connect(model, watches)))


def _logits_at(model: nn.Module, layer: FoundLayer) -> int | None:
    """Return where transformers finds the router logits in what the router returns."""
    kinds = tuple(type(module) for module in layer.router.modules())  # PEFT may have put a wrapper around it
    steps = layer.path.split(".")
    for count in range(len(steps), -1, -1):
        around = model.get_submodule(".".join(steps[:count]))
        for spec in _recorders(around):
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type) and any(issubclass(kind, target) for kind in kinds):
                return int(getattr(spec, "index", 1))
    return next((_LOGITS_AT[kind.__name__] for kind in kinds if kind.__name__ in _LOGITS_AT), None)


def _recorders(module: nn.Module) -> Iterator[Any]:
    recorded = getattr(module, "_can_record_outputs", None)
    specs = recorded.get("router_logits", ()) if isinstance(recorded, dict) else ()
    yield from specs if isinstance(specs, list | tuple) else (specs,)
