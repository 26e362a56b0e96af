from __future__ import annotations

import logging
import sys
import warnings

import pytest

from moeify.cli.quiet import DEBUG, quiet, without_bars


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
