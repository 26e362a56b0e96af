"""The passes, in the order in which they run, described by their own docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from typing import Any

from moeify.passes.find_ffn import FindFFN
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.insert_moe import InsertMoE
from moeify.passes.lower import Lower

PASSES: tuple[type[Any], ...] = (FindFFN, InsertMoE, InsertLosses, Lower)


@dataclass(frozen=True)
class Description:
    """What a pass says of itself.

    Attributes:
        name: The word that its file has: `find_ffn`.
        summary: One line.
        before: Graph text.
        after: Graph text.
        refuses: What it does not do.
        options: Its fields.
    """

    name: str
    summary: str
    before: str
    after: str
    refuses: str
    options: tuple[str, ...]


def describe() -> tuple[Description, ...]:
    """Return the descriptions of all passes, in order."""
    return tuple(_describe(each) for each in PASSES)


def _describe(each: type[Any]) -> Description:
    text = inspect.cleandoc(each.__doc__ or "")
    return Description(
        name=each.__module__.rsplit(".", 1)[-1],
        summary=text.split("\n")[0],
        before=_section(text, "Before"),
        after=_section(text, "After"),
        refuses=" ".join(_section(text, "Refuses").split()),
        options=tuple(option.name for option in fields(each)),
    )


def _section(text: str, title: str) -> str:
    """Return what follows `title:` up to the next section."""
    found = re.search(rf"^{title}:[ \n](.*?)(?=^\S[\w ]*:|^With |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return inspect.cleandoc(found.group(1)).strip() if found else ""
