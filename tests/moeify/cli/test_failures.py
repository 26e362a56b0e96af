"""Whatever a command raises is one line and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from moeify.cli.quiet import DEBUG
from moeify.errors import CheckpointError, ConfigError
from tests.moeify import tiny
from tests.moeify.command import moeify_command


def outcome(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr("moeify.cli.doctor.doctor", failing)
    return moeify_command("doctor")


AGAIN = f"; set {DEBUG}=1 to see where"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file", "a\nb"), r"FileNotFoundError: [Errno 2] No such file: 'a\nb'" + AGAIN),
        (RecursionError("too deep\nat x"), "RecursionError: too deep" + AGAIN),
        (MemoryError(), "MemoryError" + AGAIN),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec can't decode"),
        (OverflowError("[red]"), "OverflowError: [red]" + AGAIN),
        (ZeroDivisionError("division"), "ZeroDivisionError: division" + AGAIN),
        (CheckpointError("tensor \x1b[1m\u202e"), r"tensor \x1b[1m\u202e"),
        (click.FileError("\x1b", "gone"), "Could not open file"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_every_error_is_one_line(error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(error, monkeypatch)
    assert result.exit_code == 1 and result.stdout == "" and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"Error: {line}") and result.stderr.endswith("\n")
    assert len(result.stderr.splitlines()) == 1 and result.stderr[:-1].isprintable()


def test_the_traceback_is_shown_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG, "1")
    result = outcome(ConfigError("no"), monkeypatch)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "in failing" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: no"


def run(folder: Path, stdout: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m moeify inspect {folder} {stdout}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_reader_that_left_and_a_disk_that_is_full(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "src")
    assert run(folder, "| true").stderr == ""
    full = run(folder, "> /dev/full")
    assert full.returncode == 1
    assert full.stderr == "Error: stdout cannot be written: No space left on device\n"


def test_markup_in_a_name_is_a_name(tmp_path: Path) -> None:
    folder = tiny.save(tiny.build("llama"), tmp_path / "src")
    tensors = {**load_file(folder / "model.safetensors"), "x[/b]\nError: \x1b[1m": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = ["--experts", "2", "--top-k", "1", "--no-verify"]
    result = moeify_command("convert", folder, tmp_path / "moe[/b]", *options)
    assert result.exit_code == 0, result.output
    assert f"written to {tmp_path}/moe[/b]\n" in result.stderr
    assert "no place for x[/b]\\nError: \\x1b[1m; it is left out\n" in result.stderr
