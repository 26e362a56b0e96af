"""A dense source as a GGUF file, and as the native folder that the file must hold, read by other means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from moeify.conversion.checkpoint import Callbacks
from moeify.conversion.gguf import GgufOutput, convert_to_gguf
from sweeps.dense_sources import build
from sweeps.families import NOISE, Measured

Array = np.ndarray[Any, Any]


def made(name: str, target: str, room: Path) -> tuple[Any, dict[str, Array], dict[str, Any]]:
    """The file, and the tensors and the config of the folder, with experts that differ."""
    source = Measured(build(name), room)
    convert_to_gguf(source.dense, source.convert(target, NOISE), GgufOutput(room / "moe.gguf"), Callbacks())
    native = load_file(room / "dst/model.safetensors")
    config = json.loads((room / "dst/config.json").read_text())
    return gguf.GGUFReader(room / "moe.gguf"), {name: each.float().numpy() for name, each in native.items()}, config


def values(reader: Any, name: str) -> Array:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    found: Array = tensor.data.reshape(tuple(tensor.shape)[::-1])
    return found


def key(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def in_pairs(rows: Array, heads: int) -> Array:
    """Row 2j + s of a head is row j of its half s."""
    size, out = len(rows) // heads, np.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                out[head * size + 2 * pair + half] = rows[head * size + half * size // 2 + pair]
    return out
