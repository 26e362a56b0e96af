from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, active_count
from typing import Any

import pytest

from moeify.checkpoint import copy_bytes
from moeify.checkpoint.copy_bytes import copy_span, write_all
from moeify.checkpoint.tensor_info import Span
from moeify.errors import CheckpointError

DATA = bytes(range(251)) * 40


def kernel_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is."""


def kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)


def kernel_gives_up_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range
    calls = iter(range(3))

    def few(src: int, dst: int, count: int, offset_src: int | None = None) -> int:
        return 0 if next(calls, None) is None else real(src, dst, min(count, 17), offset_src=offset_src)

    monkeypatch.setattr(os, "copy_file_range", few)


def kernel_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")


@pytest.mark.parametrize("kernel", [kernel_copies, kernel_refuses, kernel_gives_up_half_way, kernel_has_no_such_call])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, len(DATA)), (13, 5001), (len(DATA), 0)])
def test_appends_the_span(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Callable[[pytest.MonkeyPatch], None],
    offset: int,
    nbytes: int,
) -> None:
    kernel(monkeypatch)
    monkeypatch.setattr(copy_bytes, "STEP", 1000)
    (tmp_path / "src").write_bytes(DATA)
    progress: list[int] = []
    with (tmp_path / "dst").open("wb", buffering=0) as file:
        write_all(file, memoryview(b"before"))
        copy_span(Span(tmp_path / "src", offset, nbytes), file, progress.append)
        write_all(file, memoryview(b"after"))
    assert (tmp_path / "dst").read_bytes() == b"before" + DATA[offset : offset + nbytes] + b"after"
    assert sum(progress) == nbytes
    assert all(0 < count <= 1000 for count in progress)


def test_a_source_that_became_shorter(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(DATA)
    with (tmp_path / "dst").open("wb", buffering=0) as file, pytest.raises(CheckpointError, match="became shorter"):
        copy_span(Span(tmp_path / "src", 10, len(DATA)), file, lambda _: None)


def test_writes_in_pieces_where_the_system_takes_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, raw: real(fd, raw[:7]))
    with (tmp_path / "dst").open("wb", buffering=0) as file:
        write_all(file, memoryview(DATA))
    assert (tmp_path / "dst").read_bytes() == DATA


def test_the_disk_is_asked_meanwhile_and_its_errors_wait_for_the_sync_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, before = Event(), active_count()

    def fdatasync(_: int) -> None:
        asked.set()
        raise OSError("no space left")

    monkeypatch.setattr(copy_bytes, "_EVERY", 0.001)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with (tmp_path / "file").open("wb", buffering=0) as file, copy_bytes.synced_meanwhile(file):
        assert asked.wait(20)
    assert active_count() == before
