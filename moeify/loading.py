"""Load checkpoints through transformers, with the strictness that it lacks: every tensor must find its place."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.checkpoint.source import Source, open_source
from moeify.errors import CheckpointError
from moeify.registration import register
from moeify.skeleton import model_class

_NUMBER = re.compile(r"\.(\d+)\.")


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


def load_slice(source: Source, layers: int | None, **kwargs: Any) -> nn.Module:
    """Load the first layers of a checkpoint in float32, with everything before and after them.

    Args:
        source: The opened checkpoint.
        layers: How many layers; None loads all.
        kwargs: For `from_pretrained`.
    """
    cls = model_class(source.config)
    config = cls.config_class.from_dict(dict(source.config))
    wanted = list(source.tensors)
    if layers is not None:
        _cut(config, layers)
        wanted = [name for name in wanted if (numbered_layer(name) or 0) < layers]
    tensors = {name: source.read(name) for name in wanted}
    return _strictly(cls, None, config=config, state_dict=tensors, dtype=torch.float32, **kwargs)


def numbered_layer(name: str) -> int | None:
    """Return the first number in a dotted name (`model.layers.3.mlp` → 3), None when there is none."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def _cut(config: Any, layers: int) -> None:
    """Make a config describe its first layers only."""
    depth = config.num_hidden_layers
    for field, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, field, value[:layers])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [i for i in config.mlp_only_layers if i < layers]
    config.num_hidden_layers = layers
    entry = getattr(config, "quantization_config", None)
    if entry:
        sites = [site for site in entry["plan"]["sites"] if (numbered_layer(site["path"]) or 0) < layers]
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
