"""Keeping what other libraries say out of a command's output; MOEIFY_DEBUG=1 shows it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

DEBUG = "MOEIFY_DEBUG"


def debugging() -> bool:
    """Return whether the user asked for what is kept back, and for tracebacks."""
    return bool(os.environ.get(DEBUG))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and log lines back inside the block: what matters in them comes as an exception."""
    if debugging():
        yield
        return
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(record=True, action="ignore"):  # recorded: what a library turns on again
            yield
    finally:
        logging.disable(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep back all of stderr inside the block: the progress bars of transformers cannot all be turned off."""
    if debugging():
        yield
        return
    with redirect_stderr(StringIO()):
        yield
