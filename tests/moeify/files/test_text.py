from __future__ import annotations

import os
from pathlib import Path

import pytest

from moeify.errors import CheckpointError, ConfigError
from moeify.files.limits import TEXT_BYTES
from moeify.files.text import start_of_text


def test_a_text_is_read_no_further_than_needed_and_must_be_utf8(tmp_path: Path) -> None:
    long = tmp_path / "long"
    long.write_bytes("ä".encode() * TEXT_BYTES + b"\xff")
    assert start_of_text(long) == "ä" * (TEXT_BYTES // 2)
    (tmp_path / "short").write_bytes(b"ab\xc3")
    with pytest.raises(ConfigError, match=r"short is not UTF-8"):
        start_of_text(tmp_path / "short")
    (tmp_path / "binary").write_bytes(b"ab\0")
    with pytest.raises(ConfigError, match=r"binary is binary"):
        start_of_text(tmp_path / "binary")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe cannot be read: it is a pipe"):
        start_of_text(tmp_path / "pipe")
