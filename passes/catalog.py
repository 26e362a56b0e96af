"""The passes, in the order in which they run, described by their own docstrings."""

from __future__ import annotations

import inspect
import re
import textwrap
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
        class_name: The class in that file.
        summary: One line.
        before: Graph text.
        after: Graph text.
        notes: What else is to be said, or "".
        refuses: What it does not do.
        options: Its fields, with what they mean.
    """

    name: str
    class_name: str
    summary: str
    before: str
    after: str
    notes: str
    refuses: str
    options: dict[str, str]


def describe() -> tuple[Description, ...]:
    """Return the descriptions of all passes, in order."""
    return tuple(_describe(each) for each in PASSES)


def _describe(each: type[Any]) -> Description:
    summary, *paragraphs = inspect.cleandoc(each.__doc__ or "").split("\n\n")
    sections: dict[str, str] = {}
    notes = []
    for paragraph in paragraphs:
        titled = re.match(r"(\w+):[ \n]", paragraph)
        if titled:
            sections[titled[1]] = textwrap.dedent(paragraph[titled.end() :])
        else:
            notes.append(" ".join(paragraph.split()))
    return Description(
        name=each.__module__.rsplit(".", 1)[-1],
        class_name=each.__name__,
        summary=summary,
        before=sections["Before"],
        after=sections["After"],
        notes=" ".join(notes),
        refuses=" ".join(sections["Refuses"].split()),
        options=_options(each, sections.get("Attributes", "")),
    )


def _options(each: type[Any], text: str) -> dict[str, str]:
    """Return what the docstring says of each field."""
    said = dict(re.findall(r"^(\w+): ((?:.|\n(?= ))*)", text, flags=re.MULTILINE))
    return {option.name: " ".join(said[option.name].split()) for option in fields(each)}
