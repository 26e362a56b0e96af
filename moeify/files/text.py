"""Plain text from files that others made."""

from __future__ import annotations

from codecs import getincrementaldecoder
from pathlib import Path

from moeify.errors import ConfigError
from moeify.files.limits import TEXT_BYTES
from moeify.files.reading import opened


def start_of_text(path: Path) -> str:
    """Read as much of the file of `--text` as could be needed.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: It is not UTF-8, or binary.
    """
    with opened(path) as file:
        start = file.read(TEXT_BYTES)
    if b"\0" in start:
        raise ConfigError(f"--text {path} is binary (it holds a zero byte): give a file of plain text")
    try:
        return getincrementaldecoder("utf-8")().decode(start, final=len(start) < TEXT_BYTES)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text {path} is not UTF-8 ({error.reason}): convert it, or give another") from error
