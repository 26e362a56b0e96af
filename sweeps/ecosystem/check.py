"""A check of one tool: what is done with a model, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

from sweeps.ecosystem.models import Subject
from sweeps.exactness import line_of

WORKS, WITH_A_LINE, FAILS = "works", "works with a line of code", "does not"
CONVERTED = ("llama", "gemma3", "gpt2")
NATIVE = ("mixtral", "qwen3_moe")
LINE = "moeify.linearize(model)"  # the line of code that many tools need


@dataclass(frozen=True)
class Check:
    """Something that people do with a tool, as a function that raises where it does not work.

    Attributes:
        tool: The distribution, by its name on PyPI.
        done: What is done, for the page.
        run: Does it.
        models: Names of the models that it is done with.
        line: What has to be added to the user's script, if `run` does not work.
        with_line: Does it with that line.
        issue: Where the tool's own project speaks of the failure, for the page.
        environment: Which of the environments holds the tool.
    """

    tool: str
    done: str
    run: Callable[[Subject], object]
    models: tuple[str, ...] = CONVERTED + NATIVE[:1]
    line: str = ""
    with_line: Callable[[Subject], object] | None = None
    issue: str = ""
    environment: str = "main"

    @property
    def name(self) -> str:
        """The function's name, by which a check is called up."""
        return self.run.__name__


@dataclass(frozen=True)
class Row:
    """What came of a check with one model.

    Attributes:
        tool: The distribution.
        version: Of the tool.
        transformers: Its version.
        done: What was done.
        model: With which model.
        result: `works`, `works with a line of code` or `does not`.
        line: That line.
        why: What stopped it without the line, or at all.
        issue: Where the tool's project speaks of it.
        seconds: Of wall time, the import of the tool included.
    """

    tool: str
    version: str
    transformers: str
    done: str
    model: str
    result: str
    line: str = ""
    why: str = ""
    issue: str = ""
    seconds: float = 0.0


def outcome(check: Check, subject: Subject) -> Row:
    """Do a check in this process, without its line and, if that fails, with it."""
    started = time.monotonic()
    result, line, why = WORKS, "", ""
    attempts = [("", check.run)] + ([(check.line, check.with_line)] if check.with_line else [])
    for line, run in attempts:
        try:
            run(subject)
        except Exception as error:  # whatever stops a tool is the result
            result, why = FAILS, why or line_of(error)
        else:
            result = WITH_A_LINE if line else WORKS
            break
    return row(check, subject.name, result, line if result == WITH_A_LINE else "", why, time.monotonic() - started)


def row(check: Check, model: str, result: str, line: str, why: str, seconds: float) -> Row:
    """Return the record of an outcome."""
    issue = check.issue if result != WORKS else ""
    versions = version(check.tool), version("transformers")
    return Row(check.tool, *versions, check.done, model, result, line, why, issue, round(seconds, 1))


def find(checks: Iterable[Check], name: str) -> Check:
    """Return the check of a name."""
    return next(check for check in checks if check.name == name)
