"""A checkpoint as transformers would load it, but without values: whether every tensor has its place is known then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeify.checkpoint.source import Source, open_source
from moeify.errors import CheckpointError
from moeify.hub.loading import load_strictly
from moeify.hub.stored import Absent
from moeify.tracing.skeleton import config_of, model_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_structure(source: Source, *, unused: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a model whose weights are on the meta device; transformers renames and merges them as ever.

    Args:
        source: The opened checkpoint; no tensor is read.
        unused: Let tensors through that the model has no place for.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape or kind.
    """
    cls, tensors = model_class(source.config), {name: Absent(info) for name, info in source.tensors.items()}
    options = {"config": config_of(source.config), "state_dict": tensors, "dtype": torch.float32, **kwargs}
    return load_strictly(cls, None, unused=unused, **options)


def check_output(folder: Path) -> None:
    """Hold every tensor of a written checkpoint, in all layers, to the model that its own `config.json` describes.

    Raises:
        CheckpointError: It would not load.
    """
    try:
        with open_source(folder, trust_remote_code=True) as source:  # no code runs; the user was asked at the source
            load_structure(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"the output would not load: {error}; the source's tensors and its config.json do not belong together: "
            "download both again; nothing was written"
        ) from error
