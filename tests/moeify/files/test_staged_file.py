from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.files.staging import check_file, staged_file, write_whole
from tests.moeify.files.disk_faults import tree


def pair(path: Path, text: str, *, overwrite: bool = False, data: bool = True) -> None:
    with staged_file(path, overwrite=overwrite, companion=".data") as staged:
        staged.write_text(text)
        if data:
            Path(f"{staged}.data").write_text(text)


def test_a_file_and_its_companion_come_and_go_together(tmp_path: Path) -> None:
    path = tmp_path / "a" / "m.onnx"
    pair(path, "one")
    assert tree(tmp_path / "a") == {"m.onnx": b"one", "m.onnx.data": b"one"}
    pair(path, "two", overwrite=True, data=False)
    assert tree(tmp_path / "a") == {"m.onnx": b"two"}
    pair(path, "three", overwrite=True)
    assert tree(tmp_path / "a") == {"m.onnx": b"three", "m.onnx.data": b"three"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["data alone", "data folder", "data link", "both", "folder", "fifo"])
def test_what_an_output_file_may_not_replace(what: str, overwrite: bool, tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    if what in {"both", "data folder"}:
        path.write_text("mine")
    if what in {"data alone", "both"}:
        data.write_text("mine")
    if what == "data folder":
        data.mkdir()
    if what == "data link":
        data.symlink_to(tmp_path / "nowhere")
    if what == "folder":
        path.mkdir()
    if what == "fifo":
        os.mkfifo(path)
    before = {path: path.lstat().st_ino for path in tmp_path.iterdir()}
    message = {
        "data alone": r"m\.onnx\.data would be replaced, and there is no .*m\.onnx that it belongs to",
        "data folder": r"m\.onnx\.data is in the way of .*m\.onnx and is no file",
        "data link": r"m\.onnx\.data is in the way of .*m\.onnx and is no file",
        "both": r"m\.onnx exists: choose another name, or overwrite it \(--overwrite\)",
        "folder": r"m\.onnx is a folder: name the file, for example",
        "fifo": r"m\.onnx is in the way of .*m\.onnx and is no file",
    }[what]
    if what == "both" and overwrite:
        pair(path, "new", overwrite=True)
        assert tree(tmp_path) == {"m.onnx": b"new", "m.onnx.data": b"new"}
        return
    with pytest.raises(CheckpointError, match=message):
        check_file(path, overwrite=overwrite, companion=".data")
    with pytest.raises(CheckpointError, match=message):
        pair(path, "new", overwrite=overwrite)
    assert {path: path.lstat().st_ino for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_file_that_appears_meanwhile_stays(name: str, overwrite: bool, tmp_path: Path) -> None:
    if overwrite and name == "m.onnx":
        return  # it is asked for
    message = "exists|would be replaced"
    with (
        pytest.raises(CheckpointError, match=message),
        staged_file(tmp_path / "m.onnx", overwrite=overwrite, companion=".data") as staged,
    ):
        staged.write_text("new")
        Path(f"{staged}.data").write_text("new")
        (tmp_path / name).write_text("mine")
    assert tree(tmp_path) == {name: b"mine"}


def test_what_appears_in_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def late(path: Path, place: Path) -> None:
        if Path(place).parent == tmp_path:
            Path(place).write_text("mine")
        real(path, place)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(CheckpointError, match=r"m\.onnx cannot be written: File exists"):
        write_new(tmp_path / "m.onnx")
    assert tree(tmp_path) == {"m.onnx": b"mine"}


def write_new(path: Path) -> None:
    with staged_file(path, overwrite=False) as staged:
        staged.write_text("new")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_there_are_no_links_files_are_renamed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", without)
    pair(tmp_path / "m.onnx", "one")
    pair(tmp_path / "m.onnx", "two", overwrite=True)
    assert tree(tmp_path) == {"m.onnx": b"two", "m.onnx.data": b"two"}


def test_write_whole_writes_over_what_is_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "file", b"one")
    write_whole(tmp_path / "a" / "file", b"two")
    assert tree(tmp_path / "a") == {"file": b"two"}
    with pytest.raises(CheckpointError, match="is a folder"):
        write_whole(tmp_path / "a", b"")


def test_a_name_of_a_work_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has a name of moeify's own hidden folders: choose another"):
        write_whole(tmp_path / ".out.moeify-partial", b"x")
    assert not list(tmp_path.iterdir())
