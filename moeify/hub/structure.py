"""Whether a written checkpoint would load: every tensor of it is held to its place, and none is read."""

from __future__ import annotations

from pathlib import Path

from moeify.checkpoint.source import open_source
from moeify.errors import CheckpointError
from moeify.hub.loading import load_structure


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
