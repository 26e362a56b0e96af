"""The last net: whatever a command raises becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from moeify.cli.quiet import DEBUG, debugging
from moeify.errors import ConfigError, MoeifyError, first_line, printable


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what the block raises into click's errors, whose message is one line.

    Raises:
        ClickException: Something failed: exit code 1, or 2 for wrong usage.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise  # a reader that has seen enough, such as `head`, is no error: click ends quietly
    except click.UsageError as error:
        raise click.UsageError(printable(error.format_message()), error.ctx) from error
    except click.ClickException as error:
        raise click.ClickException(printable(error.format_message())) from error
    except KeyboardInterrupt as error:
        raise click.ClickException("interrupted") from error
    except Exception as error:
        if debugging():
            traceback.print_exc()
        if isinstance(error, OSError):
            _drop_stdout_if_full()
        kind = click.UsageError if isinstance(error, ConfigError) else click.ClickException
        raise kind(_message(error)) from error


def _message(error: Exception) -> str:
    if isinstance(error, MoeifyError):
        return printable(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:  # files have names
        return f"stdout cannot be written: {error.strerror}"
    kind, line = type(error).__name__, first_line(error)
    return f"{kind if line == kind else f'{kind}: {line}'}; set {DEBUG}=1 to see where"


def _drop_stdout_if_full() -> None:
    """Let the interpreter end without a second message about what a full disk did not take."""
    try:
        click.echo(nl=False)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
