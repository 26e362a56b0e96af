"""Parts of a conversion, joined, are what one run writes; what does not belong together is not joined."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.parts import convert_part, join_parts
from moeify.errors import CheckpointError
from moeify.plan import Plan
from tests.moeify import tiny
from tests.moeify.command import moeify_command

Do = Callable[..., Any]
NOISE = MoEConfig(4, 2, method="noise")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("parts") / "src")


@pytest.fixture(scope="module")
def whole(src: Path) -> dict[str, bytes]:
    run(src, src.parent / "one" / "moe", convert_checkpoint)
    return contents(src.parent / "one" / "moe")


@functools.cache
def planned(src: Path, config: MoEConfig) -> tuple[DenseCheckpoint, Plan]:
    dense = DenseCheckpoint(open_source(src))
    return dense, plan_checkpoint(dense, config)


def run(src: Path, dst: Path, do: Do, *part: int, config: MoEConfig = NOISE, size: int = 60_000, **how: Any) -> Any:
    callbacks = {name: how.pop(name) for name in ("check", "written") if name in how}
    return do(*planned(src, config), Output(dst, size, **how), Callbacks(**callbacks), *part)


def test_parts_in_any_order_are_what_one_run_writes(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    dst = tmp_path / "there" / "moe"
    assert run(src, dst, convert_part, 3, 3) == [1, 2]
    assert run(src, dst, convert_part, 1, 3, workers=2) == [2]
    assert run(src, dst, convert_part, 1, 3) == [2]  # it is there
    assert sorted(os.listdir(dst.parent)) == ["moe.part-1-of-3", "moe.part-3-of-3"]
    assert run(src, dst, convert_part, 2, 3) == []
    assert contents(dst) == whole and len(whole) > 8 and os.listdir(dst.parent) == ["moe"]


def test_more_parts_than_files_and_no_links(
    src: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("moeify.files.parts.os.link", refuse)
    for number in range(1, 13):
        left = run(src, tmp_path / "moe", convert_part, number, 12)
    assert left == [] and contents(tmp_path / "moe") == whole


def test_a_killed_part_goes_on_where_it_was(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    written = 0

    def die(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > 100_000:
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        run(src, tmp_path / "moe", convert_part, 2, 2, written=die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    begun = list((tmp_path / ".moe.part-2-of-2.moeify-partial" / "new" / "moe.part-2-of-2").glob("model-*"))
    kept = {path.name: path.stat().st_ino for path in begun}
    assert run(src, tmp_path / "moe", convert_part, 1, 2) == [2] and kept
    assert run(src, tmp_path / "moe", convert_part, 2, 2) == []
    assert contents(tmp_path / "moe") == whole
    assert all((tmp_path / "moe" / name).stat().st_ino == inode for name, inode in kept.items())


def test_a_join_that_fails_or_is_stopped_leaves_the_parts(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    def stop(_: Path) -> NoReturn:
        raise KeyboardInterrupt

    def fail(_: Path) -> NoReturn:
        raise CheckpointError("it computes something else")

    run(src, tmp_path / "moe", convert_part, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "moe", convert_part, 2, 2, check=stop)
    with pytest.raises(CheckpointError, match="something else"):
        run(src, tmp_path / "moe", convert_part, 2, 2, check=fail)
    run(src, tmp_path / "moe", join_parts)
    assert contents(tmp_path / "moe") == whole and os.listdir(tmp_path) == ["moe"]


def test_of_two_that_end_together_one_joins(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    others = []

    def meanwhile(_: Path) -> None:
        others.append(run(src, tmp_path / "moe", convert_part, 1, 2))

    run(src, tmp_path / "moe", convert_part, 1, 2)
    assert run(src, tmp_path / "moe", convert_part, 2, 2, check=meanwhile) == []
    assert others == [None] and contents(tmp_path / "moe") == whole


def test_what_is_of_another_conversion_is_refused(src: Path, tmp_path: Path) -> None:
    dst, other = tmp_path / "moe", tiny.save(tiny.build("llama"), tmp_path / "other")

    def refused(words: str, do: Do, *part: int, model: Path = src, **how: Any) -> None:
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(CheckpointError, match=words) as caught:
            run(model, dst, do, *part, **how)
        assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == before

    refused("has no parts beside it to join", join_parts)
    run(src, dst, convert_part, 1, 2)
    refused(r"of its 2 parts these are not finished: 2; run them", join_parts)
    refused(r"part-1-of-2 is a part of another division of .*moe than 3", convert_part, 2, 3)
    refused(r"\(part 1 of 2\) was written for another source: give", convert_part, 2, 2, model=other)
    refused("for another plan, settings or dtype", convert_part, 2, 2, config=MoEConfig(4, 2, method="noise", seed=1))
    refused("for another plan, settings or dtype", convert_part, 2, 2, dtype="BF16")
    refused("for another --shard-size", convert_part, 2, 2, size=50_000)

    def fail(_: Path) -> NoReturn:
        raise CheckpointError("not yet")

    with suppress(CheckpointError):
        run(src, dst, convert_part, 2, 2, check=fail)
    shard = next((tmp_path / "moe.part-1-of-2").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("part-1-of-2 is damaged: remove it, and run the part again", join_parts)


def test_parts_that_began_together_are_compared_when_they_are_joined(src: Path, tmp_path: Path) -> None:
    run(src, tmp_path / "moe", convert_part, 1, 2)
    record = tmp_path / "moe.part-1-of-2" / ".moeify-part"

    def meanwhile(_: int) -> None:
        record.write_text(record.read_text().upper())

    with pytest.raises(CheckpointError, match=r"\(part 1 of 2\) was written for another source"):
        run(src, tmp_path / "moe", convert_part, 2, 2, written=meanwhile)
    assert not (tmp_path / "moe").exists()


def test_the_command(src: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    words = ["convert", str(src), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2", "--method", "noise"]
    words += ["--shard-size", "60KB", "--no-verify"]
    one = moeify_command(*words)
    assert one.exit_code == 0, one.output
    (tmp_path / "moe").rename(tmp_path / "one")
    first = moeify_command(*words, "--part", "2/2", "--workers=2")
    assert first.exit_code == 0 and "part 2/2 is written" in first.output and "are: 1" in first.output, first.output
    last = moeify_command(*words, "--part=1/2")
    assert last.exit_code == 0 and "written to" in last.output, last.output
    assert contents(tmp_path / "moe") == contents(tmp_path / "one")  # the card, too
    for wrong, text in (
        (["--part", "0/2"], "is no part: write 1/4"),
        (["--part", "2/2", "--join"], "go without each other"),
        (["--join", "--dry-run"], "without --dry-run"),
        (["--join"], "exists"),
    ):
        result = moeify_command(*words, *wrong)
        assert result.exit_code in (1, 2) and text in result.output and "Traceback" not in result.output
