from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from moeify.training.run_log import RunLog
from moeify.training.stats import LayerStats
from tests.moeify import native
from tests.moeify.command import moeify_command
from tests.moeify.report import small

report = partial(moeify_command, "report")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = RunLog(tmp_path / "run.jsonl", goes_on=False)
    for step in (1, 2):
        log.add(step, 3.0, {"a.0": LayerStats(4, 4, (0.5, 0.5), 0.1, 0, {}, 1.0)})
    return log.path


def test_a_page_and_its_json(tmp_path: Path) -> None:
    native.build("mixtral").save_pretrained(tmp_path / "moe")
    small.save_tokenizer(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7")
    arguments = (tmp_path / "moe", "--text", tmp_path / "text.txt")
    result = report(*arguments, "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"written to {tmp_path / 'page.html'}\n"
    assert "A token meets" in result.stdout
    found, data = small.Page((tmp_path / "page.html").read_text()), json.loads(report(*arguments, "--json").stdout)
    assert data["text"]["source"] == "text.txt" and data["text"]["tokens"] == 7 and data["title"] == "moe"
    loads = [[float(times) for times in row[1:]] for row in found.tables["load-1"][1:]]
    assert loads == [pytest.approx(layer["load"], abs=0.006) for layer in data["routing"]]
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in report(*arguments, "--json").stderr
    (tmp_path / "text.txt").write_text("")
    result = report(*arguments, "--json")
    assert result.exit_code == 2 and "text.txt gives no tokens" in result.stderr


def test_a_run_has_a_page_and_says_where_it_was_cut(run: Path, tmp_path: Path) -> None:
    run.write_text(run.read_text() + '\n{"moeify_run":1,"st')
    result = report(run, "--output", tmp_path / "run.html")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: run.jsonl ends in the middle of a line")
    assert "Note: run.jsonl ends in the middle of a line" in (tmp_path / "run.html").read_text()
    assert json.loads(report(run, "--json").stdout)["training"]["windows"] == 2


def test_a_page_is_not_replaced_by_accident(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    page.write_text("mine")
    result = report(run, "-o", page)
    assert result.exit_code == 1 and "run.html exists" in result.stderr and page.read_text() == "mine"
    assert report(run, "-o", page, "--overwrite").exit_code == 0 and "<!doctype html>" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--json", "-o", "x.html"], 2, "--json goes without --output"),
        (["dense", "--json"], 2, "goes without DENSE and --text"),
    ],
)
def test_what_does_not_go_together(run: Path, arguments: list[str], code: int, said: str) -> None:
    result = report(run, *arguments)
    assert result.exit_code == code and said in result.stderr
    assert report(run.with_name("no.jsonl"), "--json").exit_code == 1
