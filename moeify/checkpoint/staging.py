"""An output folder that appears whole or not at all: written beside its place under a hidden name, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeify.checkpoint.folder import CONFIG
from moeify.checkpoint.writer import RESUME_RECORD
from moeify.errors import CheckpointError
from moeify.files.json_text import read_json_object
from moeify.files.limits import CONFIG_BYTES


@contextmanager
def staged(
    dst: str | Path, *, overwrite: bool, resume: bool, source: Path | None = None, nbytes: int = 0
) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `dst` when the block ends without an error.

    After an error nothing is left. After a kill or Ctrl-C the unfinished folder stays, hidden beside `dst`, for a run
    with `resume`; a run without `resume` starts anew.

    Args:
        dst: The output folder.
        overwrite: Replace `dst` if it is a model folder; the old one is removed only when the new one is whole.
        resume: Start from what an interrupted run left.
        source: The source's path; the output must not overlap it.
        nbytes: Bytes that will be written, compared with the free space before anything is written.

    Raises:
        CheckpointError: `dst` exists, must not be replaced, overlaps the source, or cannot be written, or the disk is
            full.
    """
    target = Path(dst).expanduser().resolve()
    partial = target.with_name(f".{target.name}.moeify-partial")
    old = target.with_name(f".{target.name}.moeify-old")
    if old.exists() and not target.exists():
        old.rename(target)  # a kill came between the two renames of an overwrite
    _check_target(target, source, overwrite=overwrite)
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    _check_space(partial, nbytes)  # outside the block below: a refusal keeps what an interrupted run has written
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        (partial / RESUME_RECORD).unlink(missing_ok=True)
        _rename_into_place(partial, target, old)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(_explain(error, target)) from error
        raise


def _check_target(target: Path, source: Path | None, *, overwrite: bool) -> None:
    if source is not None:
        origin = source.resolve()
        if target.is_relative_to(origin) or origin.is_relative_to(target):
            raise CheckpointError(f"the output {target} and the source {origin} overlap: choose another output folder")
    if not target.exists():
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
        config = read_json_object(target / CONFIG, CONFIG_BYTES)
    except CheckpointError:
        config = {}
    if "model_type" not in config:
        return f"it has no {CONFIG} of a model"
    folders = sorted(path.name for path in target.iterdir() if path.is_dir())
    return f"it holds the folder {folders[0]}, which is no part of a model" if folders else None


def _check_space(partial: Path, nbytes: int) -> None:
    present = sum(path.stat().st_size for path in partial.glob("*") if path.is_file())
    missing = nbytes - present
    place = next(parent for parent in partial.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if missing > free:
        raise CheckpointError(
            f"not enough space on the disk of {place}: {missing / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free: free some, or choose another output folder"
        )


def _rename_into_place(partial: Path, target: Path, old: Path) -> None:
    """Give the finished folder its name; if that fails, the model that it replaces keeps its own."""
    if not target.exists():
        partial.rename(target)
        return
    shutil.rmtree(old, ignore_errors=True)  # an earlier run was killed before it removed it
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _explain(error: OSError, target: Path) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk became full while {target} was written: free some space and run again; nothing was left"
    return f"{target} cannot be written: {error.strerror} ({error.filename or 'no file named'})"
