"""Damage of an index, and of the shards that it names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from tests.fuzz.damage import files, jsons

INDEX = "model.safetensors.index.json"
NAMES = (
    "..", ".", "", "../outside.safetensors", "/etc/passwd", "a/b.safetensors", "a\0b.safetensors", "x" * 300,
    "\ud800.safetensors", "[/b]\n.safetensors", "model-00009-of-00009.safetensors", "config.json", "~/x", "C:\\x",
    "./model-00001-of-00002.safetensors", "/dev/stdin", "/proc/self/mem", "MODEL.safetensors", " ", "a\u202eb",
)  # fmt: skip


def shard_names(rng: Random, src: Path) -> str:
    """Some tensor stands in a file of another name."""
    path = src / INDEX
    data = json.loads(path.read_text())
    name, file = rng.choice(sorted(data["weight_map"])), rng.choice((*NAMES, *set(data["weight_map"].values())))
    data["weight_map"][name] = file
    path.write_text(json.dumps(data))
    return f"the index says that {name} is in {file[:40]!r}"


def aliased(rng: Random, src: Path) -> str:
    """A shard is in the index under a second name, which is a file too."""
    path = src / INDEX
    data = json.loads(path.read_text())
    held = rng.choice(sorted(set(data["weight_map"].values())))
    other = rng.choice(("other.safetensors", "model-00000-of-00002.safetensors", "./" + held, "x/../" + held))
    if "/" not in other:
        (os.link if rng.random() < 0.5 else os.symlink)(src / held, src / other)
    moved = [name for name, shard in data["weight_map"].items() if shard == held]
    for name in moved[: rng.randint(1, len(moved))]:
        data["weight_map"][name] = other
    path.write_text(json.dumps(data))
    return f"{held} is in the index as {other} too"


values = files.at(INDEX, jsons.of_values)
place = files.at(INDEX, files.in_its_place)


def text(rng: Random, src: Path) -> str:
    return rng.choice((files.of_text, files.flip))(rng, src / INDEX)


def shard(rng: Random, src: Path) -> str:
    path = rng.choice(sorted(src.glob("model-*.safetensors")))
    return rng.choice((files.of_bytes, files.in_its_place))(rng, path)


def shards(rng: Random, src: Path) -> str:
    """A shard under the name of another, twice, or reached through a link."""
    one, other = rng.sample(sorted(src.glob("model-*.safetensors")), 2)
    match rng.choice(("swap", "copy", "link", "outside")):
        case "swap":
            os.rename(one, src / "x")
            os.rename(other, one)
            os.rename(src / "x", other)
        case "copy":
            one.write_bytes(other.read_bytes())
        case "link":
            one.unlink()
            one.symlink_to(other.name)
        case _:
            os.rename(one, src.parent / "outside.safetensors")
            one.symlink_to("../outside.safetensors")
    return f"{one.name} and {other.name} mixed"
