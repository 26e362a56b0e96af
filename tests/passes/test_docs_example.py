"""The page on writing a pass is right: its example runs, passes its own tests, and is composed as the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeify.passes.base import Pass
from moeify.passes.find_ffn import FindFFN, findings
from moeify.passes.pipeline import Pipeline, conversion
from tests.docs.code_blocks import run_page
from tests.passes.blocks import HIDDEN, TOKENS, exported, planned, residual
from tests.passes.test_base import PASSES

FILE = Path(__file__).resolve().parents[2] / "docs/passes.md"
PAGE = FILE.read_text()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code defines; its tests have run."""
    return vars(run_page(FILE, monkeypatch, {}))


def test_the_page_has_three_tests(page: dict[str, Any]) -> None:
    assert sum(name.startswith("test_") for name in page) == 3


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
