"""Copying bytes between files at the speed of the disk, inside the kernel where possible; and comparing them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from threading import Event, Thread

from moeify.checkpoint.safetensors_file import read_exactly
from moeify.checkpoint.tensor_info import Span
from moeify.files.reading import opened

STEP = 16 << 20  # bytes between two reports of progress, and the size of the buffer where the kernel cannot copy
_EVERY = 0.2  # seconds
_NOT_POSSIBLE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def copy_span(span: Span, file: FileIO, on_bytes: Callable[[int], None]) -> None:
    """Append the bytes of `span` to an open file.

    Raises:
        CheckpointError: The source file is shorter than the span.
        OSError: The disk is full, or cannot be read or written.
    """
    with opened(span.path) as source:
        done = _copy_in_kernel(source, span, file, on_bytes) if hasattr(os, "copy_file_range") else 0
        buffer = memoryview(bytearray(min(STEP, span.nbytes - done)))
        while done < span.nbytes:
            chunk = buffer[: span.nbytes - done]
            read_exactly(source.fileno(), span.offset + done, chunk, span.path)
            write_all(file, chunk)
            on_bytes(len(chunk))
            done += len(chunk)


def _copy_in_kernel(source: BufferedReader, span: Span, file: FileIO, on_bytes: Callable[[int], None]) -> int:
    """Return how many bytes the kernel copied: fewer than all where the file systems or the file do not allow it."""
    done = 0
    while done < span.nbytes:
        count = min(STEP, span.nbytes - done)
        try:
            copied = os.copy_file_range(source.fileno(), file.fileno(), count, offset_src=span.offset + done)
        except OSError as error:
            if error.errno in _NOT_POSSIBLE:
                break
            raise
        if copied == 0:
            break
        on_bytes(copied)
        done += copied
    return done


@contextmanager
def synced_meanwhile(file: FileIO) -> Iterator[None]:
    """Let the disk write what the block has written so far: the sync at the end waits for less."""
    done = Event()

    def sync() -> None:
        while not done.wait(_EVERY):
            with suppress(OSError):  # the sync at the end, which counts, raises it
                os.fdatasync(file.fileno())

    thread = Thread(target=sync)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def same_span(span: Span, file: FileIO) -> bool:
    """Return whether an open file goes on with the bytes of `span`; it is read that far.

    Raises:
        CheckpointError: The source file is shorter than the span.
        OSError: A file cannot be read.
    """
    buffer = memoryview(bytearray(min(STEP, span.nbytes)))
    with opened(span.path) as source:
        for done in range(0, span.nbytes, STEP):
            chunk = buffer[: span.nbytes - done]
            read_exactly(source.fileno(), span.offset + done, chunk, span.path)
            if not same_bytes(chunk, file):
                return False
    return True


def same_bytes(raw: memoryview, file: FileIO) -> bool:
    """Return whether an open file goes on with `raw`; it is read that far.

    Raises:
        OSError: The file cannot be read.
    """
    for start in range(0, len(raw), STEP):
        chunk = raw[start : start + STEP]
        at = file.seek(len(chunk), os.SEEK_CUR) - len(chunk)
        if os.pread(file.fileno(), len(chunk), at) != chunk.tobytes():
            return False
    return True


def write_all(file: FileIO, raw: memoryview) -> None:
    """Append all of `raw` to an unbuffered file, which may take it in several steps.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    written = 0
    while written < len(raw):
        written += os.write(file.fileno(), raw[written:])
