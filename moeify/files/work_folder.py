"""The hidden folder beside an output in which one run at a time prepares it, and its lock.

`lock` is locked while a run is at work, and holds its journal: who it is, and the swap that it has begun. `new` is what
is written, `old` what a swap is replacing, and `gone` what it has replaced.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.json_text import parse_json

_NAME_BYTES = 255  # of a file, on every usual file system
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_TRIES = 100

WORK_SUFFIX = ".moeify-partial"


class BusyError(CheckpointError):
    """An output that another run is writing."""


class WorkFolder:
    """The work folder of one output; nothing is made before `open`.

    Attributes:
        target: The output.
        path: The folder.
        lock: Its lock and journal.
        new: Where to write; each file or folder under the name that it will have.
        old: What a swap that is not done has taken from its place. Nothing here ever deletes it.
        gone: What a swap has replaced, to be deleted.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(_hidden_name(target.name))
        self.lock, self.new, self.old, self.gone = (self.path / name for name in ("lock", "new", "old", "gone"))
        self._descriptor = -1
        self._made: list[Path] = []

    def open(self) -> None:
        """Make the folder and its parents where they are missing, and lock it.

        Raises:
            BusyError: Another run holds it.
            CheckpointError: It is a link, another user's, or not made by moeify.
            OSError: It cannot be made.
        """
        try:
            for tries in range(_TRIES):
                try:
                    if self._lock():
                        break
                except FileNotFoundError:  # another run has just removed the folder
                    if tries == _TRIES - 1:
                        raise
        except BaseException:
            self.close()
            self.remove_made()
            raise

    def close(self) -> None:
        """Let go of the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def start(self, *, resume: bool) -> None:
        """Make the folders to work in; with `resume`, keep what is in `new`."""
        if not resume and os.path.lexists(self.new):
            shutil.rmtree(self.new)
        if os.path.lexists(self.old):
            os.rmdir(self.old)  # an error if there is something in it
        self.new.mkdir(exist_ok=True)
        self.old.mkdir()
        self.start_journal()

    def start_journal(self) -> None:
        """Forget the journal, and note who is at work."""
        os.ftruncate(self._descriptor, 0)
        self.note({"process": os.getpid(), "host": os.uname().nodename})

    def note(self, entry: dict[str, object]) -> None:
        """Append to the journal."""
        line = json.dumps(entry).encode() + b"\n"
        if os.write(self._descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.lock))

    def journal(self) -> dict[str, object]:
        """Return what the journal says; a line that was not written to its end counts for nothing."""
        found: dict[str, object] = {}
        for line in os.pread(self._descriptor, 1 << 16, 0).splitlines():
            with suppress(ValueError):
                entry = parse_json(line)
                found |= entry if isinstance(entry, dict) else {}
        return found

    def holds_work(self) -> bool:
        """Return whether there are weights for another run to go on with."""
        folder = self.new / self.target.name
        return folder.is_dir() and any(name.endswith(".safetensors") for name in os.listdir(folder))

    def remove(self) -> None:
        """Remove the folder and what was written, but nothing that a swap has to put back; the lock goes last."""
        if os.path.lexists(self.old):
            os.rmdir(self.old)
        for tree in (self.gone, self.new):
            if os.path.lexists(tree):
                shutil.rmtree(tree)
        os.unlink(self.lock)
        try:
            os.rmdir(self.path)
        except OSError as error:  # another run has found the lock gone, and has begun
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise

    def remove_made(self) -> None:
        """Remove the folders that `open` made and that are empty."""
        while self._made:
            with suppress(OSError):
                os.rmdir(self._made.pop())

    def _lock(self) -> bool:
        """Return whether the lock is held: not if another run removed it after it was opened here."""
        self._make()
        self._descriptor = os.open(self.lock, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise BusyError(self._busy()) from error
            if error.errno not in _NO_LOCKS:
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), os.lstat(self.lock)):
                return True
        self.close()
        return False

    def _make(self) -> None:
        missing = []
        folder = self.target.parent
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(folder)
                self._made.append(folder)
        try:
            os.mkdir(self.path, 0o700)
            self._made.append(self.path)
        except FileExistsError:
            status = os.lstat(self.path)
            if not stat.S_ISDIR(status.st_mode):
                self._refuse("it is a link" if stat.S_ISLNK(status.st_mode) else "it is a file")
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                self._refuse("another user can write to it")
            self._check_contents()

    def _check_contents(self) -> None:
        folders = {self.new.name, self.old.name, self.gone.name}
        with os.scandir(self.path) as entries:
            for entry in entries:
                known = entry.name in folders and entry.is_dir(follow_symlinks=False)
                if entry.name != self.lock.name and not known:
                    self._refuse(f"moeify did not put {entry.name} there")

    def _refuse(self, why: str) -> None:
        raise CheckpointError(
            f"{self.path} is in the way of {self.target}, and is not used because {why}: look at it, and remove it "
            "yourself"
        )

    def _busy(self) -> str:
        journal = self.journal()
        who = " (process {process} on {host})".format(**journal) if {"process", "host"} <= journal.keys() else ""
        return f"another run{who} is writing {self.target}: wait for it, or choose another output"


def _hidden_name(name: str) -> str:
    """Return the name of the folder; of a long name its beginning and a digest."""
    hidden = f".{name}{WORK_SUFFIX}"
    if len(os.fsencode(hidden)) <= _NAME_BYTES:
        return hidden
    return f".{name[:40]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{WORK_SUFFIX}"
