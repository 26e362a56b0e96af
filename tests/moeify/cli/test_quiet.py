from __future__ import annotations

import sys
from importlib import import_module

import pytest

from moeify.cli.quiet import quiet_transformers


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_is_silent_inside_and_as_before_afterwards(bars: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logging = import_module("transformers.utils.logging")
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        with pytest.raises(KeyError), quiet_transformers():
            assert not logging.is_progress_bar_enabled()
            logging.get_logger("transformers").warning("a notice")
            print("a bar", file=sys.stderr)
            raise KeyError
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)
    finally:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    assert capsys.readouterr() == ("", "")
