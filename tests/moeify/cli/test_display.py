from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from moeify.cli import display
from moeify.cli.display import cost_table, inspection_table, plan_table
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.conversion.cost import Cost
from moeify.conversion.dense import Dense, find_ffns
from moeify.passes.ffn import Inspection, Refusal
from moeify.planning.make_plan import make_plan
from tests.moeify import native, tiny


def rows(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_equal_ffns_are_one_row() -> None:
    found = rows(inspection_table(find_ffns(tiny.build("t5_gated"))))
    assert [row[0] for row in found] == ["3"]
    assert found[0][1] == "encoder.block.{0..1}.layer.1.DenseReluDense, decoder.block.0.layer.2.DenseReluDense"
    assert found[0][2:] == ["glu", "gelu_tanh", str(tiny.HIDDEN), str(tiny.INTERMEDIATE)]


def test_refusals_with_one_reason_are_one_line() -> None:
    refused = (
        Refusal("h.0.a", "`mm_1` is too narrow", "mm", ""),
        Refusal("b", "no residual", "add", ""),
        Refusal("h.1.a", "`mm_2` is too narrow", "mm_1", ""),
    )
    lines = display.refusal_lines(Inspection(ffns=(), refused=refused))
    assert lines == ["h.{0..1}.a: `mm` is too narrow", "b: no residual"]


def test_equal_moe_layers_are_one_line() -> None:
    lines = display.moe_lines(find_layers(native.build("qwen2_moe")))
    about = "6 experts of intermediate size 23, top-2, shared experts of 31, router Qwen2MoeTopKRouter"
    assert lines == [f"model.layers.{{0..2}}.mlp (3 layers): {about}"]


def test_texts_are_wrapped_and_cut() -> None:
    assert display.wrapped(["one two three", "four"], 9) == ["one two", "  three", "four"]
    assert display.wrapped(["one two three four", "five"], 9, 1) == ["one two …", "five"]
    assert display.wrapped(["a\x1bb"], 9) == ["a\\x1bb"]


def test_the_longest_section_is_cut_first() -> None:
    sections = [["a"], [], [str(i) for i in range(9)], ["b", "c"]]
    assert display.fit(sections, 20) == ["a", "", *map(str, range(9)), "", "b", "c"]
    cut = display.fit(sections, 10)
    assert cut == ["a", "", "0", "1", "2", "", "b", "c", "… and 6 lines more: --all shows them"] and len(cut) < 10


def test_costs_stand_side_by_side() -> None:
    costs: Any = (("dense", Cost(1200, 1200, 4800, 2400)), ("MoE", Cost(5000, 1500, 20000, 3000)))
    assert rows(cost_table(costs)) == [
        ["dense", "1.2k", "1.2k", "4.8 kB", "2.4k"],
        ["MoE", "5.0k", "1.5k", "20.0 kB", "3.0k"],
    ]


def test_a_plan_shows_its_sites() -> None:
    model = tiny.build("llama")
    dense = Dense(model)
    plan = make_plan(model, dense.graph_module, dense.inspection, MoEConfig(4, 2), "last:1")
    assert rows(plan_table(plan)) == [["model.layers.2.mlp", "4, top-2", "glu", "silu", "36", "57"]]


def test_results_and_progress_go_to_different_places(capsys: pytest.CaptureFixture[str]) -> None:
    consoles: tuple[Console, Console] = (display.stdout(), display.stderr())
    for console, text in zip(consoles, ("result", "progress"), strict=True):
        console.print(text)
    assert capsys.readouterr() == ("result\n", "progress\n")


def test_strings_and_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[/b]:smile: [red]x[/red]\x1b[1m\n\udcff"
    table = Table("layer", box=None, pad_edge=False)
    table.add_row(name)
    display.stdout().print(name)
    display.stdout().print(table)
    shown = r"[/b]:smile: [red]x[/red]\x1b[1m\n\udcff"
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [shown, "layer", shown]
