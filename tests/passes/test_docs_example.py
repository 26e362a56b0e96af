"""The page on writing a pass is right: its example runs, passes its own tests, and is composed as the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeify.passes.base import Pass
from moeify.passes.find_ffn import FindFFN, findings
from moeify.passes.pipeline import Pipeline, conversion
from tests.passes.blocks import HIDDEN, TOKENS, exported, planned, residual
from tests.passes.test_base import PASSES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/passes.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's code defines, all of it run in one module."""
    import sys
    from types import ModuleType

    module = ModuleType("page_on_passes")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for block in BLOCKS:
        exec(compile(block, "docs/passes.md", "exec"), vars(module))
    return vars(module)


def test_the_page_has_an_example_a_pipeline_and_tests() -> None:
    assert len(BLOCKS) == 3
    assert [len(re.findall(r"^def test_", block, flags=re.MULTILINE)) for block in BLOCKS] == [0, 0, 3]


def test_the_tests_on_the_page_pass(page: dict[str, Any]) -> None:
    tests: list[Callable[[], None]] = [value for name, value in page.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_a_new_pass_runs_in_a_conversion_without_another_file(
    page: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    drop: Pass = page["DropDropout"]()
    model = nn.Sequential(nn.Dropout(0.3), residual()).eval()
    given = exported(model)
    plan = planned(page["pipeline"](given).graph_module)
    assert re.fullmatch(r"DropDropout: \d+ nodes\nFindFFN: \d+ nodes\n", capsys.readouterr().out)
    whole = Pipeline((drop, FindFFN(), *conversion(plan).passes))
    result = whole(given).graph_module
    assert [node.target for node in result.graph.find_nodes(op="call_module")] == ["1.mlps.0"]
    x = torch.randn(2, TOKENS, HIDDEN)
    assert torch.equal(result(x), x)  # experts of zeros
    assert repr(whole).startswith("Pipeline(passes=(DropDropout(in_training=False), FindFFN(), InsertMoE(plan=Plan(")
    assert len(findings(page["pipeline"](given).graph_module).ffns) == 1


def test_every_pass_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)\(", PAGE, flags=re.MULTILINE)
    assert rows == list(PASSES)
