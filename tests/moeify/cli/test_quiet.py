from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.cli import COMMANDS
from moeify.cli.quiet import DEBUG, quiet, without_bars
from tests.moeify import tiny
from tests.moeify.command import moeify_command


@pytest.fixture(autouse=True)
def no_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # --quiet sets it


def speak() -> None:
    """What libraries do between our lines."""
    warnings.warn("a warning", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # as a library that wants to be heard
        warnings.warn("a loud warning", UserWarning, stacklevel=1)
    for name in ("transformers", "torch.onnx", "onnxscript"):
        logging.getLogger(name).error("a line of %s", name)


def test_other_libraries_are_silent_inside_and_as_before_afterwards(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = logging.root.manager.disable, warnings.filters[:]
    with pytest.raises(KeyError), quiet():
        speak()
        print("our own line", file=sys.stderr)
        raise KeyError
    assert (logging.root.manager.disable, warnings.filters[:]) == before
    assert capsys.readouterr() == ("", "our own line\n") and not caplog.records


def test_they_are_heard_by_who_asks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(DEBUG, "1")
    with warnings.catch_warnings(record=True, action="always") as heard, quiet():
        speak()
    assert len(heard) == 2
    assert len(caplog.records) == 3


@pytest.mark.parametrize(("debug", "shown"), [("", ""), ("1", "a bar\n")])
def test_progress_bars_are_kept_back(
    debug: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DEBUG, debug)
    with without_bars():
        print("a bar", file=sys.stderr)
    print("after it", file=sys.stderr)
    assert capsys.readouterr() == ("", f"{shown}after it\n")


def test_a_quiet_conversion_says_nothing_but_warnings_and_errors(tmp_path: Path) -> None:
    src, dst = tiny.save(tiny.build("llama"), tmp_path / "src"), tmp_path / "dst"

    def said(*before: str, after: tuple[str, ...]) -> tuple[int, str, str]:
        words = [*before, "convert", src, dst, "--experts", "2", "--top-k", "2", *after]
        done = moeify_command(*words)
        return done.exit_code, done.stdout, done.stderr

    assert said("-q", after=("--no-verify",)) == (0, "", "")
    assert "-q" not in (dst / "README.md").read_text(), "it makes no other output"
    tensors = load_file(src / "model.safetensors")
    name = sorted(tensors)[-1]
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, src / "model.safetensors", {"format": "pt"})
    heard = f"warning: {name} holds NaN or Inf\n"
    assert said(after=("--quiet", "--no-verify", "--overwrite")) == (0, "", heard)
    code, _, error = said("--quiet", after=())
    assert code == 1 and error.startswith("Error: ") and error.count("\n") == 1


def test_every_command_can_be_quiet() -> None:
    for name in COMMANDS:
        assert moeify_command(name, "--help").output.count("-q, --quiet") == 1, name
