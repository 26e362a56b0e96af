"""Damage of files that hold parts of tensors: where the parts belong, and which files there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fuzz.damage import jsons, safetensors

_KEY = "DCP_SHARDING_INFO"


def offsets(rng: Random, src: Path) -> str:
    """Some entry of what says where parts begin is another value, or the whole is no JSON, or is not there."""
    path = safetensors.file_of(rng, src)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    text = src / "metadata.json"
    text.write_text(metadata[_KEY])
    said = rng.choice((jsons.of_values, jsons.of_values, _shifted))(rng, text)
    metadata[_KEY] = text.read_text()
    text.unlink()
    if rng.random() < 0.1:
        metadata[_KEY] = metadata[_KEY][: rng.randint(0, 40)]
    save_file(load_file(path), path, metadata)
    return f"in {path.name}, {said}"


def _shifted(rng: Random, text: Path) -> str:
    places = json.loads(text.read_text())
    name = rng.choice(sorted(places))
    start = places[name]["saved_offsets"]
    start[rng.randrange(len(start))] += rng.choice((-1, 1, 3, 2**40))
    text.write_text(json.dumps(places))
    return f"{name} begins at {start}"


def files_of_ranks(rng: Random, src: Path) -> str:
    """A rank's file is missing, is there twice, or has another number."""
    path = safetensors.file_of(rng, src)
    other = path.with_name(
        f"shard-{rng.choice((0, 3, 9, 99999)):05}-model-0000{rng.randint(0, 2)}-of-00002.safetensors"
    )
    match rng.randrange(3):
        case 0:
            path.unlink()
            return f"{path.name} is missing"
        case 1:
            shutil.copy(path, other)
            return f"{path.name} is there as {other.name} too"
    path.rename(other)
    return f"{path.name} is called {other.name}"
