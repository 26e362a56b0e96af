"""The command line, run in the process of a test."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from moeify.cli import main


def moeify_command(*words: object, **options: Any) -> Result:
    """Run `moeify` with these words."""
    return CliRunner().invoke(main, [str(word) for word in words], **options)
