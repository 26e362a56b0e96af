"""Disks that fail and processes that die at the n-th change of the file system, and what is left after it.

The shim stands in front of the functions of `os` and of `open`, through which the library, `pathlib` and `shutil`
change the disk. What a C or Rust library writes by itself is not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = (
    "mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove", "truncate", "ftruncate", "write",
    "copy_file_range", "sendfile", "chmod", "utime",
)  # fmt: skip
KILLED = 77  # the exit status of a child that died at its change
FAILED = 78  # of one whose action raised


@contextmanager
def before_changes(act: Callable[[int, str, Any], None]) -> Iterator[None]:
    """Call `act` with number (from 1), name and path (or open file) before each change of the file system.

    Args:
        act: What it raises stops the change; it may also end the process.
    """
    count = 0

    def counted(name: str, real: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if changes(*args, **kwargs):
                count += 1
                act(count, name, args[0])
            return real(*args, **kwargs)

        return call

    def always(*_: Any, **__: Any) -> bool:
        return True

    def creates(_: Any, flags: int, *__: Any, **___: Any) -> bool:
        return bool(flags & os.O_CREAT)

    def writes(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return not isinstance(file, int) and any(letter in mode for letter in "wax+")

    kinds: list[tuple[Any, str, Callable[..., bool]]] = [(os, name, always) for name in CHANGES if hasattr(os, name)]
    kinds += [(os, "open", creates), (io, "open", writes), (builtins, "open", writes)]
    real = [getattr(module, name) for module, name, _ in kinds]
    try:
        for (module, name, changes), function in zip(kinds, real, strict=True):
            setattr(module, name, counted(name, function, changes))
        yield
    finally:
        for (module, name, _), function in zip(kinds, real, strict=True):
            setattr(module, name, function)


def count_changes(action: Callable[[], object]) -> list[str]:
    """Do something, and return the names of the changes that it made."""
    names: list[str] = []
    with before_changes(lambda _, name, __: names.append(name)):
        action()
    return names


@contextmanager
def failing(at: int, number: int) -> Iterator[None]:
    """Let the change `at` fail with the error `number`, and all others be."""

    def fail(count: int, name: str, path: Any) -> None:
        if count == at:
            raise OSError(number, os.strerror(number), *([] if isinstance(path, int) else [str(path)]))

    with before_changes(fail):
        yield


class Child:
    """A forked process that does something, and is stopped or killed before a change.

    Args:
        action: What it does; its exit status is 0, `FAILED` after an exception.
        kill_at: The change at which it dies.
        stop_at: The change before which it waits for `go_on`.
    """

    def __init__(self, action: Callable[[], object], *, kill_at: int = 0, stop_at: int = 0) -> None:
        self._message, report = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none
            self.pid = os.fork()
        if self.pid:
            os.close(report)
            return
        status = FAILED
        say = os.write

        def act(count: int, name: str, path: Any) -> None:
            if count == kill_at:
                os._exit(KILLED)
            if count == stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)

        try:
            with before_changes(act):
                action()
            status = 0
        except BaseException as error:
            say(report, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)

    def wait_for_stop(self) -> bool:
        """Return whether it has come to its stop; False if it ended before."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        return os.WIFSTOPPED(status)

    def go_on(self) -> None:
        """Let it continue."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self, seconds: float = 60) -> tuple[int, str]:
        """Return its exit status and what it raised."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError
            time.sleep(0.001)
        with os.fdopen(self._message, "rb") as message:
            return os.waitstatus_to_exitcode(status), message.read().decode()


def killed_at(at: int, action: Callable[[], object]) -> bool:
    """Do something in a process that dies before its change `at`; return whether it came so far.

    Raises:
        AssertionError: The action raised.
    """
    status, raised = Child(action, kill_at=at).wait()
    assert status in {0, KILLED}, raised
    return status == KILLED


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """What is in a folder: the contents of files, where links lead, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found


ERRORS = (errno.ENOSPC, errno.EIO, errno.EPERM, errno.EXDEV)
