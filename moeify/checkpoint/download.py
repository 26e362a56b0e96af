"""Models of the hub: from its cache, or downloaded into it, without code and, unless they are accepted, pickles."""

from __future__ import annotations

import re
from pathlib import Path

from moeify.checkpoint.adapter import ADAPTER, ADAPTER_WEIGHTS
from moeify.checkpoint.folder import CARD, CONFIG, PICKLE, SAFETENSORS, SIDE_FILES, index_name
from moeify.errors import CheckpointError, first_line

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def download(src: str | Path, allow_pickle: bool, revision: str | None, *, cached: bool = False) -> Path:
    """Return the folder of a hub id.

    Args:
        src: What the user gave, which is no file here.
        allow_pickle: Also take pickled weights.
        revision: Branch, tag or commit; None for the main branch.
        cached: Do not download it: it was named by a file and not by the user.

    Raises:
        CheckpointError: It is no hub id, or cannot be had.
    """
    if isinstance(src, Path) or not HUB_ID.fullmatch(src) or src.endswith((".gguf", ".safetensors", ".bin")):
        raise CheckpointError(f"{src} does not exist: give a model folder, a .gguf file or a hub id")
    from huggingface_hub import constants, snapshot_download

    safe, pickled = ADAPTER_WEIGHTS
    wanted = [CONFIG, CARD, ADAPTER, safe, "model*.safetensors", index_name(SAFETENSORS), *SIDE_FILES]
    if allow_pickle:
        wanted += ["pytorch_model*.bin", index_name(PICKLE), pickled]
    try:
        return Path(
            snapshot_download(
                src, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=cached
            )
        )
    except (OSError, ValueError) as error:
        where = f"{src} is not a folder here, not in the hub's cache {constants.HF_HUB_CACHE}"
        if cached:
            raise CheckpointError(f"{where}: download it first (hf download {src})") from error
        raise CheckpointError(f"{where}, and cannot be downloaded from the hub: {first_line(error)}") from error
