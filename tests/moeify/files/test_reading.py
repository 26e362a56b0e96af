from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.files import reading


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "it is a folder, expected a regular file"),
        (make_pipe, "it is a pipe, expected a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, expected a regular file"),
        (make_socket, "No such device or address"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"12345"), "it holds 5 bytes, expected at most 4"),
    ],
)
def test_what_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = tmp_path / "file"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        reading.read_bytes(path, 4)
    assert str(caught.value) == f"{path} cannot be read: {reason}"


@pytest.mark.parametrize(("name", "reason"), [("a" * 256, "File name too long"), ("a\0b", "null"), ("\ud800", "utf-8")])
def test_a_name_that_no_file_has(tmp_path: Path, name: str, reason: str) -> None:
    for ask in (reading.state_of, reading.is_file, reading.is_folder, lambda path: reading.read_bytes(path, 4)):
        with pytest.raises(CheckpointError, match=f"cannot be read: .*{reason}"):
            ask(tmp_path / name)
    assert not reading.exists(tmp_path / name)


def test_a_file_up_to_the_limit_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("file")
    assert reading.read_bytes(tmp_path / "link", 4) == b"1234"
    with reading.opened(tmp_path / "file") as file:
        assert not os.get_inheritable(file.fileno()) and file.read() == b"1234"
    assert file.closed


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moeify.files.reading.os.open", refuse)
    with pytest.raises(CheckpointError, match="file cannot be read: Permission denied"):
        reading.read_bytes(tmp_path / "file", 4)


def test_what_there_is_at_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    make_pipe(tmp_path / "pipe")
    names = ("file", "folder", "pipe", "nothing", "file/inside")
    found = {name: (reading.exists(p), reading.is_file(p), reading.is_folder(p))
             for name in names for p in [tmp_path / name]}  # fmt: skip
    assert found == {
        "file": (True, True, False),
        "folder": (True, False, True),
        "pipe": (True, False, False),
        "nothing": (False, False, False),
        "file/inside": (False, False, False),
    }
    assert [path.name for path in reading.list_folder(tmp_path)] == ["file", "folder", "pipe"]
    with pytest.raises(CheckpointError, match="file cannot be read: Not a directory"):
        reading.list_folder(tmp_path / "file")


def test_the_home_of_a_user_who_is_not_there() -> None:
    assert reading.user_path("~/model") == Path.home() / "model"
    with pytest.raises(CheckpointError, match="~nosuchuser/model cannot be read: there is no such user"):
        reading.user_path("~nosuchuser/model")


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"12"), lambda path: os.utime(path, ns=(0, 0))])
def test_a_file_that_changed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    state = reading.state_of(path)
    reading.check_unchanged(path, state)
    change(path)
    with pytest.raises(CheckpointError, match="file changed while it was read"):
        reading.check_unchanged(path, state)
