"""Outputs that appear whole or not at all: written in a hidden folder beside their place, then moved there.

One run at a time writes an output. What stands at its place is looked at when the run begins and again when it ends.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moeify.errors import CheckpointError, first_line
from moeify.files.commit import recover, swap
from moeify.files.json_text import read_json_object
from moeify.files.limits import CONFIG_BYTES
from moeify.files.work_folder import WORK_SUFFIX, WorkFolder

RESUME_RECORD = ".moeify-resume"
_CONFIG = "config.json"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged_folder(
    dst: str | Path, *, overwrite: bool, resume: bool, sources: Sequence[Path] = (), nbytes: int = 0
) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `dst` when the block ends without an error.

    After an error nothing is left. After a kill or Ctrl-C what was written stays, hidden beside `dst`, for a run with
    `resume`; a run without `resume` starts anew.

    Args:
        dst: The output folder.
        overwrite: Replace `dst` if it is a model folder; the old one is removed only when the new one is whole.
        resume: Start from what an interrupted run left.
        sources: Where the source lies; the output must not overlap it.
        nbytes: Bytes that will be written, compared with the free space before anything is written.

    Raises:
        CheckpointError: `dst` exists, overlaps a source or cannot be written; another run writes it; the disk is full.
    """
    target = output_path(dst)
    _refuse_overlap(target, sources)
    output = _Output(target, (target.name,), lambda: _check_folder(target, overwrite=overwrite), overwrite)

    def prepare(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        _check_space(folder, target, nbytes)

    with _staged(output, prepare, resume=resume, resumable=True) as folder:
        yield folder
        (folder / RESUME_RECORD).unlink(missing_ok=True)


@contextmanager
def staged_file(
    path: str | Path, *, overwrite: bool, companion: str = "", sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends without an error, and else nothing is left.

    Args:
        path: The output file.
        overwrite: Replace `path` if it exists, and its companion with it.
        companion: What to append to the name for a second file of the output, which the block may write or not.
        sources: Where the source lies; the output must not overlap it.

    Raises:
        CheckpointError: see `check_file`; or `path` overlaps the source or cannot be written, or as for a folder.
    """
    target = output_path(path)
    _refuse_overlap(target, sources)
    names = (target.name + companion, target.name) if companion else (target.name,)
    output = _Output(target, names, lambda: _check_file(target, names, overwrite=overwrite), overwrite)
    with _staged(output, lambda _: None, resume=False, resumable=False) as staged:
        yield staged


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, over the one that is there.

    Raises:
        CheckpointError: It cannot be written.
    """
    with staged_file(path, overwrite=True) as staged:
        staged.write_bytes(data)


def check_folder(dst: str | Path, *, overwrite: bool) -> None:
    """Check the place of an output folder before any work, and put in order what a killed run left there.

    Raises:
        CheckpointError: It must not be replaced, or another run is writing it.
    """
    target = output_path(dst)
    with _explained(target, (target.name,)):
        settle(target, resumable=True)
        _check_folder(target, overwrite=overwrite)


def check_space(dst: str | Path, nbytes: int) -> None:
    """Check before any work that there is space for an output folder of at least so many bytes.

    Raises:
        CheckpointError: There is not.
    """
    target = output_path(dst)
    with _explained(target, (target.name,)):
        _check_space(begun_folder(target), target, nbytes)


def check_file(path: str | Path, *, overwrite: bool, companion: str = "") -> None:
    """Check the place of an output file before any work, and put in order what a killed run left there.

    Raises:
        CheckpointError: It or its companion must not be replaced, or another run is writing it.
    """
    target = output_path(path)
    names = (target.name + companion, target.name) if companion else (target.name,)
    with _explained(target, names):
        settle(target, resumable=False)
        _check_file(target, names, overwrite=overwrite)


def begun_folder(target: Path) -> Path:
    """Return where a run writes an output folder until it is whole."""
    return WorkFolder(target).new / target.name


def can_resume(dst: str | Path) -> bool:
    """Return whether an interrupted run has left something for a run with `resume`."""
    return WorkFolder(output_path(dst)).holds_work()


@dataclass(frozen=True)
class _Output:
    """One output: its place, the names of its files there, and what must hold before it is moved there."""

    target: Path
    names: tuple[str, ...]
    check: Callable[[], None]
    overwrite: bool


@contextmanager
def _staged(output: _Output, prepare: Callable[[Path], None], *, resume: bool, resumable: bool) -> Iterator[Path]:
    work, begun = WorkFolder(output.target), False
    staged = work.new / output.target.name
    with _explained(output.target, output.names):
        work.open()
        try:
            recover(work)
            output.check()
            work.start(resume=resume)
            prepare(staged)
            begun = True
            yield staged
            output.check()
            swap(work, output.names, replace=output.overwrite)
        except BaseException as error:
            failed = begun and isinstance(error, Exception)  # an earlier refusal keeps what an interrupted run has left
            if failed or not (resumable and work.holds_work()):
                with suppress(OSError):
                    work.remove()
            work.remove_made()
            raise
        else:
            _clear(work)
        finally:
            work.close()


def _clear(work: WorkFolder) -> None:
    """Remove the work folder when the output has its place."""
    try:
        work.remove()
    except (OSError, KeyboardInterrupt) as error:
        why = (isinstance(error, OSError) and error.strerror) or "interrupted"
        raise CheckpointError(
            f"{work.target} was written and is whole, but {work.path}, with what it replaced, was not wholly deleted "
            f"({why}): delete it yourself"
        ) from error


def settle(target: Path, *, resumable: bool) -> None:
    """Undo or end what a killed run has begun; remove what no run can go on with."""
    work = WorkFolder(target)
    if not os.path.lexists(work.path):
        return
    work.open()
    try:
        recover(work)
        if not (resumable and work.holds_work()):
            work.remove()
    finally:
        work.close()


def output_path(path: str | Path) -> Path:
    """Return the place of an output, or refuse what cannot be one."""
    try:
        target = Path(path).expanduser().resolve()
        os.fsencode(target)
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            target.lstat()  # a name that is too long shows here, before there is anything to tidy up
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such user, what no name can hold
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{str(path)!r} cannot be the name of an output ({reason}): choose another") from error
    if not target.name:
        raise CheckpointError(f"{target} cannot be written: choose a folder in it")
    if target.name.endswith(WORK_SUFFIX):
        raise CheckpointError(f"{target} has a name of moeify's own hidden folders: choose another")
    return target


def _refuse_overlap(target: Path, sources: Sequence[Path]) -> None:
    for source in (path.resolve() for path in sources):
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise CheckpointError(f"the output {target} and the source {source} overlap: choose another output")


def _check_folder(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another output folder, or pass --overwrite")
    problem = _why_not_replace(target)
    if problem:
        raise CheckpointError(f"{target} is not replaced, because {problem}: look at it, and remove it yourself")


def _why_not_replace(target: Path) -> str | None:
    """Return the reason not to delete `target`; None for a model folder or an empty one."""
    if not target.is_dir():
        return "it is not a folder"
    if not any(target.iterdir()):
        return None
    try:
        config = read_json_object(target / _CONFIG, CONFIG_BYTES)
    except CheckpointError:
        config = {}
    if "model_type" not in config:
        return f"it has no {_CONFIG} of a model"
    folders = sorted(path.name for path in target.iterdir() if path.is_dir())
    return f"it holds the folder {folders[0]}, which is no part of a model" if folders else None


def _check_file(target: Path, names: Sequence[str], *, overwrite: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name the file, for example {target / 'model.onnx'}")
    there = [path for path in map(target.with_name, names) if os.path.lexists(path)]
    for path in there:
        if not path.is_file():
            raise CheckpointError(f"{path} is in the way of {target} and is no file: choose another name")
    if there and target not in there:
        raise CheckpointError(
            f"{there[0]} would be replaced, and there is no {target} that it belongs to: choose another name, or look "
            "at it, and remove it yourself"
        )
    if there and not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or overwrite it (--overwrite)")


def _check_space(folder: Path, target: Path, nbytes: int) -> None:
    kept = folder.iterdir() if folder.is_dir() else ()
    missing = nbytes - sum(path.stat().st_size for path in kept if path.is_file())
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if missing > free:
        raise CheckpointError(
            f"not enough space on the disk of {target.parent}: {missing / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free: free some, or choose another output folder"
        )


@contextmanager
def _explained(target: Path, names: Sequence[str]) -> Iterator[None]:
    """Turn what the system says into one line that names the file and says whether it was read or written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # another library's, in words
            raise
        raise CheckpointError(_explain(error, target, names)) from error


def _explain(error: OSError, target: Path, names: Sequence[str]) -> str:
    if error.errno in _DISK_FULL:
        return f"the disk became full while {target} was written: free some space and run again; nothing was left"
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return f"{target} cannot be written: {error.strerror} (no file named)"
    name = os.fsdecode(error.filename)
    path = Path(os.path.abspath(name))
    outputs = [WorkFolder(target).path, *map(target.with_name, names)]
    if target.parent.is_relative_to(path) or any(map(path.is_relative_to, outputs)):
        return f"{target} cannot be written: {error.strerror} ({name})"
    return f"{name} cannot be read: {error.strerror}"
