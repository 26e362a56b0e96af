"""Several processes write what one writes; those that are killed leave their shards to the caller."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from moeify.checkpoint.shards import OutTensor, Shard, plan_shards
from moeify.checkpoint.workers import write_with_workers
from moeify.errors import CheckpointError
from tests.moeify import tiny
from tests.moeify.checkpoint.test_writer import upcycled, write, write_source
from tests.moeify.command import moeify_command

Tell = Callable[[int], None]
Name = Callable[[str], None]


@dataclass
class Here:
    write: Callable[[Shard], None]


def shards(count: int) -> list[Shard]:
    made = [OutTensor(f"t{n}", "U8", (4,), (lambda: torch.zeros(4, dtype=torch.uint8),)) for n in range(count)]
    return list(plan_shards(made, 4))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [2, 5, 99])
def test_any_number_writes_the_same_files(workers: int, tmp_path: Path) -> None:
    source, counts = write_source(tmp_path / "source"), {1: 0, workers: 0}
    for each in counts:

        def count(nbytes: int, each: int = each) -> None:
            counts[each] += nbytes

        write(source, tmp_path / str(each), upcycled(source), workers=each, on_bytes=count)
    assert contents(tmp_path / "1") == contents(tmp_path / str(workers)) and counts[1] == counts[workers] > 0


def test_a_whole_conversion_is_the_same_to_the_last_byte(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    words = [str(src), "--experts", "4", "--top-k", "2", "--method", "noise", "--shard-size", "60KB", "--no-verify"]
    for folder, more in (("one", []), ("two", ["--workers", "2"]), ("three", ["--workers=3"])):
        result = moeify_command("convert", words[0], tmp_path / folder / "moe", *words[1:], *more)
        assert result.exit_code == 0, result.output
    one, two, three = (contents(tmp_path / folder / "moe") for folder in ("one", "two", "three"))
    assert len(one) > 4
    for other, folder in ((two, "two"), (three, "three")):
        card = other.pop("README.md").replace(f"/{folder}/".encode(), b"/one/")
        assert {**other, "README.md": card} == one


def test_the_shards_of_a_killed_worker_are_left(tmp_path: Path) -> None:
    parent, told = os.getpid(), 0

    def writer(on_bytes: Tell, on_nonfinite: Name) -> Here:
        def write_one(shard: Shard) -> None:
            on_bytes(3)
            if shard.name.startswith("model-00004"):
                os.kill(os.getpid(), signal.SIGKILL)
            (tmp_path / shard.name).touch()
            on_bytes(1)

        assert os.getpid() != parent
        return Here(write_one)

    def count(nbytes: int) -> None:
        nonlocal told
        told += nbytes

    left = write_with_workers(shards(8), 2, writer, count, print)
    assert [shard.name[:11] for shard in left] == ["model-00004", "model-00006", "model-00008"]
    assert told == 4 * 5 and len(list(tmp_path.iterdir())) == 5


def test_what_a_worker_raises_stops_all_and_names_are_told_once(tmp_path: Path) -> None:
    named: list[str] = []

    def writer(on_bytes: Tell, on_nonfinite: Name) -> Here:
        def write_one(shard: Shard) -> None:
            on_nonfinite("weight")
            if shard.name.startswith("model-00003"):
                raise CheckpointError("the source became shorter")

        return Here(write_one)

    assert write_with_workers(shards(2), 2, writer, print, named.append) == [] and named == ["weight"]
    with pytest.raises(CheckpointError, match="the source became shorter"):
        write_with_workers(shards(4), 2, writer, print, named.append)

    def refuse(name: str) -> None:
        raise CheckpointError(f"{name} holds NaN")

    with pytest.raises(CheckpointError, match="weight holds NaN"):
        write_with_workers(shards(2), 2, writer, print, refuse)


def test_an_interrupt_leaves_no_worker_behind() -> None:
    def writer(on_bytes: Tell, on_nonfinite: Name) -> Here:
        def write_one(shard: Shard) -> None:
            on_bytes(1)
            time.sleep(60)

        return Here(write_one)

    def interrupt(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with_workers(shards(4), 2, writer, interrupt, print)
    assert active_children() == []
