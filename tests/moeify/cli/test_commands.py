"""The group of commands, in `moeify/cli/__init__.py`."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from moeify import __version__
from moeify.cli import COMMANDS
from moeify.errors import CheckpointError, ConfigError, MoeifyError, RefusedError, VerificationError
from tests.moeify.command import moeify_command


def test_help_lists_every_command_and_loads_none_of_them() -> None:
    program = (
        "import sys\nfrom moeify.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'rich', 'numpy', 'moeify.cli.convert'}\n"
        "sys.exit(bool(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    result = moeify_command(name, "--help")
    assert result.exit_code == 0 and f"main {name}" in result.stdout


def test_the_version() -> None:
    assert moeify_command("--version").output == f"moeify, version {__version__}\n"


def test_an_unknown_command_is_wrong_usage() -> None:
    result = moeify_command("upcycle")
    assert result.exit_code == 2 and "there is no command 'upcycle'" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (CheckpointError, 1), (RefusedError, 1), (VerificationError, 1), (MoeifyError, 1)],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: type[MoeifyError], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def failing() -> None:
        raise error("first\n  second")

    monkeypatch.setattr("moeify.cli.doctor.doctor", failing)
    result = moeify_command("doctor")
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.splitlines()[-1] == "Error: first second"
