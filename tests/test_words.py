"""The library and its pages use one word for one thing: those of the table in CONTRIBUTING.md, in American spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What not to write, and what to write instead.
INSTEAD = {
    r"sparse layers?": "MoE layer",
    r"projections? back": "down projection",
    r"first projections?": "up projection",
    r"row-wise|neuron-wise": "position-wise",
    r"tolerances\.py": "measure.py",
    r"(?:recogn|normal|quant|initial|optim|regular|summar|special|general)is(?:e|es|ed|ing|ation|er|ers)": "-ize",
    r"behaviours?|colours?|neighbours?|favours?": "-or",
}
# They quote records.
WRITTEN_BY_PROGRAMS = {"architectures.md", "ecosystem.md", "exactness.md", "families.md", "proof.md"}
WRONG = re.compile("|".join(rf"\b({pattern})\b" for pattern in INSTEAD), flags=re.IGNORECASE)


def files() -> Iterator[Path]:
    for folder in ("moeify", "passes", "kernels"):
        found = sorted((ROOT / folder).rglob("*.py"))
        yield from (path for path in found if not any(parent.is_symlink() for parent in path.parents))
    pages = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    yield from (page for page in pages if page.name not in WRITTEN_BY_PROGRAMS)


def wrong_words(text: str) -> list[tuple[int, str, str]]:
    """Line, what stands there, and what should."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for match in WRONG.finditer(line):
            found.append((number, match[0], list(INSTEAD.values())[(match.lastindex or 1) - 1]))
    return found


def test_one_word_for_one_thing() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {word!r}: write {right}"
        for path in files()
        for line, word, right in wrong_words(path.read_text())
    ]
    assert not found, f"{len(found)} words of another project:\n" + "\n".join(found)


def test_a_wrong_word_is_found() -> None:
    assert wrong_words("x\nA sparse layer, normalised") == [(2, "sparse layer", "MoE layer"), (2, "normalised", "-ize")]
    assert wrong_words("an MoE layer whose weights are normalized") == []
