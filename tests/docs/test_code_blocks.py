"""Every code block of the pages runs, or says why not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.code_blocks import NOT_RUN, PAGES, ROOT, Exports, blocks, commands, run_page
from tests.docs.models import write_models

LANGUAGES = {"", "python", "sh", "text", "yaml"}  # without a language: diagrams, and what programs wrote
CODE = {"python", "sh"}
LAST = ("trl", "onnx")  # they import the most
PROGRAM = re.compile(r"^ *(?:moeify|pip|vllm|torchrun|python|make|import|from) ", flags=re.MULTILINE)
# Their programs write these blocks, or examples run them.
OTHERS = {"docs/gpu.md", *(page.relative_to(ROOT).as_posix() for page in PAGES if page.parts[-3] == "examples")}


EXPORTS: Exports = {}  # the tests' own


def cost(page: Path) -> tuple[bool, str]:
    return any(word in page.stem for word in LAST), page.as_posix()


RUN = sorted((page for page in PAGES if any(each.language in CODE and not each.why for each in blocks(page))), key=cost)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_models(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of other libraries about each other
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch, EXPORTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_stands_in_blocks_of_a_language(page: Path) -> None:
    assert {each.language for each in blocks(page)} <= LANGUAGES
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    assert text.count("\n```") == 2 * len(blocks(page)), "a block that no test sees"
    if name not in OTHERS:
        for each in blocks(page):
            assert each.language in CODE or not PROGRAM.search(each.text), f"{name}:{each.line}: say its language"
            text = text.replace(each.text, "")
        assert not re.search(r"^    (?=\S)", text, flags=re.MULTILINE), "put a fence around an indented block"


def test_every_reason_is_needed() -> None:
    lines = [line for page in PAGES for each in blocks(page) if each.language == "sh" for line in commands(each)]
    assert [words for words in NOT_RUN if not any(line.startswith(words) for line in lines)] == []
