from __future__ import annotations

import errno
import fcntl
import os
import socket
from functools import partial
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.files.staging import can_resume, staged_file, staged_folder, write_whole
from moeify.files.work_folder import WorkFolder
from tests.moeify.files.disk_faults import FAILED, Child, count_changes, killed_at, tree


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_folder(folder: Path, text: str, *, overwrite: bool = False, resume: bool = False) -> None:
    with staged_folder(folder / "out", overwrite=overwrite, resume=resume) as out:
        (out / "config.json").write_text('{"model_type": "llama"}')
        (out / "weights").write_text(text)


def write_pair(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with staged_file(folder / "out", overwrite=overwrite, companion=".data") as out:
        Path(f"{out}.data").write_text(text)
        out.write_text(text)


def is_whole(folder: Path, text: str) -> bool:
    config = b'{"model_type": "llama"}'
    files = {"out": None, "out/config.json": config, "out/weights": text.encode()}
    return tree(folder) in (files, {"out": text.encode(), "out.data": text.encode()})


@pytest.mark.parametrize("write", [write_folder, write_pair])
@pytest.mark.parametrize("tenth", range(10))
def test_of_two_runs_at_once_one_writes_and_one_says_why_not(write: type, tenth: int, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    changes = count_changes(lambda: write(tmp_path / "count", "x"))
    folder = tmp_path / "run"
    folder.mkdir()
    first = Child(lambda: write(folder, "first"), stop_at=1 + tenth * (len(changes) - 1) // 9)
    assert first.wait_for_stop()
    second = Child(lambda: write(folder, "second"))
    status, why = second.wait()
    first.go_on()
    first_status, first_why = first.wait()
    assert sorted([status, first_status]) == [0, FAILED], (why, first_why)
    assert is_whole(folder, "second" if status == 0 else "first")
    held = rf"BusyError: another run (process {first.pid} on {socket.gethostname()}) is writing {folder / 'out'}: "
    why = (why or first_why).replace(
        "another run is", f"another run (process {first.pid} on {socket.gethostname()}) is"
    )
    assert why.startswith((held, f"CheckpointError: {folder / 'out'} exists")) and len(why.splitlines()) == 1


@pytest.mark.parametrize("write", [write_folder, write_pair])
def test_runs_that_race_leave_one_whole_output(write: type, tmp_path: Path) -> None:
    runs = [Child(partial(write, tmp_path, str(text), overwrite=True)) for text in range(6)]
    results = [run.wait() for run in runs]
    won = [text for text, (status, _) in enumerate(results) if status == 0]
    assert won and any(is_whole(tmp_path, str(text)) for text in won)
    assert all("another run" in why for status, why in results if status)


def test_a_run_that_finds_the_folder_half_removed_makes_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path, "old")
    changes = count_changes(lambda: write_folder(tmp_path, "old", overwrite=True))
    for back in range(1, 5):  # before the last changes: files, the lock, the folder
        first = Child(lambda: write_folder(tmp_path, "first", overwrite=True), stop_at=len(changes) + 1 - back)
        assert first.wait_for_stop()
        status, why = Child(lambda: write_folder(tmp_path, "second", overwrite=True)).wait()
        first.go_on()
        assert first.wait() == (0, "")
        assert is_whole(tmp_path, "first" if status else "second"), (back, why)
        assert "another run" in why if status else back == 1


def test_a_lock_is_for_one_output_and_lasts_as_long_as_the_run(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=False, resume=False):
        write_whole(tmp_path / "other", b"")
        with pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* is writing .*out: wait for it"):
            write_pair(tmp_path, "x")
    write_folder(tmp_path, "x", overwrite=True)


def test_where_the_file_system_has_no_locks_a_run_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    write_folder(tmp_path, "x")
    assert is_whole(tmp_path, "x")


@pytest.mark.parametrize("what", ["folder", "inside", "file", "link to itself", "fifo"])
def test_a_planted_link_or_file_is_never_used(what: str, tmp_path: Path) -> None:
    victim, work = tmp_path / "victim", tmp_path / ".out.moeify-partial"
    victim.mkdir()
    (victim / "model.safetensors").write_text("precious")
    if what == "folder":
        work.symlink_to(victim)
    elif what == "inside":
        work.mkdir()
        (work / "new").symlink_to(victim)
    elif what == "file":
        work.write_text("precious")
    elif what == "link to itself":
        work.symlink_to(work)
    else:
        os.mkfifo(work)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    for write in (write_folder, write_pair):
        with pytest.raises(CheckpointError, match=r"moeify-partial is in the way of .*out, and is not used because"):
            write(tmp_path, "new")
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before
    assert (victim / "model.safetensors").read_text() == "precious"


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.moeify-partial").mkdir()
    (tmp_path / ".out.moeify-partial/lock").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="cannot be written: Too many levels of symbolic links"):
        write_folder(tmp_path, "new")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / ".out.moeify-partial"
    work.mkdir()
    user = os.geteuid()
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="because another user can write to it"):
        patch.setattr(os, "geteuid", lambda: user + 1)
        write_folder(tmp_path, "new")
    work.chmod(0o777)
    with pytest.raises(CheckpointError, match="because another user can write to it"):
        write_folder(tmp_path, "new")
    work.chmod(0o755)
    write_folder(tmp_path, "new")
    assert is_whole(tmp_path, "new")


def test_files_of_others_in_the_work_folder_are_not_deleted(tmp_path: Path) -> None:
    work = tmp_path / ".out.moeify-partial"
    work.mkdir()
    (work / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"because moeify did not put thesis\.tex there: look at it"):
        write_folder(tmp_path, "new")
    (work / "thesis.tex").rename(tmp_path / "thesis.tex")
    (work / "old").mkdir()
    (work / "old/thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="Directory not empty"):
        write_folder(tmp_path, "new")
    assert (work / "old/thesis.tex").read_text() == "precious"


def test_what_was_replaced_is_kept_if_something_new_stands_in_its_place(tmp_path: Path) -> None:
    write_folder(tmp_path, "old")
    changes = count_changes(lambda: write_folder(tmp_path, "old", overwrite=True))
    assert killed_at(changes.index("rename") + 2, lambda: write_folder(tmp_path, "new", overwrite=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"another stands there now: move it away and run again"):
            write_folder(tmp_path, "new", overwrite=True)
        assert (tmp_path / ".out.moeify-partial/old/out/weights").read_text() == "old"
        assert (tmp_path / "out/mine").read_text() == "mine"
    (tmp_path / "out").rename(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="exists"):
        write_folder(tmp_path, "new")
    assert (tmp_path / "out/weights").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_journal_that_is_damaged_counts_for_nothing(tmp_path: Path) -> None:
    work = tmp_path / ".out.moeify-partial"
    for journal in (b"", b"\0" * 9, b'{"placing": {"ou', b"[1]\n{}\n", b'{"placing": 3}\n', b"\xff\xfe\n"):
        work.mkdir()
        (work / "lock").write_bytes(journal)
        write_folder(tmp_path, "new", overwrite=True)
        assert is_whole(tmp_path, "new")


def test_the_work_folder_is_private_and_its_name_fits(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        (work,) = tmp_path.iterdir()
        assert work.stat().st_mode & 0o777 == 0o700
        (tmp_path / "usual").mkdir()
        assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode
    for name in ("a" * 250, "ä" * 127, "b" * 255):
        write_whole(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    refusal = r"^'[^']*' cannot be the name of an output \(File name too long\): choose another$"
    with pytest.raises(CheckpointError, match=refusal):
        write_whole(tmp_path / ("c" * 256), b"x")
    assert WorkFolder(tmp_path / ("a" * 250)).path != WorkFolder(tmp_path / ("a" * 251)).path
    assert not list(tmp_path.glob(".*"))


def test_only_parents_that_were_made_and_are_empty_are_removed_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), staged_folder(tmp_path / "there/a/b/out", overwrite=False, resume=False):
        raise KeyError
    assert not list((tmp_path / "there").iterdir())
    with pytest.raises(KeyError), staged_folder(tmp_path / "there/a/b/out", overwrite=False, resume=False):
        (tmp_path / "there/a/mine").write_text("x")
        raise KeyError
    assert [path.name for path in (tmp_path / "there/a").iterdir()] == ["mine"]


def test_an_interrupt_before_anything_was_written_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a/out", overwrite=False, resume=False) as folder:
        (folder / ".moeify-resume").write_text("x")
        (folder / ".model-00001-of-00002.safetensors.partial").write_text("x")
        raise KeyboardInterrupt
    assert not can_resume(tmp_path / "a/out") and not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a/out", overwrite=False, resume=False) as folder:
        (folder / "model-00001-of-00002.safetensors").write_text("x")
        raise KeyboardInterrupt
    assert can_resume(tmp_path / "a/out")


def test_a_lock_that_was_removed_before_it_was_held_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock
    work = WorkFolder(tmp_path / "out")

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        work.lock.unlink()  # another run ends between our opening of its lock and our hold on it
        work.path.rmdir()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    work.open()
    with pytest.raises(CheckpointError, match="another run"):
        WorkFolder(tmp_path / "out").open()
    work.close()
