"""What an interrupted run left beside its output, damaged: its journal, its shards, and what stands in their places."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NoReturn

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from tests.fuzz.damage import files, jsons

WORK_FOLDER = ".dst.moeify-partial"
_NAMES = ("dst", "../foreign.txt", "/etc/passwd", "", "..", "a\nb", "x" * 300, ".dst.other", "src")


def _stop(_: Path) -> NoReturn:
    raise KeyboardInterrupt


def interrupted(src: Path) -> Path:
    """Interrupt a conversion of a model to `dst` when everything is written; return the folder of its files."""
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, MoEConfig(3, 2), "all", "auto")
        with suppress(KeyboardInterrupt):
            convert_checkpoint(dense, plan, Output(src.parent / "dst", shard_size=9000), Callbacks(check=_stop))
    return src.parent / WORK_FOLDER


def work(rng: Random, src: Path) -> str:
    """Some file that is kept is another."""
    folder = interrupted(src)
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.stat().st_size == 0 or rng.random() < 0.4:
        return "kept: " + files.in_its_place(rng, path)
    return "kept: " + files.of_bytes(rng, path)


def journal(rng: Random, src: Path) -> str:
    """The journal says what no run has written."""
    lock = interrupted(src) / "lock"
    name = rng.choice(_NAMES)
    value = rng.choice(({}, {name: 1}, {name: src.stat().st_ino}, {name: (src.parent / "foreign.txt").stat().st_ino},
                        {name: rng.choice(jsons.ODD)}, rng.choice(jsons.ODD)))  # fmt: skip
    with lock.open("a") as file:
        file.write(json.dumps({"placing": value}) + rng.choice(("\n", "", "\n[]\n", "\n{", "\n" + "[" * 9999)))
    if rng.random() < 0.3:
        (lock.parent / "old").rmdir()
    return f"the journal says that {value!r} is placed"[:160]


def planted(rng: Random, src: Path) -> str:
    """Something of somebody else has the name of the folder, or is in it."""
    folder = src.parent / WORK_FOLDER
    match rng.choice(("in its place", "in it", "link", "link in it")):
        case "in its place":
            return files.in_its_place(rng, folder)
        case "in it":
            (interrupted(src) / "foreign.txt").write_text("a file of somebody else")
            return "a foreign file in the work folder"
        case "link":
            folder.symlink_to(rng.choice((".dst.other", "src", "..", "nowhere")))
            return "a link as work folder"
    name = rng.choice(("new", "old", "gone"))
    place = interrupted(src) / name
    if place.exists():
        place.rename(src.parent / "foreign")
    place.symlink_to("../" + rng.choice(("foreign", ".dst.other", "src")))
    return f"a link as {name} in the work folder"
