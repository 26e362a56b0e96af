"""The errors that moeify raises on purpose: one line that says what is wrong and what to do.

Any other exception is a bug. The library never prints and never exits; `moeify.cli` turns errors into exit codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 500  # characters of another library's message


class MoeifyError(Exception):
    """A request that cannot be met; the message is one line that is complete in itself."""


class ConfigError(MoeifyError):
    """A setting that is wrong for every model (`top_k` above `experts`, an unknown method)."""


class CheckpointError(MoeifyError):
    """A checkpoint that cannot be read or written: not a model folder, truncated, unsafe, disk full."""


class RefusedError(MoeifyError):
    """A conversion that would not be right for this model."""


class VerificationError(MoeifyError):
    """A converted model that differs from the dense one by more than the tolerance."""


def printable(text: str, keep: str = "") -> str:
    """Return text that stays on its line and does nothing to a terminal: what is not printable becomes an escape.

    Args:
        text: Such as a name from a file; it may hold newlines, escape codes, lone surrogates, marks that turn text.
        keep: Characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the kind of the error where there is no message.

    A line that ends in a colon is only an announcement: the next one belongs to it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return printable(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…")


@contextmanager
def told_as(what: str | Callable[[], str], kind: type[MoeifyError] = MoeifyError) -> Iterator[None]:
    """Turn whatever another library raises inside the block into one line: `what`, and its message in brackets.

    Args:
        what: What was not possible; what has to be found out is a function, called when it happens.
        kind: What is raised.

    Raises:
        MoeifyError: Of the given kind; an error of moeify itself passes as it is.
    """
    try:
        yield
    except MoeifyError:
        raise
    except Exception as error:  # for damaged files the exceptions are of every kind
        said = what if isinstance(what, str) else what()
        raise kind(f"{said} ({first_line(error)})") from error
