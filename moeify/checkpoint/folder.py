"""Finding the files of a model in a folder of Hugging Face layout, without trusting any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

from moeify.errors import CheckpointError

JsonObject: TypeAlias = dict[str, Any]

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"

# The files that belong to a model beside its weights and its config. This is a list of what to copy and not of what to
# leave out: model folders also collect training state, code and notes on the dense model, which would be wrong beside
# the converted model.
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def index_name(weights: str) -> str:
    """Return the name of the index that belongs to a sharded `model.safetensors` or `pytorch_model.bin`."""
    return f"{weights}.index.json"


def load_json(path: Path) -> JsonObject:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download or copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def load_config(folder: Path, *, trust_remote_code: bool) -> JsonObject:
    """Read `config.json` and refuse a model that cannot be converted as it is.

    Raises:
        CheckpointError: The file is missing or damaged, the weights are quantized, or the model needs remote code.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has weights but no {CONFIG}: add the one that the model was published with")
    config = load_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / CONFIG} names no model_type: it is not the config of a transformers model")
    if "auto_map" in config and not trust_remote_code:
        raise CheckpointError(
            f"{folder} asks to run Python code of its own (auto_map in {CONFIG}): "
            "read that code, and pass --trust-remote-code if you trust it"
        )
    quantization = config.get("quantization_config")
    if quantization:
        scheme = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        if scheme != "moeify":
            raise CheckpointError(
                f"{folder} is quantized (scheme: {scheme}) and cannot be converted: dequantize it first, "
                "or start from the checkpoint before quantization"
            )
    return config


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
    if (folder / weights).is_file():
        return {folder / weights: set()}
    index = folder / index_name(weights)
    if not index.is_file():
        return None
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names: download it again")
    shards: dict[Path, set[str]] = {}
    for shard in sorted(set(weight_map.values())):
        path = _inside(folder, shard, index)
        if not path.is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which does not exist: download it again")
        shards[path] = {name for name, home in weight_map.items() if home == shard}
    return shards


def _inside(folder: Path, name: str, index: Path) -> Path:
    """Return the path of a shard, and refuse one outside the folder."""
    path = folder / name
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub's cache: files are links into the blobs beside the snapshots
        roots.append((folder.parent.parent / "blobs").resolve())
    if ".." in Path(name).parts or Path(name).is_absolute() or not any(map(path.resolve().is_relative_to, roots)):
        raise CheckpointError(f"{index} names {name!r}, which leads outside the folder: it is not opened")
    return path


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


def side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files to copy along with the weights: tokenizer, templates, generation config, license."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.endswith((".py", ".index.json"))
        and any(fnmatch(path.name, pattern) for pattern in SIDE_FILES)
    )
