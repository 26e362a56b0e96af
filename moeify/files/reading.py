"""Reading files that others made: regular files only, opened once, with a limit on their size.

A pipe, a device or a folder in the place of a file is refused and does not block. What the operating system says of a
file that cannot be read becomes one line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from moeify.errors import CheckpointError, first_line


@contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading, and close it at the end of the block.

    Args:
        path: The file; links are followed.
        limit: Bytes that it may hold; None for any number.

    Raises:
        CheckpointError: It cannot be opened, is no regular file, or is larger than the limit.
    """
    with _told(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
    try:
        _check_status(path, os.fstat(descriptor), limit)
    except CheckpointError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of a file (see `opened`); one that grows meanwhile is read up to the limit."""
    with opened(path, limit) as file, _told(path):
        return file.read(limit)


def check_size(path: Path, limit: int | None) -> None:
    """Check that what another library will open is a regular file within a limit (see `opened`)."""
    with opened(path, limit):
        pass


def exists(path: Path) -> bool:
    """Return whether there is something at a path; False too where that cannot be known. Nothing is raised."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def is_file(path: Path) -> bool:
    """Return whether there is a regular file at a path.

    Raises:
        CheckpointError: That cannot be known: a name that is too long, a loop of links, a folder that may not be read.
    """
    return _has(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Return whether there is a folder at a path (see `is_file`)."""
    return _has(path, stat.S_ISDIR)


def list_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, in the order of the names.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    with _told(folder):
        return sorted(folder.iterdir())


def user_path(path: str | Path) -> Path:
    """Return a path in which `~` and `~user` are replaced.

    Raises:
        CheckpointError: There is no such user, or it is no path.
    """
    try:
        return Path(path).expanduser()
    except TypeError as error:
        raise CheckpointError(f"{type(path).__name__} is not a path: give a str or a Path") from error
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be read: there is no such user; write the whole path") from error


def state_of(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced, cut or written: its number, size and time.

    Raises:
        CheckpointError: The file cannot be looked at.
    """
    with _told(path):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, state: tuple[int, int, int]) -> None:
    """Check a file that is mapped into memory before it is read: reading what was cut off would end the process.

    Raises:
        CheckpointError: The file has changed since `state_of` returned `state`.
    """
    if state_of(path) != state:
        raise CheckpointError(f"{path} changed while it was read: leave the source alone and run again")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of which file an error of the operating system is."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a surrogate pair in the name
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def _check_status(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} cannot be read: it is {_kind(status.st_mode)}, expected a regular file")
    if limit is not None and status.st_size > limit:
        size = f"{status.st_size:,} bytes, expected at most {limit:,}"
        raise CheckpointError(f"{path} cannot be read: it holds {size}")


def _has(path: Path, kind: Callable[[int], bool]) -> bool:
    with _told(path):
        try:
            return kind(path.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
