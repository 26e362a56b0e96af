"""Folders as the ranks of a distributed run of transformers write them: each file holds a part of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FILE = "shard-{:05}-model-00001-of-00001.safetensors"
Part = dict[str, tuple[Tensor, list[int]]]  # and where it begins


def write_parts(folder: Path, parts: list[Part]) -> None:
    """Write one file for each rank."""
    for rank, part in enumerate(parts, start=1):
        offsets = {name: {"saved_offsets": start} for name, (_, start) in part.items()}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        values = {name: value.clone().contiguous() for name, (value, _) in part.items()}
        save_file(values, folder / FILE.format(rank), metadata)


def halves(tensors: dict[str, Tensor]) -> list[Part]:
    """Give two ranks half of the rows each."""

    def rows(value: Tensor, begin: int, end: int) -> tuple[Tensor, list[int]]:
        return value[begin:end], [begin, *[0] * (value.dim() - 1)]

    middle = {name: (len(value) + 1) // 2 for name, value in tensors.items()}
    first = {name: rows(value, 0, middle[name]) for name, value in tensors.items()}
    return [first, {name: rows(value, middle[name], len(value)) for name, value in tensors.items()}]
