"""Damage of safetensors files: length, header, data, and the tensors that they hold."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.damage import files, jsons

Tensors = dict[str, torch.Tensor]
Change = Callable[[Random, Tensors, str], None]
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)


def file_of(rng: Random, src: Path) -> Path:
    return rng.choice(sorted(src.glob("*.safetensors")))


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _join(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def bits(rng: Random, src: Path) -> str:
    path = file_of(rng, src)
    start, stop = rng.choice(((0, 8), (8, 400), (8, 4000), (0, None)))
    return files.flip(rng, path, start, stop)


def cut(rng: Random, src: Path) -> str:
    return rng.choice((files.truncate, files.append, files.overwrite))(rng, file_of(rng, src))


def place(rng: Random, src: Path) -> str:
    return files.in_its_place(rng, file_of(rng, src))


def length(rng: Random, src: Path) -> str:
    path = file_of(rng, src)
    size = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, 10**8 - 1, 10**8 + 1, path.stat().st_size))
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return f"{path.name} says that its header has {size} bytes"


def header_text(rng: Random, src: Path) -> str:
    path = file_of(rng, src)
    header, body = _split(path)
    path.write_text(json.dumps(header))
    said = files.of_text(rng, path)
    _join(path, path.read_bytes(), body)
    return f"header of {said}"


def header_values(rng: Random, src: Path) -> str:
    path = file_of(rng, src)
    header, body = _split(path)
    said = jsons.mutate(rng, header, ("__metadata__", "model.norm.weight", "x\nError: y\x1b[1m"))
    _join(path, json.dumps(header).encode(), body)
    return f"header of {path.name}: {said}"


def header_entry(rng: Random, src: Path) -> str:
    """Damage one tensor's entry in a way that keeps it an entry."""
    path = file_of(rng, src)
    header, body = _split(path)
    name, other = rng.sample([name for name in header if name != "__metadata__"] * 2, 2)
    entry = header[name]
    start, end = entry["data_offsets"]
    changes: tuple[dict[str, object], ...] = (
        {"dtype": rng.choice(("F16", "F64", "I8", "F8_E4M3", "BOOL", "C64", "f32", "F4", "U16"))},
        {"shape": entry["shape"][::-1]},
        {"shape": [*entry["shape"], 1]},
        {"shape": [*entry["shape"], 0]},
        {"shape": [2**32, 2**32]},
        {"shape": []},
        {"data_offsets": [start + 4, end + 4]},
        {"data_offsets": [start, end - 4]},
        {"data_offsets": [end, start]},
        {"data_offsets": [-4, end]},
        {"data_offsets": [start, 2**63]},
        {"data_offsets": header[other]["data_offsets"]},
    )
    change = rng.choice(changes)
    entry.update(change)
    _join(path, json.dumps(header).encode(), body)
    return f"{path.name}: {name} with {change}"


def layout(rng: Random, src: Path) -> str:
    """A header that parses, and whose parts do not lie as they should."""
    path = file_of(rng, src)
    header, body = _split(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    said = rng.choice(("gap", "later", "empty", "shared", "twice", "padded", "metadata", "unsorted", "large metadata"))
    match said:
        case "gap" | "later":
            size = rng.choice((1, 8, 4096))
            for entry in header.values():
                if "data_offsets" in entry and (said == "later" or entry["data_offsets"][0] > 0):
                    entry["data_offsets"] = [place + size for place in entry["data_offsets"]]
            body = b"\0" * size + body
        case "empty":
            shape = rng.choice(([0], [0, 2**62], [2**40, 0], [0] * 65, [0] * 64))
            header[rng.choice(("none", "model.layers.0.mlp.none", ""))] = {"dtype": "F32", "shape": shape,
                                                                           "data_offsets": [0, 0]}  # fmt: skip
        case "shared":
            header["again"] = header[name]
        case "metadata":
            header["__metadata__"] = rng.choice(({"format": 1}, {"format": "tf"}, {"x": {"y": ""}}, [], "pt"))
        case "large metadata":
            header["__metadata__"] = {str(i): "x" * 100 for i in range(100_000)}
        case "unsorted":
            header = dict(rng.sample([*header.items()], len(header)))
    raw = json.dumps(header)
    if said == "twice":
        raw = f'{{"{name}": {json.dumps(header[name])}, {raw[1:]}'
    _join(path, raw.encode() + b" " * (5_000_000 if said == "padded" else 0), body)
    return f"{path.name}: {said}"


def tensors(rng: Random, src: Path) -> str:
    """A well-formed file that holds other tensors than the model has."""
    path = file_of(rng, src)
    held = load_file(path)
    name = rng.choice(sorted(held))
    said, change = rng.choice(CHANGES)
    change(rng, held, name)
    save_file({key: value.contiguous() for key, value in held.items()}, path, {"format": "pt"})
    return f"{path.name}: {name} {said}"


def _recast(rng: Random, held: Tensors, name: str) -> None:
    held[name] = held[name].to(rng.choice(DTYPES))


def _rename(rng: Random, held: Tensors, name: str) -> None:
    far = "model.layers.9999999999.mlp.up_proj.weight"
    odd = ("x", "x\nError: y", "[/b]\x1b[1m", "a/../b", far, "y" * 5000, "\u202e")
    held[rng.choice(odd)] = held.pop(name)


def _nan(rng: Random, held: Tensors, name: str) -> None:
    held[name].flatten()[rng.randrange(held[name].numel())] = rng.choice((float("nan"), float("inf")))


def _extra(rng: Random, held: Tensors, name: str) -> None:
    held[rng.choice(("extra", "model.layers.3.mlp.up_proj.weight", "é[b]\n", "model.layers.0.x"))] = held[name].clone()


def _replaced(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda rng, held, name: held.__setitem__(name, make(held[name]).clone())


CHANGES: tuple[tuple[str, Change], ...] = (
    ("missing", lambda rng, held, name: held.__delitem__(name)),
    ("with another beside it", _extra),
    ("renamed", _rename),
    ("transposed", _replaced(lambda tensor: tensor.t() if tensor.dim() == 2 else tensor[:, None])),
    ("with fewer rows", _replaced(lambda tensor: tensor[:-1])),
    ("with more rows", _replaced(lambda tensor: torch.cat((tensor, tensor)))),
    ("a scalar", _replaced(lambda tensor: tensor.flatten()[0])),
    ("without rows", _replaced(lambda tensor: tensor[:0])),
    ("of another dtype", _recast),
    ("with NaN or Inf", _nan),
)  # fmt: skip
