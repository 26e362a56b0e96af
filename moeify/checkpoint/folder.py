"""Finding the files of a model in a folder of Hugging Face layout, without trusting any of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.json_text import read_json_object
from moeify.files.limits import CONFIG_BYTES, INDEX_BYTES
from moeify.files.reading import is_file, list_folder

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CARD = "README.md"  # of the dense model: it is read, and not copied
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_NAME_BYTES = 255  # of a file's name, on every usual file system

# The files that belong to a model beside its weights and its config. This is a list of what to copy and not of what to
# leave out: model folders also collect training state, code and notes on the dense model, which would be wrong beside
# the converted model.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")
SIDE_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    GENERATION_CONFIG,
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def index_name(weights: str) -> str:
    """Return the name of the index that belongs to a sharded `model.safetensors` or `pytorch_model.bin`."""
    return f"{weights}.index.json"


def find_shards(folder: Path, weights: str) -> dict[Path, set[str]] | None:
    """Return the weight files of a folder, each with the tensors that the index expects in it.

    Args:
        folder: The model folder.
        weights: `SAFETENSORS` or `PICKLE`. The whole file wins over an index, as in transformers.

    Returns:
        An empty set for the whole file; None if the folder has neither the file nor its index.

    Raises:
        CheckpointError: The index is damaged, leads outside the folder, or names a file that does not exist.
    """
    if is_file(folder / weights):
        return {folder / weights: set()}
    index = folder / index_name(weights)
    if not is_file(index):
        return None
    weight_map = read_json_object(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names: download it again")
    names_in: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_in.setdefault(shard, set()).add(name)
    return {_shard(folder, shard, index): names for shard, names in sorted(names_in.items())}


def _shard(folder: Path, name: str, index: Path) -> Path:
    """Return the path of a shard: a regular file in the folder."""
    if "\0" in name or len(name.encode()) > _NAME_BYTES:
        raise CheckpointError(f"{index} names {name[:_NAME_BYTES]!r}, which is no name of a file: download it again")
    path = folder / name
    if name in {"", ".", ".."} or "/" in name or leads_outside(path, folder):
        raise CheckpointError(f"{index} names {name!r}, which leads outside the folder: it is not opened")
    if not is_file(path):
        raise CheckpointError(f"{index} names the shard {name}, which does not exist: download it again")
    return path


def leads_outside(path: Path, folder: Path) -> bool:
    """Return whether a file of a model folder is a link to somewhere else.

    The hub's cache is no other place: there the files are links into the blobs beside the snapshots.
    """
    root = os.path.realpath(folder)
    roots = [root]
    if Path(root).parent.name == "snapshots":
        roots.append(os.path.realpath(Path(root).parent.parent / "blobs"))
    return not any(Path(os.path.realpath(path)).is_relative_to(each) for each in roots)


def note_file(file_of: dict[str, Path], name: str, file: Path) -> None:
    """Note which file holds a tensor.

    Raises:
        CheckpointError: Another file holds a tensor of this name too.
    """
    first = file_of.setdefault(name, file)
    if first != file:
        raise CheckpointError(f"{name} is in both {first.name} and {file.name}: keep one of them")


def check_index(shards: Mapping[Path, set[str]], file_of: Mapping[str, Path]) -> None:
    """Check that every tensor is in the shard that the index says.

    Args:
        shards: From `find_shards`.
        file_of: The file that holds each tensor, by the tensor's name.

    Raises:
        CheckpointError: A shard lacks a tensor.
    """
    for path, expected in shards.items():
        missing = sorted(name for name in expected if file_of.get(name) != path)
        if missing:
            raise CheckpointError(
                f"the index says that {path} holds {missing[0]}, but it does not "
                f"({len(missing)} such tensors): download both again"
            )


def is_of(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a file's name is one of these."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files to copy along with the weights: tokenizer, templates, generation config, license.

    Raises:
        CheckpointError: One of them is a link that leads outside the folder, or `generation_config.json` is damaged.
    """
    found = tuple(
        path
        for path in list_folder(folder)
        if not path.name.endswith((".py", ".index.json")) and is_of(path.name, SIDE_FILES) and is_file(path)
    )
    for path in found:
        if leads_outside(path, folder):
            raise CheckpointError(f"{path} is a link that leads outside the folder: put a copy in its place")
        if path.name == GENERATION_CONFIG:  # from_pretrained reads it: with a damaged one no model is loaded
            read_json_object(path, CONFIG_BYTES)
    return found
