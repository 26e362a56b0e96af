"""The swap that gives finished files their places: all of them or none, whenever a run is stopped.

What is to be done is in the journal before it is done. While `old` is there, the swap can be undone; the rename of
`old` to `gone` ends it. A file is placed by a link, which unlike a rename never replaces another.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.work_folder import WorkFolder

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


def swap(work: WorkFolder, names: Sequence[str], *, replace: bool) -> None:
    """Give what is in `work.new` its place beside the work folder; after an error all is as it was.

    Args:
        work: The locked work folder.
        names: Of the files or folders that belong to the output, in the order in which they are placed; the last must
            be there.
        replace: Whether what stands there is moved to `work.gone`.

    Raises:
        OSError: Something cannot be moved, or stands in the way.
    """
    parent = work.target.parent
    written = [name for name in names if name == names[-1] or os.path.lexists(work.new / name)]
    placing = {name: os.lstat(work.new / name).st_ino for name in written}
    _sync_tree(work.new)
    work.note({"placing": placing})
    _sync(work.lock)
    try:
        for name in reversed(names):
            if replace and os.path.lexists(parent / name):
                os.rename(parent / name, work.old / name)
        for name in placing:
            _move(work.new / name, parent / name)
        _sync(parent)
        os.rename(work.old, work.gone)
    except BaseException:
        if os.path.lexists(work.old):
            _undo(work, placing)
        raise


def recover(work: WorkFolder) -> None:
    """Undo the swap in which a run was killed; if everything had its place, forget what is left of that run.

    Raises:
        CheckpointError: What the killed run was replacing cannot be put back, because something new stands there.
        OSError: Something cannot be moved or deleted.
    """
    placing = _placing(work)
    if not placing:
        return
    last = list(placing)[-1]
    if os.path.lexists(work.old):
        if _inode(work.target.with_name(last)) == placing[last]:
            os.rename(work.old, work.gone)
        else:
            _undo(work, placing)
    for tree in (work.gone, work.new):
        if os.path.lexists(tree):
            shutil.rmtree(tree)
    work.start_journal()


def _placing(work: WorkFolder) -> dict[str, int]:
    """Return what a swap has begun to place, inodes by name; nothing where the journal has names of other files."""
    placing, own = work.journal().get("placing"), re.compile(rf"{re.escape(work.target.name)}[^/\0]*")
    return placing if isinstance(placing, dict) and all(map(own.fullmatch, placing)) else {}


def _undo(work: WorkFolder, placing: dict[str, int]) -> None:
    """Take away what was placed and put back what was there; this can itself be stopped, and done again."""
    parent = work.target.parent
    for name in reversed(placing):
        if _inode(parent / name) == placing[name]:
            _move(parent / name, work.new / name)
    for name in sorted(os.listdir(work.old), key=lambda name: name == work.target.name):
        try:
            _move(work.old / name, parent / name)
        except FileExistsError as error:
            raise CheckpointError(
                f"{parent / name} was to be replaced by a run that did not end, and another stands there now: move it "
                f"away and run again, or take {work.old / name} from where it is kept"
            ) from error
    _sync(parent)
    work.start_journal()


def _move(path: Path, place: Path) -> None:
    """Move a file or folder; what stands at its place is never replaced.

    Raises:
        FileExistsError: Something stands there.
    """
    if os.path.lexists(place):
        if not os.path.samestat(os.lstat(path), os.lstat(place)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        os.unlink(path)  # a kill came between the two lines below
        return
    if not path.is_dir():
        try:
            os.link(path, place)
            os.unlink(path)
            return
        except OSError as error:
            if error.errno not in NO_LINKS or os.path.lexists(place):
                raise
    os.rename(path, place)


def _inode(path: Path) -> int | None:
    return os.lstat(path).st_ino if os.path.lexists(path) else None


def _sync_tree(folder: Path) -> None:
    """Bring files and folders to the disk, so that a power cut finds no name without its contents."""
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
