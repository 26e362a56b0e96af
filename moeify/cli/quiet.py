"""Keeping transformers' progress bars and notices out of a command's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from io import StringIO


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers inside the block; its errors still come as exceptions."""
    logging = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the progress bar of the GGUF reader cannot be turned off
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
