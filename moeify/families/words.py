"""The words for checkpoint formats, known without loading the families."""

from __future__ import annotations

import pkgutil

from moeify.errors import ConfigError
from moeify.families import targets

MOEIFY = "moeify"
NATIVE = tuple(sorted(module.name for module in pkgutil.iter_modules(targets.__path__)))


def check_target(wanted: str) -> None:
    """Check the word for a format (see `moeify.families.table.fit_target`).

    Raises:
        ConfigError: There is no such format.
    """
    words = ("auto", MOEIFY, *NATIVE)
    if wanted not in words:
        raise ConfigError(f"--to {wanted}: expected {', '.join(words)}")
