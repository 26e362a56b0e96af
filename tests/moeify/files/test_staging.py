from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from moeify.errors import CheckpointError
from moeify.files.staging import check_file, check_folder, staged_folder
from tests.moeify.files.disk_faults import tree


def model_folder(path: Path, content: str = "old") -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_text(content)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a" / "out", overwrite=False, resume=False) as folder:
        (folder / "a.safetensors").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
        assert folder.is_relative_to(tmp_path / "a")  # a rename must not cross file systems
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["a.safetensors"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        (folder / "a.safetensors").write_text("x")
        raise KeyError
    assert names(tmp_path) == []


def test_an_interrupt_leaves_what_resume_goes_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        (folder / "a.safetensors").write_text("x")
        raise KeyboardInterrupt
    assert not (tmp_path / "out").exists()
    with staged_folder(tmp_path / "out", overwrite=False, resume=True) as folder:
        assert names(folder) == ["a.safetensors"]
    assert names(tmp_path) == ["out"]


def test_an_interrupt_before_there_are_weights_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        (folder / "tokenizer.json").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_without_resume_an_interrupted_run_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        (folder / "a.safetensors").write_text("x")
        raise KeyboardInterrupt
    with staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        assert names(folder) == []


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"the disk became full while .*out was written"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder,
    ):
        (folder / "a.safetensors").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_an_error_in_words_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="in words"), staged_folder(tmp_path / "out", overwrite=False, resume=False):
        raise OSError("in words")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CheckpointError, match="cannot be written: Not a directory"),
        staged_folder(tmp_path / "file" / "out", overwrite=False, resume=False),
    ):
        pass


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=2_000_000_000))
    with (
        pytest.raises(CheckpointError, match=r"3,000 MB are needed, 2,000 MB are free"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False, nbytes=3_000_000_000),
    ):
        pass
    assert names(tmp_path) == []


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    model_folder(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match=r"exists: .*--overwrite"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False),
    ):
        pass
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


def test_overwrite_keeps_the_old_model_until_the_new_one_is_whole(tmp_path: Path) -> None:
    model_folder(tmp_path / "out")
    with pytest.raises(KeyError), staged_folder(tmp_path / "out", overwrite=True, resume=False):
        raise KeyError
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    with staged_folder(tmp_path / "out", overwrite=True, resume=False) as folder:
        (folder / "new").write_text("new")
        assert (tmp_path / "out" / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out", overwrite=True, resume=False) as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("kind", ["no config", "other config", "folder inside", "file"])
def test_overwrite_replaces_nothing_but_a_model(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    else:
        model_folder(out)
    if kind == "no config":
        (out / "config.json").unlink()
    if kind == "other config":
        (out / "config.json").write_text('{"compilerOptions": {}}')
    if kind == "folder inside":
        (out / "Documents").mkdir()
    before = sorted(out.rglob("*"))
    with (
        pytest.raises(CheckpointError, match="is not replaced, because"),
        staged_folder(out, overwrite=True, resume=False),
    ):
        pass
    assert sorted(out.rglob("*")) == before
    assert names(tmp_path) == ["out"]


def test_an_overwrite_whose_second_rename_fails_keeps_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path / "out")
    real = os.rename

    def rename(path: Path, target: Path) -> None:
        if path.parent.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path, target)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(CheckpointError, match="cannot be written: Input/output error"),
        staged_folder(tmp_path / "out", overwrite=True, resume=False) as folder,
    ):
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize(("src", "dst"), [("m", "m"), ("m", "m/out"), ("m/inner", "m"), ("m", "link/out")])
def test_source_and_output_may_not_overlap(tmp_path: Path, src: str, dst: str) -> None:
    (tmp_path / "m" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with (
        pytest.raises(CheckpointError, match="overlap"),
        staged_folder(tmp_path / dst, overwrite=True, resume=False, sources=[tmp_path / src]),
    ):
        pass
    assert names(tmp_path / "m") == ["inner"]


@pytest.mark.parametrize("kind", ["model", "empty", "file", "notes", "link"])
def test_what_appears_at_the_place_of_a_folder_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    with (
        pytest.raises(CheckpointError, match="exists: choose another"),
        staged_folder(out, overwrite=False, resume=False) as folder,
    ):
        (folder / "config.json").write_text("{}")
        if kind == "model":
            model_folder(out)
        elif kind == "file":
            out.write_text("mine")
        elif kind == "link":
            out.symlink_to(tmp_path / "elsewhere")
        else:
            out.mkdir()
            if kind == "notes":
                (out / "notes").write_text("mine")
        before = tree(tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert names(tmp_path) == ["elsewhere", "out"]


def test_with_overwrite_only_a_model_that_appears_meanwhile_is_replaced(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=True, resume=False) as folder:
        (folder / "new").write_text("new")
        model_folder(tmp_path / "out")
    assert tree(tmp_path) == {"out": None, "out/new": b"new"}
    with (
        pytest.raises(CheckpointError, match=r"is not replaced, because it has no config\.json"),
        staged_folder(tmp_path / "two", overwrite=True, resume=False) as folder,
    ):
        (folder / "new").write_text("new")
        (tmp_path / "two").mkdir()
        (tmp_path / "two/notes").write_text("mine")
    assert names(tmp_path) == ["out", "two"] and names(tmp_path / "two") == ["notes"]


def test_a_source_that_cannot_be_read_is_named_as_such(tmp_path: Path) -> None:
    source = tmp_path / "out-source" / "tokenizer.json"
    for path in (source, Path(os.path.relpath(source))):
        with (
            pytest.raises(CheckpointError, match=rf"^{path} cannot be read: Permission denied$"),
            staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder,
        ):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with (
        pytest.raises(CheckpointError, match=r"out cannot be written: Permission denied \(.*/new/out/x\)$"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder,
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder / "x"))
    with (
        pytest.raises(CheckpointError, match=r"the disk became full while .*out was written"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False),
    ):  # shutil names the source when the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
    assert names(tmp_path) == []


def test_old_files_that_cannot_be_deleted_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "out")
    real = os.unlink

    def unlink(path: str | Path, **how: int) -> None:
        if str(path) == "model.safetensors":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        real(path, **how)

    monkeypatch.setattr(os, "unlink", unlink)
    message = r"out was written and is whole, but .*\.out\.moeify-partial, with what it replaced, .*not permitted"
    with (
        pytest.raises(CheckpointError, match=message),
        staged_folder(tmp_path / "out", overwrite=True, resume=False) as folder,
    ):
        (folder / "new").write_text("new")
    assert names(tmp_path / "out") == ["new"]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="exists"):
        check_folder(tmp_path / "out", overwrite=False)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["a\0b", "~nosuchuser/out", "loop/out", "\ud800"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be the name of an output"):
        check_folder(name, overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be the name of an output"):
        check_file(name, overwrite=True)
    with pytest.raises(CheckpointError, match="choose a folder in it"):
        check_folder("/", overwrite=True)


def test_a_check_leaves_what_a_resume_goes_on_with_and_refuses_while_another_writes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        check = pytest.raises(CheckpointError, match=r"another run \(process .*\) is writing")
        with check:
            check_folder(tmp_path / "out", overwrite=False)
        (folder / "a.safetensors").write_text("x")
        raise KeyboardInterrupt
    check_folder(tmp_path / "out", overwrite=False)
    with staged_folder(tmp_path / "out", overwrite=False, resume=True) as folder:
        assert names(folder) == ["a.safetensors"]
