"""The site: its navigation has every page, links and anchors lead somewhere, and what is generated is there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import moeify
from moeify.cli import COMMANDS
from sweeps import docs_site

ROOT = Path(__file__).resolve().parents[2]
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [path for path in docs_site.sources() if path.endswith(".md")]
GENERATED = docs_site.generated()
TITLES = ["Start", "Concepts", "How-to", "Reference", "Results", "Project"]


def in_navigation(entry: Any) -> Iterator[str]:
    """The pages below an entry of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for below in entry.values() if isinstance(entry, dict) else entry:
            yield from in_navigation(below)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_navigation_has_six_parts_and_every_page_once() -> None:
    assert [title for part in SITE["nav"] for title in part] == TITLES
    named = list(in_navigation(SITE["nav"]))
    assert sorted(named) == sorted({*PAGES, *GENERATED})


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path, wrong = ROOT / page, []
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        target = path.parent / link if link else path
        if "://" in link or link.startswith("mailto:"):
            continue
        in_a_record = target.suffix == ".json"  # tests/sweeps/test_claims.py looks it up
        if not target.exists() or (anchor and not in_a_record and anchor not in anchors(target.read_text())):
            wrong.append(f"{link}#{anchor}")
    assert wrong == []


def test_an_anchor_is_that_of_its_heading() -> None:
    assert anchors("# A `code`, and more\n\n```\n# no heading\n```\n## 2: b_c\n") == {"a-code-and-more", "2-b_c"}


def test_every_concept_has_a_call_and_a_paper() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/concepts.md").read_text(), flags=re.MULTILINE)[1:]
    titles = [section.partition("\n")[0] for section in sections]
    assert titles == ["What an MoE is", "What it costs", "Routing", "Load balancing", "Capacity", "Noisy gating",
                      "Upcycling", "Fine-tuning", "Parallelism", "Efficient training"]  # fmt: skip
    assert [
        title for title, text in zip(titles, sections, strict=True) if "```" not in text or "arXiv:" not in text
    ] == []


def test_every_public_name_is_in_the_reference() -> None:
    named = set(re.findall(r"^::: moeify\.(\w+)$", GENERATED["docs/python.md"], flags=re.MULTILINE))
    assert named == set(moeify.__all__) - {"methods", "routers"}
    choices = GENERATED["docs/choices.md"]
    assert "::: moeify.routers.noisy_topk.NoisyTopk\n" in choices and "::: moeify.methods.drop.Drop\n" in choices


def test_every_command_is_in_the_reference() -> None:
    page = GENERATED["docs/commands.md"]
    assert re.findall(r"^## (.*)$", page, flags=re.MULTILINE) == list(COMMANDS)
    assert "| `--top-k INTEGER` | Experts that each token visits. |" in page
    rows = [re.sub("`.*?`", "", row) for row in page.splitlines() if row.startswith("| ")]
    assert {row.count("|") for row in rows} == {3}


def test_the_home_page_leaves_out_the_tree_and_links_to_folders_lead_to_their_pages() -> None:
    def shown(path: str, text: str) -> str:
        return docs_site.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=path), meta={}))

    home = shown("README.md", (ROOT / "README.md").read_text())
    assert "## Limits" in home and "## Numbers" in home and "## The tree" not in home and "## Pages" not in home
    assert (
        shown("examples/README.md", "[a](upcycle) [b](../docs/onnx.md)")
        == "[a](upcycle/README.md) [b](../docs/onnx.md)"
    )


def test_nothing_is_asked_from_the_network() -> None:
    assert SITE["theme"]["font"] is False
    named = re.findall(r"https?://", (ROOT / "mkdocs.yml").read_text() + (ROOT / "docs/site.css").read_text())
    assert named == [] and (ROOT / SITE["extra"]["polyfills"][0]).exists()


def test_the_versions_that_make_it_are_pinned() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert set(extra) <= set(pinned)
