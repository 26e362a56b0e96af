"""README.md says what is so: its sections, its tree, the files and pages that it names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sweeps import readme_tree

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = ["Ten lines", "Installing", "Numbers", "How it works", "Pages", "The tree", "Limits"]


def block(section: str, language: str = "") -> str:
    """The first fenced block of a language in a section."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no block of {language or 'text'} under {section!r}"
    return found[1]


def test_the_sections_stand_in_their_order() -> None:
    assert re.findall(r"^## (.*)$", README, flags=re.MULTILINE) == SECTIONS
    assert README.index("make demo") < README.index("make test") < README.index("## Ten lines")


def test_the_tree_is_the_one_on_disk() -> None:
    assert block("The tree") == readme_tree.draw(), "write it again: python -m sweeps.readme_tree"


def test_no_row_of_the_tree_is_cut() -> None:
    rows = block("The tree").splitlines()
    assert [row for row in rows if "…" in row or len(row) > readme_tree.WIDTH] == []


def test_the_tree_names_every_module_of_the_library() -> None:
    drawn = "\n".join(row.split()[0] for row in block("The tree").splitlines())
    files = {path.name for folder in ("moeify", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")}
    assert sorted(name for name in files if not name.startswith("__") and name not in drawn) == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`([\w.-]+/[\w./-]+?)`", (ROOT / page).read_text())
    examples = {"moeify/passes", "moeify/kernels"}
    assert [path for path in named if path not in examples and not (ROOT / path).exists()] == []


def test_every_page_is_linked() -> None:
    links = set(re.findall(r"\]\(([^)#\s]+)[^)]*\)", README))
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    pages |= {"docs/how-to/README.md", "examples/README.md", "benchmarks/README.md", "CONTRIBUTING.md"}
    assert sorted(pages - links) == []


def test_the_extras_that_are_named_are_those_that_users_need() -> None:
    text = README.partition("\n## Installing\n")[2].partition("\n## ")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name in extras if f"`{name}`" in text or f"[{name}]" in text} == set(extras) - {
        "dev",
        "docs",
        "examples",
    }


def test_the_ten_lines_are_ten() -> None:
    """They run in tests/docs, as all code of the pages does."""
    assert sum(bool(line.strip()) for line in block("Ten lines", "python").splitlines()) <= 10
