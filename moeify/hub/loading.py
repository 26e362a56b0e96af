"""Load checkpoints through transformers, with the strictness that it lacks: every tensor must find its place."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.checkpoint.source import Source, open_source
from moeify.errors import CheckpointError
from moeify.hub.registration import register
from moeify.tracing.skeleton import config_of, model_class


def load(path: str | Path, **kwargs: Any) -> nn.Module:
    """Load a checkpoint, dense, native MoE or in moeify format; every tensor must find its place.

    Args:
        path: A model folder or a GGUF file.
        kwargs: For `from_pretrained` (`dtype`, `device_map`, …).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, where transformers would only log it.
    """
    path = Path(path)
    with open_source(path) as source:
        cls = model_class(source.config)
    if path.suffix == ".gguf":
        return _strictly(cls, path.parent, gguf_file=path.name, **kwargs)
    return _strictly(cls, path, **kwargs)


def load_slice(source: Source, cut: Slice | None, **kwargs: Any) -> nn.Module:
    """Load the first layers of a checkpoint in float32, with everything before and after them.

    Args:
        source: The opened checkpoint.
        cut: Which layers to keep; None loads all.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    cls, config = model_class(source.config), config_of(source.config)
    wanted = list(source.tensors)
    if cut is not None:
        _cut(config, cut)
        wanted = [name for name in wanted if cut.keeps(name)]
    tensors = {name: source.read(name) for name in wanted}
    return _strictly(cls, None, config=config, state_dict=tensors, dtype=torch.float32, **kwargs)


@dataclass(frozen=True)
class Slice:
    """The first layers of a stack.

    Attributes:
        stack: What stands before the number in the names of its tensors, `model.layers.` for example.
        layers: How many of them.
    """

    stack: str
    layers: int

    def keeps(self, name: str) -> bool:
        """Whether a tensor or module is outside the stack or in one of its first layers."""
        number = name.removeprefix(self.stack).split(".")[0]
        return not (name.startswith(self.stack) and number.isdigit() and int(number) >= self.layers)


def _cut(config: Any, cut: Slice) -> None:
    """Make a config describe its first layers only."""
    depth = config.num_hidden_layers
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, field, value[: cut.layers])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [i for i in config.mlp_only_layers if i < cut.layers]
    config.num_hidden_layers = cut.layers
    entry = getattr(config, "quantization_config", None)
    if entry:
        sites = [site for site in entry["plan"]["sites"] if cut.keeps(site["path"])]
        config.quantization_config = {**entry, "plan": {**entry["plan"], "sites": sites}}


def _strictly(cls: Any, folder: Path | None, **kwargs: Any) -> nn.Module:
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            where = f"{folder}: " if folder else ""
            raise CheckpointError(f"{where}{kind.split('_')[0]} tensor {names[0]}{more} for {cls.__name__}")
    loaded: nn.Module = model.eval()
    return loaded
